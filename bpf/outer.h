/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * outer.h: the header that goes before a packet for a backend elsewhere (DSR): IPv4
 * in IPv4 (RFC 2003), IPv6 in IPv6 (RFC 2473). To the backend's own address, from one
 * that is nobody's, with the flow's hash in its low bits.
 */
#ifndef LOCKGATE_OUTER_H
#define LOCKGATE_OUTER_H

#include "headers.h"

#define OUTER_TTL 64

/* `tos` is the inner header's, congestion marks included (RFC 6040); `length` is the inner
 * packet's. `hint`: the backend's port, where its own node may not find it (encapsulate.h), or 0. */
static __always_inline void outer_ipv4(struct ipv4 *ip, const struct addr *to, __u32 hash, __u8 tos, __u16 length,
				       __u8 ttl, __be16 hint)
{
	__u32 from = *(const volatile __u32 *)config_outer4 | bpf_htonl(hash & 0xffff);
	__u32 backend = ((const __u32 *)to)[3], sum;

	ip->version_ihl = 0x45;
	ip->tos = tos;
	ip->length = bpf_htons(length + sizeof(*ip));
	ip->id = hint;	/* with "don't fragment" it says nothing else (RFC 6864) */
	ip->frag = bpf_htons(IPV4_DF);
	ip->ttl = ttl;
	ip->proto = IPPROTO_IPIP;
	ip->saddr = from;
	ip->daddr = backend;
	sum = bpf_htons(0x4500 | tos) + hint + ip->length + bpf_htons(IPV4_DF) + bpf_htons(ttl << 8 | IPPROTO_IPIP);
	sum += (from & 0xffff) + (from >> 16) + (backend & 0xffff) + (backend >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->csum = ~sum;
}

/* `first` is the inner header's first word. */
static __always_inline void outer_ipv6(struct ipv6 *ip, const struct addr *to, __u32 hash, __be32 first, __u16 length,
				       __u8 ttl, __be16 hint)
{
	/* The label, too, spreads flows (RFC 6438). */
	__u32 label = hint ? bpf_ntohs(hint) : hash & 0xfffff;

	ip->version_class_flow = (first & bpf_htonl(0xfff00000)) | bpf_htonl(label);
	ip->length = bpf_htons(length);
	ip->next = IPPROTO_IPV6;
	ip->ttl = ttl;
	for (int i = 0; i < 3; i++)
		((__u32 *)&ip->saddr)[i] = ((const volatile __u32 *)config_outer6)[i];
	((__u32 *)&ip->saddr)[3] = bpf_htonl(hash);
	__builtin_memcpy(&ip->daddr, to, sizeof(*to));
}

#endif
