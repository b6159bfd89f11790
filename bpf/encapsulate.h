/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * encapsulate.h: an outer header before a packet to a frontend, and off again (DSR,
 * docs/services.md). XDP makes the same (dsr.h).
 *
 * The receiver finds the backend's port in its own tables: the address is one of the
 * owners of the flow's slot. Where it was chosen for another reason (affinity, a
 * flow of before), the port goes along, as IPv4's identification or in IPv6's label: both mean
 * nothing else here, and it is only believed if the tables have such a backend.
 */
#ifndef LOCKGATE_ENCAPSULATE_H
#define LOCKGATE_ENCAPSULATE_H

#include "event.h"
#include "outer.h"
#include "parse.h"

#define OUTER_TTL_STEP 16	/* each node that sends it on takes so much */

/* Does a frame of it fit? GSO packets are cut into segments later. `head` is
 * the length of the IP header with its options. */
static __always_inline bool fits(struct __sk_buff *skb, __u32 head, __u32 mtu)
{
	__u32 length = skb->len - ETH_HLEN;

	if (skb->gso_size)
		length = head + 60 + skb->gso_size;	/* at most: TCP header with options */
	if (length <= mtu)
		return true;
	return skb->gso_size && head + 20 + skb->gso_size <= mtu;
}

static __always_inline int decrement_ttl(struct __sk_buff *skb, struct packet *p)
{
	__u8 ttl = p->ttl - 1;

	if (p->family == 6)
		return bpf_skb_store_bytes(skb, p->l3 + 7, &ttl, 1, 0);
	/* TTL is the high byte of its checksum word. */
	if (bpf_l3_csum_replace(skb, p->l3 + 10, bpf_htons(p->ttl << 8), bpf_htons(ttl << 8), 2))
		return -1;
	return bpf_skb_store_bytes(skb, p->l3 + 8, &ttl, 1, 0);
}

/* Can the kernel cut the data into smaller segments than it came in? Not datagrams. */
static __always_inline bool may_shrink(struct __sk_buff *skb, struct packet *p)
{
	return skb->gso_size && p->wire.proto == IPPROTO_TCP;
}

static __always_inline __u32 outer_size(const struct packet *p)
{
	return p->family == 4 ? sizeof(struct ipv4) : sizeof(struct ipv6);
}

/* Is it one of ours, by its outer header: to a pod or an address of this node, from the
 * links to other nodes? Anything else of these protocols is a packet like any other. */
static __always_inline bool is_encapsulated(struct packet *p)
{
	if (p->wire.proto != (p->family == 4 ? IPPROTO_IPIP : IPPROTO_IPV6) || p->role == LINK_OUTSIDE || !p->role)
		return false;
	if (p->family == 4)
		return p->wire.saddr.b[12] == config_outer4[0] && p->wire.saddr.b[13] == config_outer4[1];
	for (int i = 0; i < 12; i++) {
		if (p->wire.saddr.b[i] != config_outer6[i])
			return false;
	}
	return true;
}

/* Learn what the outer header says, and parse the packet inside: from here on that is the
 * packet in hand. 0, or a cause. */
__noinline int look_inside(struct __sk_buff *skb, struct packet *p)
{
	__be32 word;

	if (!p)
		return CAUSE_MALFORMED;
	/* A larger TTL than a node gives would lead it over more nodes than a chain has. */
	if (p->fragment || p->l4 - p->l3 != outer_size(p) || p->ttl > OUTER_TTL ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + (p->family == 4 ? 4 : 0), &word, sizeof(word)))
		return GIVE_UP(p, CAUSE_MALFORMED);
	p->hint = p->family == 4 ? (__be16)word : bpf_htons(bpf_ntohl(word));
	p->outer = p->wire.daddr;
	p->outer_ttl = p->ttl;
	p->outer_size = outer_size(p);
	return parse_inside(skb, p);
}

