/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * spoof.h: a pod speaks for its own addresses and its own MAC, and is no
 * router. What it may say to its neighbours is checked field by field.
 */
#ifndef LOCKGATE_SPOOF_H
#define LOCKGATE_SPOOF_H

#include "parse.h"

struct arp {			/* RFC 826, Ethernet and IPv4 */
	__be16 hardware, protocol;
	__u8 hardware_size, protocol_size;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]));
}

static __always_inline bool is_multicast(const struct addr *a)
{
	if (is_v4(a))
		return (a->b[12] & 0xf0) == 0xe0 || a->b[12] == 0xff;
	return a->b[0] == 0xff;
}

static __always_inline bool is_link_local6(const struct addr *a)
{
	return a->b[0] == 0xfe && (a->b[1] & 0xc0) == 0x80;
}

/* The link-local address that a pod's MAC makes (RFC 4291, appendix A), the only one it may
 * have: each that it claims takes a place in the node's neighbour table, which all share. */
static __always_inline bool is_own_link_local6(const struct addr *a, const __u8 *mac)
{
	const __be32 *w = (const __be32 *)a;

	return w[0] == bpf_htonl(0xfe800000) && !w[1] && a->b[8] == (mac[0] ^ 2) && a->b[9] == mac[1] &&
	       a->b[10] == mac[2] && a->b[11] == 0xff && a->b[12] == 0xfe && a->b[13] == mac[3] &&
	       a->b[14] == mac[4] && a->b[15] == mac[5];
}

/* fe80::1, the node's end of every pod's link. */
static __always_inline bool is_gateway6(const struct addr *a)
{
	const __be32 *w = (const __be32 *)a;

	return w[0] == bpf_htonl(0xfe800000) && !w[1] && !w[2] && w[3] == bpf_htonl(1);
}

static __always_inline bool is_ndp(const struct packet *p)
{
	return p->family == 6 && p->wire.proto == IPPROTO_ICMPV6 && p->icmp_type >= NDP_RS &&
	       p->icmp_type <= NDP_REDIRECT;
}

/* The frame's MAC, the sender's MAC and IP, or no IP (a probe, RFC 5227). 0 or a cause. */
static __noinline int check_arp(struct __sk_buff *skb, struct packet *p, struct endpoint *ep, const __u8 *mac)
{
	struct arp *arp = (void *)p->bytes;

	parse_nothing(skb, p);
	if (!ep || !mac || bpf_skb_load_bytes(skb, ETH_HLEN, arp, sizeof(*arp)))
		return GIVE_UP(p, CAUSE_MALFORMED);
	__u32 sender = *(__u32 *)arp->sender_ip;

	/* What the record of a drop shows: who was claimed to ask whom. */
	map_v4(&p->wire.saddr, sender);
	map_v4(&p->wire.daddr, *(__u32 *)arp->target_ip);
	if (!same_mac(mac, ep->mac))
		return GIVE_UP(p, CAUSE_SPOOFED_MAC);
	if (!same_mac(arp->sender_mac, ep->mac))
		return GIVE_UP(p, CAUSE_SPOOFED_ARP);
	if (sender && !same_addr(&p->wire.saddr, &ep->addr4))
		return GIVE_UP(p, CAUSE_SPOOFED_ARP);
	return 0;
}

/* RFC 4861: solicitations and advertisements for its own addresses, within
 * the link, and nothing of a router's. 0 or a cause. */
static __noinline int check_ndp(struct __sk_buff *skb, struct packet *p, struct endpoint *ep)
{
	struct addr target;

	if (!ep)
		return GIVE_UP(p, CAUSE_MALFORMED);
	if (p->icmp_type == NDP_RA)
		return GIVE_UP(p, CAUSE_ROUTER_ADVERTISEMENT);
	if (p->icmp_type == NDP_REDIRECT)
		return GIVE_UP(p, CAUSE_NDP_REDIRECT);
	/* Routed, it would reach another pod unjudged. */
	if (p->ttl != 255 || (!is_multicast(&p->wire.daddr) && !is_link_local6(&p->wire.daddr)))
		return GIVE_UP(p, CAUSE_SPOOFED_NDP);
	if (!zero_addr(&p->wire.saddr) && !is_own_link_local6(&p->wire.saddr, ep->mac) &&
	    !same_addr(&p->wire.saddr, &ep->addr6))
		return GIVE_UP(p, CAUSE_SPOOFED_NDP);
	if (p->icmp_type == NDP_NA) {
		if (bpf_skb_load_bytes(skb, p->l4 + 8, &target, sizeof(target)))
			return GIVE_UP(p, CAUSE_MALFORMED);
		if (!is_own_link_local6(&target, ep->mac) && !same_addr(&target, &ep->addr6))
			return GIVE_UP(p, CAUSE_SPOOFED_NDP);
	}
	return 0;
}

/* Source address of an IP packet from the pod. 0 or a cause. */
static __always_inline int check_source(struct packet *p, struct endpoint *ep)
{
	const struct addr *own = p->family == 4 ? &ep->addr4 : &ep->addr6;

	if (is_multicast(&p->wire.daddr))
		return GIVE_UP(p, CAUSE_MULTICAST);
	if (!same_addr(&p->wire.saddr, own))
		return GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
	return 0;
}

#endif
