/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * parse.h: bytes → struct packet. Every length is checked; nothing that
 * arrives can make a program read beyond it.
 */
#ifndef LOCKGATE_PARSE_H
#define LOCKGATE_PARSE_H

#include "fragment.h"
#include "headers.h"

/* Walk IPv6 extension headers from offset `at`. Returns the upper protocol,
 * or -1 for a chain we do not follow; *at moves to its header. Fragment
 * headers fill frag_id and fragment. */
static __noinline int skip_extensions(struct __sk_buff *skb, struct packet *p, __u32 next, __u32 at)
{
	struct { __u8 next, len; __be16 frag; __be32 id; } ext;
	bool fragmented = false;

	for (int i = 0; i < 8; i++) {
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			p->l4 = at;
			return next;
		}
		if (bpf_skb_load_bytes(skb, at, &ext, sizeof(ext)))
			return -1;
		if (next == IPPROTO_FRAGMENT) {
			__u16 frag = bpf_ntohs(ext.frag);

			/* A second one would make this a piece of another packet
			 * than the one that the receiver puts together. */
			if (fragmented)
				return -1;
			fragmented = true;
			p->frag_id = ext.id;
			if (frag & 0xfff8)
				p->fragment = FRAG_LATER;
			else if (frag & 1)
				p->fragment = FRAG_FIRST;
			at += 8;
			if (p->fragment == FRAG_LATER) {
				p->l4 = at;
				return ext.next;
			}
		} else if (next == IPPROTO_ROUTING && ext.frag & bpf_htons(0xff)) {
			return -1;	/* segments left: would travel on from where it was judged for */
		} else if (next == IPPROTO_AH) {
			at += (ext.len + 2) * 4;
		} else {
			at += (ext.len + 1) * 8;
		}
		if (at > 1024)
			return -1;
		next = ext.next;
	}
	return -1;
}

/* Copy a header of constant size into p->bytes: from the linear part when it
 * lies there, as it mostly does. 0 on success. */
static __always_inline int load_header(struct __sk_buff *skb, __u32 at, void *to, const __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	at &= 0x7ff;	/* parsed offsets stay below; the verifier wants it said */
	if (data + at + size <= end) {
		/* By words: every machine this runs on loads unaligned ones as well. */
		__builtin_memcpy(to, __builtin_assume_aligned(data + at, 4), size);
		return 0;
	}
	return bpf_skb_load_bytes(skb, at, to, size);
}

/* Copy a header of the upper layer. By the IP header's count it must be all
 * there: what lies beyond is padding of the frame, which the receiver cuts off. */
static __always_inline int load_l4(struct __sk_buff *skb, struct packet *p, void *to, const __u32 size)
{
	if (!skb->gso_size && p->l4 + size > p->l3 + p->length)
		return -1;
	return load_header(skb, p->l4, to, size);
}

/* What the first chunk of an SCTP packet is to its association, as TCP flags. INIT and
 * SHUTDOWN COMPLETE stand alone; what else ends one may stand behind another chunk (RFC
 * 9260 6.10): then the entry stays until it is unused for long enough. */
static __noinline int sctp_flags(struct __sk_buff *skb, struct packet *p)
{
	struct sctp_head head;

	if (load_l4(skb, p, &head, sizeof(head)))
		return 0;
	switch (head.chunk) {
	case SCTP_INIT:
		return TCP_SYN;
	case SCTP_INIT_ACK:
		return TCP_SYN | TCP_ACK;
	case SCTP_ABORT:
		return TCP_RST;
	case SCTP_SHUTDOWN:
	case SCTP_SHUTDOWN_ACK:		/* of the other side, when it has said all */
	case SCTP_SHUTDOWN_COMPLETE:
		return TCP_FIN;
	}
	return 0;
}

