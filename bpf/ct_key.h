/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ct_key.h: by what a connection is found, and for how long. */
#ifndef LOCKGATE_CT_KEY_H
#define LOCKGATE_CT_KEY_H

#include "packet.h"

/* True when the sender of `t` is the higher end of the key. The order is of
 * the bytes as they lie in memory: any total order will do. */
static __always_inline bool ct_key_of(struct ct_key *key, const struct tuple *t)
{
	const __u64 *s = (const __u64 *)&t->saddr, *d = (const __u64 *)&t->daddr;
	bool high;

	if (s[1] != d[1])
		high = s[1] > d[1];
	else if (s[0] != d[0])
		high = s[0] > d[0];
	else
		high = t->sport > t->dport;
	copy_addr(&key->lo, high ? &t->daddr : &t->saddr);
	copy_addr(&key->hi, high ? &t->saddr : &t->daddr);
	*(__u64 *)&key->lo_port = high ? ends_of(t->dport, t->sport, t->proto)
				       : ends_of(t->sport, t->dport, t->proto);
	return high;
}

/* The sweep (lockgate/agent/sweep.py) says the same. */
static __always_inline __s32 ct_timeout(const struct ct *ct, __u8 proto)
{
	const __u8 fins = CT_FIN_ORIGIN | CT_FIN_REPLY;

	switch (ct->state) {
	case CT_NEW:	 return TIMEOUT_HALF_OPEN;
	case CT_CLOSING: return TIMEOUT_CLOSING;
	case CT_CLOSED:
		/* By an ABORT, which may be forged: an idle receiver that ignores it may
		 * say so with its next heartbeat only, every 30 s (RFC 9260 16). */
		if (proto == IPPROTO_SCTP && (ct->flags & fins) != fins)
			return TIMEOUT_HALF_OPEN;
		return TIMEOUT_CLOSED;
	}
	return proto == IPPROTO_TCP || proto == IPPROTO_SCTP ? TIMEOUT_ESTABLISHED : TIMEOUT_DATAGRAM;
}

#endif
