/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * firewall_known.h: what a default of Drop lets pass, since the node could not
 * live without it, and what no packet may be. Asked of few packets.
 */
#ifndef LOCKGATE_FIREWALL_KNOWN_H
#define LOCKGATE_FIREWALL_KNOWN_H

#include "ct_key.h"
#include "frame.h"

#define TCP_LISTEN 10		/* enum in net/tcp_states.h */
#define THIS_NETNS -1		/* BPF_F_CURRENT_NETNS */
#define PORT_DHCP_SERVER 67
#define PORT_DHCP_CLIENT 68

static __always_inline bool fw_is_loopback(const struct addr *a)
{
	const __be32 *w = (const __be32 *)a;

	if (is_v4(a))
		return a->b[12] == 127;
	return !w[0] && !w[1] && !w[2] && w[3] == bpf_htonl(1);
}

/* Is it a multicast or broadcast address? */
static __always_inline bool fw_to_many(const struct addr *a)
{
	if (is_v4(a))
		return (a->b[12] & 0xf0) == 0xe0 || *(const __be32 *)&a->b[12] == 0xffffffffu;
	return a->b[0] == 0xff;
}

/* ---- Malformed ------------------------------------------------------------------- */

/* A plain frame whose UDP header says that there is more, or less than the header. */
static __always_inline bool fw_bad_udp(struct xdp_md *ctx, const struct frame *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__be16 *udp = data + ETH_HLEN + (f->family == 4 ? sizeof(struct ipv4) : sizeof(struct ipv6));

	if ((void *)(udp + 4) > end)
		return true;
	__u32 length = bpf_ntohs(udp[2]);

	return length < 8 || f->l4 - ETH_HLEN + length > f->length;
}

/* A fragment of IPv4 that ends beyond what a packet can be, or begins within the first
 * one's TCP header (RFC 1858). */
static __noinline int fw_bad_fragment(struct xdp_md *ctx, const struct frame *f)
{
	__be16 frag;

	if (f->family != 4 || f->fragment != FRAG_LATER ||
	    bpf_xdp_load_bytes(ctx, ETH_HLEN + offsetof(struct ipv4, frag), &frag, sizeof(frag)))
		return 0;
	__u32 offset = (bpf_ntohs(frag) & IPV4_OFF) * 8;

	return offset + f->length > 65535 || (f->ends.proto == IPPROTO_TCP && offset < 20);
}

/* ---- Packets in packets ------------------------------------------------------------- */

/* The packet whose IP header is at `at` in one of `q->length`, as far as it can be read: ends,
 * fragment, flags. */
static __noinline int frame_inside(struct xdp_md *ctx, struct frame *q, __u32 at, __u32 family)
{
	struct l4_head head = {};
	int proto;

	q->family = family;
	q->kind = FRAME_OTHER;
	if (family == 4) {
		struct ipv4 ip;

		if (bpf_xdp_load_bytes(ctx, at, &ip, sizeof(ip)) || ip.version_ihl >> 4 != 4)
			return 0;
		map_v4(&q->ends.saddr, ip.saddr);
		map_v4(&q->ends.daddr, ip.daddr);
		proto = ip.proto;
		if (ip.frag & bpf_htons(IPV4_OFF))
			q->fragment = FRAG_LATER;
		at += (ip.version_ihl & 15) * 4;
	} else {
		struct ipv6 ip;

		if (bpf_xdp_load_bytes(ctx, at, &ip, sizeof(ip)) || *(__u8 *)&ip >> 4 != 6)
			return 0;
		copy_addr(&q->ends.saddr, &ip.saddr);
		copy_addr(&q->ends.daddr, &ip.daddr);
		q->l4 = at + sizeof(ip);
		proto = frame_extensions(ctx, q, ip.next);
		if (proto < 0)
			return 0;
		at = q->l4;
	}
	q->l4 = at;
	set_ends(&q->ends, 0, 0, proto);
	if (q->fragment == FRAG_LATER || !has_ports(proto))
		return 1;
	if (!bpf_xdp_load_bytes(ctx, at, &head, sizeof(head)))
		q->tcp_flags = proto == IPPROTO_TCP ? head.more[9] : 0;
	else if (bpf_xdp_load_bytes(ctx, at, &head, 4))	/* quoted too little */
		return 0;
	set_ends(&q->ends, head.sport, head.dport, proto);
	return 1;
}

/* Did another node's balancer send it? It came by a card that leads there, in a packet
 * whose source says so (config.h). */
static __noinline int fw_is_encapsulated(struct xdp_md *ctx, const struct frame *f)
{
	__u32 ifindex = ctx->ingress_ifindex;
	const __be32 *s = (const __be32 *)&f->ends.saddr, *outer6 = (const __be32 *)config_outer6;
	__u32 *role;

	if (f->fragment == FRAG_LATER)
		return 0;
	if (f->family == 4 &&
	    (f->ends.proto != IPPROTO_IPIP || f->ends.saddr.b[12] != config_outer4[0] || f->ends.saddr.b[13] != config_outer4[1]))
		return 0;
	if (f->family == 6 && (f->ends.proto != IPPROTO_IPV6 || s[0] != *(const volatile __be32 *)&outer6[0] ||
			       s[1] != *(const volatile __be32 *)&outer6[1] || s[2] != *(const volatile __be32 *)&outer6[2]))
		return 0;
	role = bpf_map_lookup_elem(&link_roles, &ifindex);
	return role && *role == LINK_UNDERLAY;
}

