/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * arrive.h: who can have sent what a card brings. Addresses are believed by
 * the link that leads back to them, and by no other.
 */
#ifndef LOCKGATE_ARRIVE_H
#define LOCKGATE_ARRIVE_H

#include "event.h"
#include "parse.h"
#include "tunnel.h"

/* Is what has this target, by peers, of this node? That sends nothing by its cards. */
static __always_inline bool is_ours(__u32 target)
{
	return target_kind(target) == TO_LOCAL || target_kind(target) == TO_HOST;
}

/* Can what this target leads to have sent by the card at this hook? Other nodes and their
 * pods send by one that leads to them: where that is the tunnel, a packet beside it is
 * somebody else's. The world is wherever it is. */
static __always_inline bool comes_by(struct __sk_buff *skb, struct packet *p, __u32 target)
{
	__u32 index = target_index(target);

	if (target_kind(target) != TO_HOP || p->dry)
		return true;
	struct hop_view *hop = hop_of(p->epoch, index);

	if (!hop || hop->flags & (HOP_MASQ | HOP_TUNNEL))
		return hop && (hop->flags & HOP_MASQ || hop->ifindex == skb->ifindex);
	/* There may be a second such card, for the other family. */
	return hop->ifindex && !(hop->flags & HOP_DROP) && p->role == LINK_UNDERLAY;
}

/* Is the sender of a packet of this connection on this node? Not the originator whose packets
 * came by the stack, which was given them by who knows what. */
static __always_inline bool sent_here(struct packet *p, struct ct *ct)
{
	__u32 source = ct->target[!p->reply];

	return is_ours(source) && (target_kind(source) == TO_LOCAL || p->reply || ct->flags & CT_EXEMPT);
}

static __always_inline enum peer_kind kind_of(struct packet *p, const struct addr *addr)
{
	struct peer *peer = bpf_map_lookup_elem(&peers, addr);

	return peer ? peer->view[p->epoch & 1].kind : PEER_NONE;
}

/* Is it the address of a pod, of whatever node? */
static __always_inline bool is_pod(struct packet *p, const struct addr *addr)
{
	enum peer_kind kind = kind_of(p, addr);

	return kind == PEER_LOCAL || kind == PEER_REMOTE;
}

/* Where packets to a peer go; TO_NOWHERE for what is none. */
static __always_inline __u32 peer_target(struct packet *p, const struct addr *addr)
{
	struct peer *peer = bpf_map_lookup_elem(&peers, addr);
	struct peer_view *view = peer ? &peer->view[p->epoch & 1] : NULL;

	if (!view)
		return TO_NOWHERE;
	switch (view->kind) {
	case PEER_LOCAL:  return target_of(TO_LOCAL, view->target);
	case PEER_REMOTE:
	case PEER_NODE:   return target_of(TO_HOP, view->target);
	case PEER_HOST:   return target_of(TO_HOST, 0);
	}
	return TO_NOWHERE;
}

/* What a node itself says to another goes by the card, by the stacks of both, also where pods'
 * packets go through the tunnel. */
static __always_inline bool is_between_nodes(struct packet *p)
{
	return p->role == LINK_UNDERLAY && kind_of(p, &p->wire.saddr) == PEER_NODE && !is_pod(p, &p->wire.daddr);
}

/* A node's answer to a pod or process of this one comes from wherever the backend is that
 * a third node sent the question to (docs/services.md, DSR). Is it one, to a pod? */
static __always_inline bool answers_for_another(struct packet *p, struct ct *ct)
{
	return p->reply && p->role != LINK_OUTSIDE && target_kind(ct->target[1]) == TO_LOCAL &&
	       kind_of(p, &p->wire.saddr) == PEER_NODE;
}

/* To a process: only what comes from a port that all nodes serve, this one too. */
static __always_inline bool answers_for_the_stack(struct packet *p)
{
	struct service_key key = {
		.addr = p->wire.daddr,
		.port = p->quoted ? p->inner.dport : p->wire.sport,
		.proto = p->quoted ? p->inner.proto : p->wire.proto,
	};
	struct service *service = bpf_map_lookup_elem(&services, &key);

	return service && service->view[p->epoch & 1].flags & SVC_FRONTEND &&
	       kind_of(p, &p->wire.daddr) == PEER_HOST;
}

/* Is it for our VXLAN device, by none who may send to it? That is another node, by the card
 * that leads to it; the device sees outer addresses, but not the card (from_net.h). */
static __noinline int tunnel_stranger(struct packet *p)
{
	__u32 port = tunnel_port();

	if (!port || p->wire.proto != IPPROTO_UDP || p->wire.dport != bpf_htons(port) ||
	    kind_of(p, &p->wire.daddr) != PEER_HOST)
		return 0;
	return p->role != LINK_UNDERLAY || kind_of(p, &p->wire.saddr) != PEER_NODE;
}

/* Not for a pod: this node's own business, or its stack's. */
static __always_inline int for_the_stack(struct __sk_buff *skb, struct packet *p)
{
	if (config_tunnel && tunnel_stranger(p)) {
		GIVE_UP(p, CAUSE_TUNNEL_STRANGER);
		return drop(skb, p);
	}
	return TCX_NEXT;
}

/* Is it an ICMP error? Asked of a pod's that is related to nothing it was sent. */
static __always_inline bool speaks_of_another(const struct packet *p)
{
	return p->fragment != FRAG_LATER && p->wire.proto == (p->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) &&
	       is_icmp_error(p->family, p->icmp_type);
}

#endif
