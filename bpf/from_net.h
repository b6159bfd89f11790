/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* from_net: tcx ingress of the node's network cards and its VXLAN device. */
#ifndef LOCKGATE_FROM_NET_H
#define LOCKGATE_FROM_NET_H

#include "fast.h"

/* The hop towards the node that sent the packet into the tunnel; -1: no node did,
 * or not to an InternalIP of this one. To any other address of a node pods are
 * masqueraded, so their packets bear the address of the node they are on. */
static __noinline int tunnelled_by(struct __sk_buff *skb, struct packet *p)
{
	struct addr *sender = &p->tuple.saddr, *receiver = &p->tuple.daddr;
	struct peer *node;

	if (!tunnel_ends(skb, sender, receiver))
		return -1;
	node = bpf_map_lookup_elem(&peers, receiver);
	if (!node || node->view[p->epoch & 1].kind != PEER_HOST)
		return -1;
	node = bpf_map_lookup_elem(&peers, sender);
	if (!node || node->view[p->epoch & 1].kind != PEER_NODE)
		return -1;
	return node->view[p->epoch & 1].target;
}

/* Can no packet of this source come by this link? */
static __noinline int spoofed(struct __sk_buff *skb, struct packet *p)
{
	if (p->role != LINK_OUTSIDE && (!config_tunnel || p->role != LINK_TUNNEL || p->dry))
		return 0;
	int sender = p->role == LINK_OUTSIDE ? 0 : tunnelled_by(skb, p);
	struct peer *peer = bpf_map_lookup_elem(&peers, &p->wire.saddr);
	__u32 kind = peer ? peer->view[p->epoch & 1].kind : PEER_NONE;

	if (p->role == LINK_OUTSIDE)
		return kind == PEER_LOCAL || kind == PEER_REMOTE;
	/* Only nodes send into the tunnel, each for what is behind its own hop. */
	if (sender < 0)
		return 1;
	if (!peer || kind == PEER_NONE)
		return 0;	/* no pod that we know: judged as the address it is */
	/* An answer in another node's name: see arrive.h. */
	if (kind == PEER_NODE && peer->view[p->epoch & 1].target != (__u32)sender)
		p->third = 1;
	return !p->third &&
	       ((kind != PEER_REMOTE && kind != PEER_NODE) || peer->view[p->epoch & 1].target != (__u32)sender);
}

/* Is the address nobody's but services'? */
static __always_inline bool is_frontends(struct packet *p)
{
	struct service_view *address = service_find(p, &p->wire, true);

	return address && (address->flags & (SVC_FRONTEND | SVC_OPEN)) == SVC_FRONTEND;
}

/* What is no business of ours is the stack's; from the tunnel nothing is that
 * was not looked at: that is dropped for p->cause. */
static __always_inline int pass(struct __sk_buff *skb, struct packet *p)
{
	return p->role == LINK_TUNNEL ? drop(skb, p) : TCX_NEXT;
}

SEC("tc")
int from_net(struct __sk_buff *skb)
{
	int verdict = fast(skb, PLACE_FROM_NET);

	if (verdict != LONG_WAY)
		return verdict;
	struct packet *p = packet_begin(skb, PLACE_FROM_NET);

	if (!p)
		return TCX_DROP;
	p->role = role_of(skb);
	/* A VLAN is another network, for an interface above. */
	if (!p->epoch || !is_ip(skb) || (skb->vlan_present && skb->vlan_tci & 0xfff)) {
		parse_nothing(skb, p);
		GIVE_UP(p, p->epoch ? CAUSE_UNKNOWN_ETHERTYPE : CAUSE_NOT_READY);
		return pass(skb, p);
	}
	switch (parse(skb, p)) {
	case 0:
		break;
	case CAUSE_FRAGMENT_UNTRACKED:
		if (for_a_pod(p) || is_frontends(p))
			return drop(skb, p);
		/* The first of what is for the node itself leaves nothing: see connection(). */
		if (p->role == LINK_TUNNEL && p->to_host && !spoofed(skb, p) && !p->third) {
			bpf_skb_change_type(skb, PACKET_HOST);
			return TCX_NEXT;
		}
		return pass(skb, p);
	case CAUSE_EXTENSION_HEADER:
		/* The stack may follow it, and find that it is for our VXLAN device. */
		if (config_tunnel && tunnel_port() && kind_of(p, &p->wire.daddr) == PEER_HOST)
			return drop(skb, p);
		return pass(skb, p);
	default:
		return pass(skb, p);	/* nothing a pod would get; the stack knows what to do */
	}
	if (spoofed(skb, p)) {
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return drop(skb, p);
	}
	/* It was made out to no MAC of ours. */
	if (config_tunnel && p->role == LINK_TUNNEL)
		bpf_skb_change_type(skb, PACKET_HOST);
	if (is_encapsulated(p)) {
		enum peer_kind kind = kind_of(p, &p->wire.daddr);

		if ((kind == PEER_LOCAL || kind == PEER_HOST) && look_inside(skb, p))
			return drop(skb, p);
	}
	return connection(skb, p, PLACE_FROM_NET);
}

#endif
