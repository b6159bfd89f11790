/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * reply.h: turn the packet in hand into an answer to its sender: an ICMP
 * error that quotes it, or a TCP reset.
 */
#ifndef LOCKGATE_REPLY_H
#define LOCKGATE_REPLY_H

#include "event.h"
#include "limit.h"
#include "parse.h"

/* As much of the packet as fits (RFC 1812 4.3.2.3, RFC 4443 2.4 (c)): what the
 * sender needs to find its socket may lie behind options and extensions. */
#define ICMP4_MAX 576
#define ICMP6_MAX 1280

struct icmp4_reply {
	struct ipv4 ip;
	__u8 type, code;
	__be16 csum;
	__be32 info;
};

struct icmp6_reply {
	struct ipv6 ip;
	__u8 type, code;
	__be16 csum;
	__be32 info;
};

struct tcp_head {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window, csum, urgent;
};

struct rst4_reply {
	struct ipv4 ip;
	struct tcp_head tcp;
};

struct rst6_reply {
	struct ipv6 ip;
	struct tcp_head tcp;
};

/* RFC 1071: the one's complement of the folded sum. */
static __always_inline __be16 csum_fold(__s64 sum)
{
	__u32 s = sum;

	s = (s & 0xffff) + (s >> 16);
	s = (s & 0xffff) + (s >> 16);
	return ~s;
}

/* `sum` and the IPv6 pseudo header (RFC 8200 8.1); `ip` holds the addresses. */
static __always_inline __s64 pseudo6(const struct ipv6 *ip, __u32 length, __u8 proto, __s64 sum)
{
	__be32 tail[2] = { bpf_htonl(length), bpf_htonl(proto) };

	sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip->saddr, 32, sum);
	return bpf_csum_diff(NULL, 0, tail, 8, sum);
}

static __always_inline int turn_around(struct __sk_buff *skb)
{
	__u8 macs[12];

	if (bpf_skb_load_bytes(skb, 0, macs, 12))
		return -1;
	return bpf_skb_store_bytes(skb, 0, macs + 6, 6, 0) || bpf_skb_store_bytes(skb, 6, macs, 6, 0);
}

/* The frame becomes Ethernet + `length` bytes of p->bytes, back to its sender. */
static __always_inline int send_back(struct __sk_buff *skb, struct packet *p, const __u32 length)
{
	if (bpf_skb_change_tail(skb, ETH_HLEN + length, 0) || turn_around(skb))
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, p->bytes, length, 0);
}

/* How much of the packet is quoted. Padding of the frame is none of it. */
static __always_inline __u32 quotable(struct __sk_buff *skb, struct packet *p, __u32 most)
{
	__u32 length = skb->len - ETH_HLEN;

	if (p->length < length)
		length = p->length;
	return length < most ? length : most;
}

struct quote_sum {
	struct __sk_buff *skb;
	struct packet *p;
	__u32 length;
	__s64 sum;
};

#define SUMMED sizeof(((struct packet *)0)->bytes)

/* One piece of the quote; 1 ends the loop. */
static long sum_piece(__u32 index, void *data)
{
	struct quote_sum *q = data;
	struct packet *p = q->p;
	__u32 at = index * SUMMED, length = SUMMED;

	if (at >= q->length)
		return 1;
	if (q->length - at < SUMMED) {
		length = q->length - at;
		__builtin_memset(p->bytes, 0, SUMMED);
	}
	if (!length || length > SUMMED || bpf_skb_load_bytes(q->skb, ETH_HLEN + at, p->bytes, length))
		return 1;
	q->sum = bpf_csum_diff(NULL, 0, (__be32 *)p->bytes, SUMMED, q->sum);
	return 0;
}

/* The frame becomes Ethernet, `headers` bytes to be filled in and the first
 * `length` bytes of the packet, whose checksum comes back; < 0 on failure. */
static __noinline __s64 quote(struct __sk_buff *skb, struct packet *p, __u32 headers, __u32 length)
{
	struct quote_sum q = { .skb = skb, .p = p, .length = length };

	if (bpf_skb_change_tail(skb, ETH_HLEN + length, 0))
		return -1;
	bpf_loop((ICMP6_MAX + SUMMED - 1) / SUMMED, sum_piece, &q, 0);
	if (bpf_skb_adjust_room(skb, headers, BPF_ADJ_ROOM_MAC, 0) || turn_around(skb))
		return -1;
	return q.sum & 0xffffffff;
}

static __always_inline void ipv4_reply(struct ipv4 *ip, __u32 length, __u8 proto, __be32 from, __be32 to)
{
	ip->version_ihl = 0x45;
	ip->tos = 0;
	ip->length = bpf_htons(length);
	ip->id = 0;
	ip->frag = bpf_htons(IPV4_DF);
	ip->ttl = 64;
	ip->proto = proto;
	ip->csum = 0;
	ip->saddr = from;
	ip->daddr = to;
	ip->csum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0));
}

static __always_inline void ipv6_reply(struct ipv6 *ip, __u32 payload, __u8 proto, const struct addr *from,
				       const struct addr *to)
{
	ip->version_class_flow = bpf_htonl(6 << 28);
	ip->length = bpf_htons(payload);
	ip->next = proto;
	ip->ttl = 64;
	ip->saddr = *from;
	ip->daddr = *to;
}

