/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* firewall.h: what a card may bring, before anything else is done with it. */
#ifndef LOCKGATE_FIREWALL_H
#define LOCKGATE_FIREWALL_H

#include "frame.h"

/* 0 removes the firewall. */
const volatile __u32 config_firewall = 0;

/* XDP_PASS: go on with it. XDP_DROP: it ends here. */
static __always_inline int firewall(struct xdp_md *ctx, struct frame *f)
{
	return f->kind == FRAME_BAD ? XDP_DROP : XDP_PASS;
}

#endif
