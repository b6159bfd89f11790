/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* from_net: tcx ingress of the node's network cards. */
#ifndef LOCKGATE_FROM_NET_H
#define LOCKGATE_FROM_NET_H

#include "fast.h"

/* A pod's address that comes from where no pod can be. */
static __always_inline bool spoofed_from_outside(struct __sk_buff *skb, struct packet *p)
{
	struct peer *peer;

	if (!leads_outside(skb))
		return false;
	peer = bpf_map_lookup_elem(&peers, &p->wire.saddr);
	if (!peer)
		return false;
	__u32 kind = peer->view[p->epoch & 1].kind;

	return kind == PEER_LOCAL || kind == PEER_REMOTE;
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
	if (skb->vlan_present && skb->vlan_tci & 0xfff)
		return TCX_NEXT;	/* of another network, for a VLAN interface above */
	if (!p->epoch ||
	    (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return TCX_NEXT;
	switch (parse(skb, p)) {
	case 0:
		break;
	case CAUSE_FRAGMENT_UNTRACKED:
		if (for_a_pod(p))
			return drop(skb, p);
		return TCX_NEXT;
	default:
		return TCX_NEXT;	/* nothing a pod would get; the stack knows what to do */
	}
	if (spoofed_from_outside(skb, p)) {
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return drop(skb, p);
	}
	return connection(skb, p);
}

#endif