/* RFC 1812 4.3.2.8, RFC 4443 2.4 (f): a pod hears so many in a second, and the
 * others have theirs. */
static __always_inline bool may_answer(struct packet *p)
{
	struct budget *budget = budget_of(p);

	if (p->dry || !budget || take(&budget->answers, now_ns(), config_answer_ns))
		return true;
	count(COUNT_UNANSWERED);
	return false;
}

/* An ICMP error about the packet in hand, from the address it was sent to.
 * `info` is the second word: the MTU, or 0. Never about an ICMP error or a later
 * fragment (RFC 1122 3.2.2). 0 on success. Global, so that the verifier walks it
 * once and not at every call. */
__noinline int icmp_error(struct __sk_buff *skb, struct packet *p, __u32 type_code, __u32 info)
{
	if (!p || p->fragment == FRAG_LATER)
		return -1;
	struct tuple *t = &p->wire;

	/* p->icmp_error is clear when the error is related to nothing. */
	if (t->proto == (p->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) && is_icmp_error(p->family, p->icmp_type))
		return -1;
	if (!may_answer(p))
		return -1;
	if (p->family == 4) {
		struct icmp4_reply *r = (void *)p->bytes;
		__u32 length = quotable(skb, p, ICMP4_MAX - sizeof(*r));
		__s64 sum = quote(skb, p, sizeof(*r), length);

		if (sum < 0)
			return -1;
		r->type = type_code >> 8;
		r->code = type_code;
		r->csum = 0;
		r->info = bpf_htonl(info);
		r->csum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->type, 8, sum));
		ipv4_reply(&r->ip, sizeof(*r) + length, IPPROTO_ICMP, *(__be32 *)&t->daddr.b[12],
			   *(__be32 *)&t->saddr.b[12]);
		return bpf_skb_store_bytes(skb, ETH_HLEN, r, sizeof(*r), 0);
	}
	struct icmp6_reply *r = (void *)p->bytes;
	__u32 length = quotable(skb, p, ICMP6_MAX - sizeof(*r));
	__s64 sum = quote(skb, p, sizeof(*r), length);

	if (sum < 0)
		return -1;
	ipv6_reply(&r->ip, 8 + length, IPPROTO_ICMPV6, &t->daddr, &t->saddr);
	r->type = type_code >> 8;
	r->code = type_code;
	r->csum = 0;
	r->info = bpf_htonl(info);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&r->type, 8, sum);
	r->csum = csum_fold(pseudo6(&r->ip, 8 + length, IPPROTO_ICMPV6, sum));
	return bpf_skb_store_bytes(skb, ETH_HLEN, r, sizeof(*r), 0);
}

/* RST, ACK to a SYN (RFC 9293 3.5.2); a plain RST to what carries an ACK. */
static __noinline int tcp_reset(struct __sk_buff *skb, struct packet *p)
{
	struct tuple *t = &p->wire;
	struct tcp_head in, *tcp;

	if (p->fragment == FRAG_LATER || p->tcp_flags & TCP_RST || bpf_skb_load_bytes(skb, p->l4, &in, sizeof(in)))
		return -1;
	if (!may_answer(p))
		return -1;
	tcp = p->family == 4 ? &((struct rst4_reply *)p->bytes)->tcp : &((struct rst6_reply *)p->bytes)->tcp;
	tcp->sport = in.dport;
	tcp->dport = in.sport;
	tcp->offset = sizeof(*tcp) / 4 << 4;
	tcp->window = tcp->csum = tcp->urgent = 0;
	if (in.flags & TCP_ACK) {
		tcp->flags = TCP_RST;
		tcp->seq = in.ack;
		tcp->ack = 0;
	} else {
		tcp->flags = TCP_RST | TCP_ACK;
		tcp->seq = 0;
		tcp->ack = bpf_htonl(bpf_ntohl(in.seq) + !!(in.flags & TCP_SYN));
	}
	if (p->family == 4) {
		struct rst4_reply *r = (void *)p->bytes;
		__be32 from = *(__be32 *)&t->daddr.b[12], to = *(__be32 *)&t->saddr.b[12];
		__be32 pseudo[3] = { from, to, bpf_htonl(IPPROTO_TCP << 16 | sizeof(r->tcp)) };

		ipv4_reply(&r->ip, sizeof(*r), IPPROTO_TCP, from, to);
		tcp->csum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->tcp, sizeof(r->tcp),
						    bpf_csum_diff(NULL, 0, pseudo, 12, 0)));
		return send_back(skb, p, sizeof(*r));
	}
	struct rst6_reply *r = (void *)p->bytes;

	ipv6_reply(&r->ip, sizeof(r->tcp), IPPROTO_TCP, &t->daddr, &t->saddr);
	tcp->csum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->tcp, sizeof(r->tcp),
					    pseudo6(&r->ip, sizeof(r->tcp), IPPROTO_TCP, 0)));
	return send_back(skb, p, sizeof(*r));
}

/* What a refused connection hears: as kube-proxy's REJECT, a reset for TCP,
 * port unreachable for the rest. */
static __always_inline int refuse(struct __sk_buff *skb, struct packet *p)
{
	if (p->wire.proto == IPPROTO_TCP)
		return tcp_reset(skb, p);
	return icmp_error(skb, p, p->family == 4 ? ICMP_UNREACH << 8 | 3 : ICMP6_UNREACH << 8 | 4, 0);
}

#endif
