/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* related.h: ICMP errors about a known connection, which pass with it. */
#ifndef LOCKGATE_RELATED_H
#define LOCKGATE_RELATED_H

#include "find.h"
#include "verdict.h"

/* May a packet of the connection come encapsulated? Only its client's, to the frontend. */
static __always_inline bool is_inside(struct packet *p, struct ct *ct)
{
	return !p->reply && ct->flags & CT_NAT_REPLY && is_ours(ct->target[0]);
}

/* Does the connection, found by a quote, hold in this epoch? */
static __noinline int stands(struct packet *p, struct ct *ct)
{
	struct tuple *t = &p->tuple;

	if (!ct)
		return 0;
	if (ct->epoch == p->epoch || ct->flags & CT_EXEMPT)
		return 1;
	if (p->reply)
		reverse_of(t, &p->now);
	else
		*t = p->now;
	int allowed = judge(p, t);

	p->judged = 0;
	return allowed && p->src_endpoint == ct->src_endpoint && p->dst_endpoint == ct->dst_endpoint;
}

/* An ICMP error about a connection whose packets in its direction have become p->now: both
 * packets are translated. < 0 with a cause when that fails. */
static __noinline int translate_error(struct __sk_buff *skb, struct packet *p)
{
	struct tuple *t = &p->tuple;

	reverse_of(t, &p->inner);
	bool changed = !same_ends(t, &p->now);
	struct addr *from = same_addr(&p->wire.saddr, &t->saddr) ? &p->now.saddr : &p->wire.saddr;
	struct addr *to = same_addr(&p->wire.daddr, &t->daddr) ? &p->now.daddr : &p->wire.daddr;

	/* p->key served its purpose: hold the outer addresses there. */
	p->key.lo = *from;
	p->key.hi = *to;
	reverse_of(t, &p->now);
	p->now = p->wire;
	p->now.saddr = p->key.lo;
	p->now.daddr = p->key.hi;
	if (changed && !rewrite_error(skb, p))
		return -1;
	p->wire = p->now;
	return 1;
}

/* An ICMP error about a known connection passes with it, both packets
 * translated. False: it is related to nothing; p->now is as it came. */
__noinline int related(struct __sk_buff *skb, struct packet *p)
{
	struct ct *ct = NULL;

	if (!p)
		return 0;
	struct tuple *t = &p->tuple;	/* as if the quoted packet were answered */

	/* It must go to the sender of what it quotes, and a pod speaks only of
	 * what it was sent: else a quote would be a pass to anywhere. */
	reverse_of(t, &p->inner);
	if (same_addr(&p->wire.daddr, &t->daddr) &&
	    (p->place != PLACE_FROM_POD || same_addr(&p->wire.saddr, &t->saddr)))
		ct = find_connection(skb, p, t);
	if (!ct || !stands(p, ct) || (p->outer_size && !is_inside(p, ct)) ||
	    (p->third && !answers_for_another(p, ct))) {
		p->now = p->wire;
		p->icmp_error = 0;
		p->quoted = same_addr(&p->wire.daddr, &p->inner.saddr);
		return 0;
	}
	if (ct->flags & (p->reply ? CT_NAT_REPLY : CT_NAT_ORIGIN)) {
		struct nat *next = nat_find(p, &p->now);

		if (next)
			p->now = next->to;
	}
	p->target = ct->target[p->reply & 1];
	return translate_error(skb, p);
}

#endif