/* Ports, flags and ICMP identity at p->l4, into the tuple with the protocol. */
static __always_inline int parse_l4(struct __sk_buff *skb, struct packet *p, __u8 proto)
{
	__be16 sport = 0, dport = 0;

	if (proto == IPPROTO_TCP) {
		struct l4_head tcp;

		if (load_l4(skb, p, &tcp, sizeof(tcp)) || tcp.more[8] < 0x50)	/* data offset below 5 words */
			goto malformed;
		sport = tcp.sport;
		dport = tcp.dport;
		p->tcp_flags = tcp.more[9];
	} else if (proto == IPPROTO_UDP || proto == IPPROTO_SCTP) {
		struct icmp_head head;	/* eight bytes, ports first */

		if (load_l4(skb, p, &head, sizeof(head)))
			goto malformed;
		sport = ((struct l4_head *)&head)->sport;
		dport = ((struct l4_head *)&head)->dport;
		if (proto == IPPROTO_SCTP)
			p->tcp_flags = sctp_flags(skb, p);
	} else if (proto == (p->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6)) {
		struct icmp_head icmp;

		if (load_l4(skb, p, &icmp, sizeof(icmp)))
			goto malformed;
		p->icmp_type = icmp.type;
		p->icmp_code = icmp.code;
		if (icmp.type == (p->family == 4 ? ICMP_ECHO : ICMP6_ECHO))
			sport = icmp.id;
		else if (icmp.type == (p->family == 4 ? ICMP_ECHO_REPLY : ICMP6_REPLY))
			dport = icmp.id;
		else if (is_icmp_error(p->family, icmp.type))
			p->icmp_error = 1;
	}
	set_ends(&p->wire, sport, dport, proto);
	return 0;
malformed:
	set_ends(&p->wire, 0, 0, proto);
	return GIVE_UP(p, CAUSE_MALFORMED);
}

/* The packet that an ICMP error speaks of, as its sender saw it. An inner
 * fragment that is not the first, or with extension headers, stays
 * unrelated. */
static __noinline int parse_inner(struct __sk_buff *skb, struct packet *p)
{
	struct tuple *t = &p->inner;
	__u32 at = p->l4 + 8;

	p->icmp_error = 0;
	p->inner_l3 = at;
	t->pad[0] = t->pad[1] = t->pad[2] = 0;
	if (p->family == 4) {
		struct ipv4 *ip = (void *)p->bytes;

		if (bpf_skb_load_bytes(skb, at, ip, sizeof(*ip)))
			return GIVE_UP(p, CAUSE_MALFORMED);
		if (ip->version_ihl >> 4 != 4 || (ip->version_ihl & 15) < 5)
			return GIVE_UP(p, CAUSE_MALFORMED);
		if (bpf_ntohs(ip->frag) & IPV4_OFF)
			return 0;
		map_v4(&t->saddr, ip->saddr);
		map_v4(&t->daddr, ip->daddr);
		t->proto = ip->proto;
		at += (ip->version_ihl & 15) * 4;
	} else {
		struct ipv6 *ip = (void *)p->bytes;

		if (bpf_skb_load_bytes(skb, at, ip, sizeof(*ip)))
			return GIVE_UP(p, CAUSE_MALFORMED);
		if (p->bytes[0] >> 4 != 6)
			return GIVE_UP(p, CAUSE_MALFORMED);
		t->saddr = ip->saddr;
		t->daddr = ip->daddr;
		t->proto = ip->next;
		at += sizeof(*ip);
	}
	p->inner_l4 = at;
	t->sport = t->dport = 0;
	if (bpf_skb_load_bytes(skb, at, p->bytes, 8))
		return 0;	/* quoted too little: nothing to relate it to */
	if (has_ports(t->proto)) {
		t->sport = ((struct l4_head *)p->bytes)->sport;
		t->dport = ((struct l4_head *)p->bytes)->dport;
	} else if (t->proto == IPPROTO_ICMP || t->proto == IPPROTO_ICMPV6) {
		struct icmp_head *icmp = (void *)p->bytes;

		if (icmp->type == (p->family == 4 ? ICMP_ECHO : ICMP6_ECHO))
			t->sport = icmp->id;
		else if (icmp->type == (p->family == 4 ? ICMP_ECHO_REPLY : ICMP6_REPLY))
			t->dport = icmp->id;
		else
			return 0;
	}
	p->icmp_error = 1;
	return 0;
}