/* Take the outer header off. A mark of congestion on it goes on with the packet (RFC 6040).
 * False with a cause when that fails. */
__noinline int decapsulate(struct __sk_buff *skb, struct packet *p)
{
	__be16 first;

	if (!p)
		return 0;
	__u32 size = outer_size(p);

	if (p->dry) {
		p->outer_size = 0;
		return 1;
	}
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &first, sizeof(first)) ||
	    bpf_skb_adjust_room(skb, -(__s32)size, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO)) {
		GIVE_UP(p, CAUSE_NAT_FAILED);
		return 0;
	}
	if ((p->family == 4 ? bpf_ntohs(first) : bpf_ntohs(first) >> 4 & 3) % 4 == 3)
		bpf_skb_ecn_set_ce(skb);
	p->l3 -= size;
	p->l4 -= size;
	p->inner_l3 -= size;
	p->inner_l4 -= size;
	p->outer_size = 0;
	return 1;
}

/* The outer header of the packet in hand, to p->owner, in p->bytes. `first` is the first
 * word of the header inside, `length` that of the packet. */
static __always_inline void outer_header(struct packet *p, __be32 first, __u32 length, __u8 ttl)
{
	if (p->family == 4) {
		struct ipv4 *ip = (void *)p->bytes;

		/* What is longer is cut into segments, each with its own length. */
		if (length > 65535 - sizeof(*ip))
			length = 65535 - sizeof(*ip);
		outer_ipv4(ip, &p->owner.addr, p->hash, bpf_ntohl(first) >> 16, length, ttl, p->hint);
		return;
	}
	struct ipv6 *ip = (void *)p->bytes;

	outer_ipv6(ip, &p->owner.addr, p->hash, first, length > 65535 ? 65535 : length, ttl, p->hint);
}

/* Put an outer header to p->owner before the packet, which leaves by the hop of p->target.
 * False with a cause when that fails. */
__noinline int encapsulate(struct __sk_buff *skb, struct packet *p)
{
	__u64 flags;
	__be32 first;

	if (!p)
		return 0;
	__u32 size = outer_size(p);
	struct hop_view *hop = hop_of(p->epoch, target_index(p->target));

	GIVE_UP(p, CAUSE_NAT_FAILED);
	flags = p->family == 4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
	if (!hop || bpf_skb_load_bytes(skb, ETH_HLEN, &first, sizeof(first)))
		return 0;
	if (!may_shrink(skb, p) || !hop->mtu || fits(skb, p->l4 - p->l3, hop->mtu - size))
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	outer_header(p, first, skb->gso_size ? skb->len - ETH_HLEN : p->length, OUTER_TTL);
	if (bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_MAC, flags))
		return 0;
	if (p->family == 4 ? bpf_skb_store_bytes(skb, ETH_HLEN, p->bytes, sizeof(struct ipv4), 0)
			   : bpf_skb_store_bytes(skb, ETH_HLEN, p->bytes, sizeof(struct ipv6), 0))
		return 0;
	p->cause = CAUSE_NONE;
	return 1;
}

/* Make what came encapsulated out to p->owner instead, one step nearer to its end. */
__noinline int encapsulate_again(struct __sk_buff *skb, struct packet *p)
{
	__be32 first;

	if (!p)
		return 0;
	GIVE_UP(p, CAUSE_NAT_FAILED);
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &first, sizeof(first)))
		return 0;
	p->hint = 0;
	outer_header(p, first, skb->gso_size ? skb->len - p->l3 : p->length, p->outer_ttl - OUTER_TTL_STEP);
	if (p->family == 4 ? bpf_skb_store_bytes(skb, ETH_HLEN, p->bytes, sizeof(struct ipv4), 0)
			   : bpf_skb_store_bytes(skb, ETH_HLEN, p->bytes, sizeof(struct ipv6), 0))
		return 0;
	p->cause = CAUSE_NONE;
	return 1;
}

#endif
