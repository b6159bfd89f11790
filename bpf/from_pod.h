/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* from_pod: clsact ingress of a pod's host veth. Everything a pod sends. */
#ifndef LOCKGATE_FROM_POD_H
#define LOCKGATE_FROM_POD_H

#include "fast.h"

/* No pod is published here: the record says who wanted what all the same. */
static __noinline int not_ready(struct __sk_buff *skb, struct packet *p)
{
	if (is_ip(skb))
		parse(skb, p);
	else
		parse_nothing(skb, p);
	GIVE_UP(p, CAUSE_NOT_READY);
	return drop(skb, p);
}

static __always_inline int unknown_ethertype(struct __sk_buff *skb, struct packet *p)
{
	parse_nothing(skb, p);
	GIVE_UP(p, CAUSE_UNKNOWN_ETHERTYPE);
	return drop(skb, p);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	int verdict = fast(skb, PLACE_FROM_POD);

	if (verdict != LONG_WAY)
		return verdict;
	struct packet *p = packet_begin(skb, PLACE_FROM_POD);
	__u32 slot = skb->ifindex - IFINDEX_BASE;
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);
	__u8 mac[6];

	if (!p)
		return TCX_DROP;
	if (!ep || !(ep->flags & EP_LIVE))
		return not_ready(skb, p);
	p->slot = slot;
	p->src_endpoint = ep->id;
	if (!p->epoch)
		return not_ready(skb, p);
	if (load_header(skb, 6, mac, sizeof(mac))) {
		parse_nothing(skb, p);
		GIVE_UP(p, CAUSE_MALFORMED);
		return drop(skb, p);
	}
	/* The stack took a VLAN tag off the frame and would put it back on the way
	 * out: into a network that is none of the pod's. */
	if (skb->vlan_present)
		return unknown_ethertype(skb, p);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return check_arp(skb, p, ep, mac) ? drop(skb, p) : TCX_NEXT;
	if (!is_ip(skb))
		return unknown_ethertype(skb, p);
	if (parse(skb, p))
		return drop(skb, p);
	if (!same_mac(mac, ep->mac)) {
		GIVE_UP(p, CAUSE_SPOOFED_MAC);
		return drop(skb, p);
	}
	if (is_ndp(p))
		return check_ndp(skb, p, ep) ? drop(skb, p) : TCX_NEXT;
	if (check_source(p, ep))
		return drop(skb, p);
	return connection(skb, p, PLACE_FROM_POD);
}

#endif