/* Returns the protocol, or -1 with the cause set. */
static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *p, __u32 l3)
{
	struct tuple *t = &p->wire;
	struct ipv4 ip;

	if (load_header(skb, l3, &ip, sizeof(ip)))
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	__u32 header = (ip.version_ihl & 15) * 4;
	__u32 frag = bpf_ntohs(ip.frag);

	p->length = bpf_ntohs(ip.length);
	if (!p->length && skb->gso_size)	/* BIG TCP */
		p->length = skb->len - l3;
	if (ip.version_ihl >> 4 != 4 || header < 20 || p->length < header)
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	/* A GSO packet's total length may be of one segment or all. */
	if (!skb->gso_size && p->length + l3 > skb->len)
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	map_v4(&t->saddr, ip.saddr);
	map_v4(&t->daddr, ip.daddr);
	p->ttl = ip.ttl;
	p->l4 = l3 + header;
	if (frag & (IPV4_MF | IPV4_OFF)) {
		p->fragment = frag & IPV4_OFF ? FRAG_LATER : FRAG_FIRST;
		p->frag_id = ip.id;
	}
	return ip.proto;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *p, __u32 l3)
{
	struct tuple *t = &p->wire;
	struct ipv6 ip;

	if (load_header(skb, l3, &ip, sizeof(ip)))
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	if (*(__u8 *)&ip >> 4 != 6)
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	p->length = bpf_ntohs(ip.length) + sizeof(ip);
	if (!skb->gso_size && p->length + l3 > skb->len)
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	copy_addr(&t->saddr, &ip.saddr);
	copy_addr(&t->daddr, &ip.daddr);
	/* In our tables these are IPv4; on the wire they are nobody's (RFC 4942 2.2). */
	if (is_v4(&t->saddr) || is_v4(&t->daddr))
		return GIVE_UP(p, CAUSE_MALFORMED), -1;
	p->ttl = ip.ttl;
	p->l4 = l3 + sizeof(ip);
	if (ip.next == IPPROTO_TCP || ip.next == IPPROTO_UDP || ip.next == IPPROTO_ICMPV6)
		return ip.next;
	int proto = skip_extensions(skb, p, ip.next, p->l4);

	if (proto < 0)
		GIVE_UP(p, CAUSE_EXTENSION_HEADER);
	return proto;
}

/* What is not, or cannot be, read must not show in the record of the drop as what
 * the last packet had. */
static __always_inline void parse_nothing(struct __sk_buff *skb, struct packet *p)
{
	for (__u32 i = 0; i < sizeof(p->wire) / 8; i++)
		((__u64 *)&p->wire)[i] = 0;
	p->length = skb->len - ETH_HLEN;
}

static __always_inline bool is_ip(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6);
}

/* The IP packet at `l3`, of p->family. 0, or a cause: the packet is to be dropped. */
static __always_inline int parse_at(struct __sk_buff *skb, struct packet *p, __u32 l3)
{
	int cause = 0, proto;

	p->l3 = l3;
	parse_nothing(skb, p);
	proto = p->family == 4 ? parse_ipv4(skb, p, l3) : parse_ipv6(skb, p, l3);
	if (proto < 0) {
		cause = p->cause;
	} else if (p->fragment != FRAG_LATER) {
		cause = parse_l4(skb, p, proto);
	} else {
		set_ends(&p->wire, 0, 0, proto);
	}
	if (!cause && p->fragment == FRAG_LATER)
		cause = take_ports(p);
	if (!cause && p->icmp_error)
		cause = parse_inner(skb, p);
	p->now = p->wire;
	return cause;
}

/* The packet in the frame. */
static __noinline int parse(struct __sk_buff *skb, struct packet *p)
{
	p->family = skb->protocol == bpf_htons(ETH_P_IP) ? 4 : 6;
	return parse_at(skb, p, ETH_HLEN);
}

/* The packet in the packet, of the same family. Global, so that the verifier walks it once. */
__noinline int parse_inside(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return CAUSE_MALFORMED;
	return parse_at(skb, p, p->family == 4 ? ETH_HLEN + sizeof(struct ipv4) : ETH_HLEN + sizeof(struct ipv6));
}

#endif
