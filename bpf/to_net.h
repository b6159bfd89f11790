/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * to_net: tcx egress of the node's network cards and its VXLAN device. Where processes of
 * the node serve a frontend's clients, their answers get the frontend's address here.
 */
#ifndef LOCKGATE_TO_NET_H
#define LOCKGATE_TO_NET_H

#include "connection.h"

static __always_inline bool has_host_backends(void)
{
	__u32 zero = 0;
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);

	return node && node->host_backends;
}

/* The translation of the answer `t` of a process of the node, in p->now. False: it is none. */
static __noinline int find_answer(struct packet *p, const struct tuple *t)
{
	struct ct *ct = t ? ct_find(p, t) : NULL;
	struct nat *next;

	if (!ct || !p->reply || !(ct->flags & CT_NAT_REPLY) || target_kind(ct->target[0]) != TO_HOST)
		return 0;
	next = nat_find(p, t);
	if (!next)
		return 0;
	p->now = next->to;
	if (!p->icmp_error)
		ct_seen(p, ct);
	return 1;
}

SEC("tc")
int to_net(struct __sk_buff *skb)
{
	if (!has_host_backends() || !is_ip(skb) || skb->mark == DRY_MARK)
		return TCX_NEXT;
	struct packet *p = packet_begin(skb, PLACE_TO_NET);

	if (!p || !p->epoch || parse(skb, p))
		return TCX_NEXT;
	p->asked = p->wire;
	if (p->icmp_error)
		reverse_of(&p->asked, &p->inner);	/* as if the quoted packet were answered */
	if (!find_answer(p, &p->asked))
		return TCX_NEXT;
	if (p->fragment == FRAG_FIRST && !leave_ports(p, NO_SLOT))
		return drop(skb, p);
	if (p->icmp_error ? translate_error(skb, p) < 0 : !rewrite(skb, p))
		return drop(skb, p);
	return TCX_NEXT;
}

#endif
