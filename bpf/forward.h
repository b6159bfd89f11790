/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * forward.h: the packet leaves, by the shortest way: into the pod's namespace,
 * onto the wire, or up the node's own stack.
 */
#ifndef LOCKGATE_FORWARD_H
#define LOCKGATE_FORWARD_H

#include "arrive.h"
#include "encapsulate.h"
#include "nat.h"
#include "reply.h"
#include "tunnel.h"

/* A dry run ends here: the packet would pass. */
static __always_inline int answer_dry(struct __sk_buff *skb, struct packet *p)
{
	skb->cb[DRY_RESULT] = VERDICT_ALLOW | (__u32)p->judged << 16;
	skb->cb[DRY_EGRESS] = p->egress_cell;
	skb->cb[DRY_INGRESS] = p->ingress_cell;
	skb->cb[DRY_TARGET] = p->target;
	skb->cb[DRY_SERVICE] = p->service;
	return TCX_DROP;
}

/* Send the answer that replaced the packet back where it came from. */
static __always_inline int answer_sender(struct __sk_buff *skb, struct packet *p)
{
	if (p->place == PLACE_FROM_POD)
		return bpf_redirect_peer(skb->ifindex, 0);
	if (config_tunnel && p->place == PLACE_FROM_NET && p->role == LINK_TUNNEL && back_into_tunnel(skb))
		return TCX_DROP;
	return bpf_redirect(skb->ifindex, 0);
}

/* Give the packet up and tell its sender by `told` (0 = the answer stands). */
static __always_inline int drop_and_tell(struct __sk_buff *skb, struct packet *p, int told)
{
	int verdict = drop(skb, p);

	if (told || p->dry || p->place == PLACE_TO_POD)
		return verdict;
	return answer_sender(skb, p);
}

static __noinline int deliver(struct __sk_buff *skb, struct packet *p, __u32 slot)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);
	__u8 macs[12];

	if (!ep || !(ep->flags & EP_LIVE)) {
		GIVE_UP(p, CAUSE_ENDPOINT_GONE);
		return drop(skb, p);
	}
	if (p->dry)
		return answer_dry(skb, p);
	if (p->place == PLACE_TO_POD)
		return TCX_NEXT;	/* already on its way into the pod */
	__builtin_memcpy(macs, ep->mac, 6);
	__builtin_memcpy(macs + 6, ep->host_mac, 6);
	bpf_skb_store_bytes(skb, 0, macs, 12, 0);
	return bpf_redirect_peer(IFINDEX_BASE + slot, 0);
}

/* By a hop, with what headers it has by now. */
static __noinline int leave_by(struct __sk_buff *skb, struct packet *p, const struct hop_view *hop)
{
	if (!hop)
		return TCX_DROP;
	if (p->dry)
		return answer_dry(skb, p);
	if (hop->flags & HOP_MAC) {
		__u8 macs[12];

		__builtin_memcpy(macs, hop->dmac, 6);
		__builtin_memcpy(macs + 6, hop->smac, 6);
		bpf_skb_store_bytes(skb, 0, macs, 12, 0);
		if (config_tunnel && hop->flags & HOP_TUNNEL && enter_tunnel(skb, hop)) {
			GIVE_UP(p, CAUSE_NO_ROUTE);
			return drop(skb, p);
		}
		return bpf_redirect(hop->ifindex, 0);
	}
	struct bpf_redir_neigh via = {};
	const struct addr *next = p->family == 4 ? &hop->via4 : &hop->via6;

	if (zero_addr(next))
		return bpf_redirect_neigh(hop->ifindex, NULL, 0, 0);
	if (p->family == 4) {
		via.nh_family = AF_INET;
		via.ipv4_nh = *(__be32 *)&next->b[12];
	} else {
		via.nh_family = AF_INET6;
		__builtin_memcpy(via.ipv6_nh, next, 16);
	}
	return bpf_redirect_neigh(hop->ifindex, &via, sizeof(via), 0);
}

