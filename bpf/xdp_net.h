/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* xdp_net: XDP of the cards that clients outside come by. What it passes, from_net sees. */
#ifndef LOCKGATE_XDP_NET_H
#define LOCKGATE_XDP_NET_H

#include "dsr.h"
#include "firewall.h"

static __always_inline int from_card(struct xdp_md *ctx)
{
	struct frame frame = {};

	frame_read(ctx, &frame);
	if (config_firewall && firewall(ctx, &frame) == XDP_DROP)
		return XDP_DROP;
	return config_balance ? balance_frame(ctx, &frame) : XDP_PASS;
}

/* Frames may lie in several pieces: without `frags`, a card with a large MTU refuses it. */
SEC("xdp.frags")
int xdp_net(struct xdp_md *ctx)
{
	return from_card(ctx);
}

/* The same for generic XDP, where the kernel makes one piece of a frame. For a program with
 * `frags` it copies the packet, and forgets where its MAC header ends (skb_pp_cow_data() leaves
 * out mac_len; seen with Linux 6.18): programs at tcx would take the IP header for it. */
SEC("xdp")
int xdp_generic(struct xdp_md *ctx)
{
	return from_card(ctx);
}

#endif