static __noinline int fw_icmp_type(struct xdp_md *ctx, const struct frame *f)
{
	struct icmp_head icmp;

	if (f->fragment == FRAG_LATER || f->ends.proto != (f->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) ||
	    bpf_xdp_load_bytes(ctx, f->l4, &icmp, sizeof(icmp)))
		return -1;
	return icmp.type;
}

static __always_inline bool fw_is_error(struct xdp_md *ctx, const struct frame *f)
{
	int type = fw_icmp_type(ctx, f);

	return type >= 0 && is_icmp_error(f->family, type);
}

/* ---- What is known ------------------------------------------------------------------- */

/* What belongs to the link or asks for nothing. */
static __always_inline bool fw_is_harmless(struct xdp_md *ctx, const struct frame *f)
{
	const __u8 *s = f->ends.saddr.b;

	if (f->ends.proto == IPPROTO_UDP)
		return f->family == 4 ? f->ends.sport == bpf_htons(PORT_DHCP_SERVER) && f->ends.dport == bpf_htons(PORT_DHCP_CLIENT)
				      : s[0] == 0xfe && (s[1] & 0xc0) == 0x80;
	if (f->family == 6 && s[0] == 0xfe && (s[1] & 0xc0) == 0x80)
		return true;
	int type = fw_icmp_type(ctx, f);

	if (f->family == 4)
		return type == ICMP_ECHO_REPLY || f->ends.proto == IPPROTO_IGMP;
	/* Routers lower it: 255 comes from the link (RFC 4861 7.1). */
	return type == ICMP6_REPLY || (type >= NDP_RS && type <= NDP_REDIRECT && f->ttl == 255);
}

/* Does it answer what a pod of ours began? */
static __always_inline bool fw_is_reply(struct xdp_md *ctx, const struct frame *f)
{
	struct tuple t = f->ends;
	struct nat *translation = bpf_map_lookup_elem(&nat, &t);
	struct ct_key key = {};
	struct ct *ct;

	if (translation)
		t = translation->to;
	bool high = ct_key_of(&key, &t);

	ct = bpf_map_lookup_elem(&connections, &key);
	if (!ct)
		ct = bpf_map_lookup_elem(&half_open, &key);
	return ct && high != !!(ct->flags & CT_ORIGIN_HI) && !is_later(now_seconds(), ct->seen, ct_timeout(ct, t.proto));
}

/* Is it for a connection of a process of this node? Who only listens does not count. */
static __always_inline bool fw_has_socket(struct xdp_md *ctx, const struct frame *f)
{
	struct bpf_sock_tuple t = {};
	const __be32 *s = (const __be32 *)&f->ends.saddr, *d = (const __be32 *)&f->ends.daddr;
	struct bpf_sock *sk;
	__u32 size;
	bool known;

	if (f->family == 4) {
		t.ipv4.saddr = s[3];
		t.ipv4.daddr = d[3];
		t.ipv4.sport = f->ends.sport;
		t.ipv4.dport = f->ends.dport;
		size = sizeof(t.ipv4);
	} else {
		__builtin_memcpy(t.ipv6.saddr, s, 16);
		__builtin_memcpy(t.ipv6.daddr, d, 16);
		t.ipv6.sport = f->ends.sport;
		t.ipv6.dport = f->ends.dport;
		size = sizeof(t.ipv6);
	}
	if (f->ends.proto == IPPROTO_TCP) {
		sk = bpf_sk_lookup_tcp(ctx, &t, size, THIS_NETNS, 0);
		if (!sk)
			return false;
		known = sk->state != TCP_LISTEN;
	} else {
		sk = bpf_sk_lookup_udp(ctx, &t, size, THIS_NETNS, 0);
		if (!sk)
			return false;
		known = sk->dst_port != 0;
	}
	bpf_sk_release(sk);
	return known;
}

/* Is it of a pod or a process of this node? */
static __always_inline bool fw_is_ours(const struct frame *f)
{
	struct peer *peer = bpf_map_lookup_elem(&peers, &f->ends.saddr);
	__u32 kind = peer && f->epoch ? peer->view[f->epoch & 1].kind : PEER_NONE;

	return kind == PEER_LOCAL || kind == PEER_HOST;
}

static __noinline int fw_is_known(struct xdp_md *ctx, const struct frame *f)
{
	struct peer *peer;

	if (fw_is_harmless(ctx, f))
		return 1;
	peer = bpf_map_lookup_elem(&peers, &f->ends.saddr);
	if (peer && f->epoch) {
		__u32 kind = peer->view[f->epoch & 1].kind, ifindex = ctx->ingress_ifindex;
		__u32 *role = bpf_map_lookup_elem(&link_roles, &ifindex);

		if ((kind == PEER_REMOTE || kind == PEER_NODE) && role && *role == LINK_UNDERLAY)
			return 1;
	}
	/* It has no ports to be known by, and is nothing without its first. */
	if (f->fragment == FRAG_LATER)
		return 1;
	if (f->ends.proto == IPPROTO_TCP && (f->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return 0;	/* begins something */
	if (fw_is_reply(ctx, f))
		return 1;
	return (f->ends.proto == IPPROTO_TCP || f->ends.proto == IPPROTO_UDP) && fw_has_socket(ctx, f);
}

#endif