static __always_inline int leave(struct __sk_buff *skb, struct packet *p, __u32 index)
{
	struct hop_view *hop = hop_of(p->epoch, index);

	if (!hop || !hop->ifindex || hop->flags & HOP_DROP) {
		GIVE_UP(p, CAUSE_NO_ROUTE);
		return drop(skb, p);
	}
	if (!p->dry)
		decrement_ttl(skb, p);
	return leave_by(skb, p, hop);
}

/* Out of hops, or too big for the way out with `more` bytes of headers: tell the sender,
 * with the MTU (RFC 1191, RFC 8201). Asked before anything is rewritten, so that the quote
 * is what was sent. */
static __always_inline int cannot_leave(struct __sk_buff *skb, struct packet *p, __u32 more, int *verdict)
{
	if (target_kind(p->target) != TO_HOP)
		return 0;
	__u32 index = target_index(p->target);
	struct hop_view *hop = hop_of(p->epoch, index);

	if (!hop || !hop->ifindex || hop->flags & HOP_DROP)
		return 0;	/* leave() says so */
	if (p->ttl <= 1 && !p->dry) {
		GIVE_UP(p, CAUSE_TTL_EXCEEDED);
		*verdict = drop_and_tell(skb, p, icmp_error(skb, p, p->family == 4 ? ICMP_TIME << 8 : ICMP6_TIME << 8, 0));
		return 1;
	}
	if (!hop->mtu || fits(skb, p->l4 - p->l3, hop->mtu - more))
		return 0;
	/* Its segments get smaller by as much as they get headers. */
	if (more && may_shrink(skb, p) && fits(skb, p->l4 - p->l3, hop->mtu))
		return 0;
	GIVE_UP(p, CAUSE_PACKET_TOO_BIG);
	*verdict = drop_and_tell(skb, p, icmp_error(skb, p, p->family == 4 ? ICMP_UNREACH << 8 | 4 : ICMP6_TOO_BIG << 8,
						    hop->mtu - more));
	return 1;
}

/* Up the node's own stack. What a pod here answers in the name of another node, which a process
 * here asked and which sent the question here, comes by the card that leads to that one, as it does
 * from pods elsewhere: a stack that looks for the way back (rp_filter) takes it by no other. */
static __noinline int go_up(struct __sk_buff *skb, struct packet *p)
{
	__u32 target = p->place == PLACE_FROM_POD && p->reply ? peer_target(p, &p->now.saddr) : 0;
	struct hop_view *hop = target_kind(target) == TO_HOP ? hop_of(p->epoch, target_index(target)) : NULL;

	if (p->dry)
		return answer_dry(skb, p);
	if (!hop || (hop->flags & (HOP_MAC | HOP_TUNNEL | HOP_DROP)) != HOP_MAC)
		return TCX_NEXT;
	bpf_skb_store_bytes(skb, 0, hop->smac, 6, 0);
	return bpf_redirect(hop->ifindex, BPF_F_INGRESS);
}

/* Rewrite and send to p->target. */
__noinline int forward(struct __sk_buff *skb, struct packet *p)
{
	int verdict;

	if (!p)
		return TCX_DROP;
	if (cannot_leave(skb, p, 0, &verdict))
		return verdict;
	if (p->outer_size && !decapsulate(skb, p))
		return drop(skb, p);
	/* Asked here, as most packets leave as they came: spares them the call. */
	if (!same_ends(&p->wire, &p->now) && !rewrite(skb, p))
		return drop(skb, p);
	switch (target_kind(p->target)) {
	case TO_LOCAL:
		return deliver(skb, p, target_index(p->target));
	case TO_HOP:
		return leave(skb, p, target_index(p->target));
	case TO_HOST:
		return go_up(skb, p);
	}
	GIVE_UP(p, CAUSE_NO_ROUTE);
	return drop(skb, p);
}

#endif
