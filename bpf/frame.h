/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * frame.h: a frame as XDP has it → struct frame. Plain packets are read where
 * they lie, at fixed offsets; the rest by a call, with every length checked.
 */
#ifndef LOCKGATE_FRAME_H
#define LOCKGATE_FRAME_H

#include "packet.h"

enum frame_kind {
	FRAME_PLAIN  = 0,	/* TCP or UDP, whole, behind an IP header and nothing else, in one piece of memory */
	FRAME_OTHER  = 1,	/* other IP: options, extension headers, a fragment, another protocol */
	FRAME_NOT_IP = 2,	/* ARP, a VLAN: another network, for an interface above */
	FRAME_BAD    = 3,	/* see `cause` */
};

struct frame {
	/* As on the wire. A later fragment has no ports, as have protocols without: 0. All zero
	 * where there are no addresses, or they cannot be read. */
	struct tuple ends;
	__u32 epoch;		/* 0: nothing is published */
	__u32 length;		/* of the packet, from the IP header on; what follows is padding */
	__u32 size;		/* FRAME_PLAIN: of the frame */
	__u16 l4;		/* offset in the frame: of the protocol's header, if that is no later fragment's */
	__u8 family;		/* 4 or 6; 0: no IP */
	__u8 ttl;
	__u8 fragment;		/* enum fragment */
	__u8 tcp_flags;		/* TCP, and no later fragment */
	__u8 kind;		/* enum frame_kind */
	__u8 cause;		/* FRAME_BAD: enum cause */
};

struct ethernet {
	__u8 dmac[6], smac[6];
	__be16 proto;
};

static __always_inline int frame_bad(struct frame *f, enum cause why)
{
	f->kind = FRAME_BAD;
	f->cause = why;
	return 0;
}

/* Is a header of `size` bytes at f->l4 all there, by the count of the IP header? */
static __always_inline bool frame_has(const struct frame *f, __u32 size)
{
	return f->l4 + size <= ETH_HLEN + f->length;
}

/* Walk extension headers from f->l4 on, as skip_extensions() does. The protocol behind them, or
 * -1 with f->kind set. */
static __noinline int frame_extensions(struct xdp_md *ctx, struct frame *f, __u32 next)
{
	struct { __u8 next, len; __be16 frag; __be32 id; } ext;
	__u32 at = f->l4;
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
			f->l4 = at;
			return frame_has(f, 0) ? (int)next : (frame_bad(f, CAUSE_MALFORMED), -1);
		}
		if (at + sizeof(ext) > ETH_HLEN + f->length || bpf_xdp_load_bytes(ctx, at, &ext, sizeof(ext)))
			return frame_bad(f, CAUSE_MALFORMED), -1;
		if (next == IPPROTO_FRAGMENT) {
			if (fragmented)
				return frame_bad(f, CAUSE_EXTENSION_HEADER), -1;
			fragmented = true;
			at += 8;
			if (ext.frag & bpf_htons(0xfff8)) {
				f->fragment = FRAG_LATER;
				f->l4 = at;
				return ext.next;
			}
			if (ext.frag & bpf_htons(1))
				f->fragment = FRAG_FIRST;
		} else if (next == IPPROTO_ROUTING && ext.frag & bpf_htons(0xff)) {
			return frame_bad(f, CAUSE_EXTENSION_HEADER), -1;
		} else if (next == IPPROTO_AH) {
			at += (ext.len + 2) * 4;
		} else {
			at += (ext.len + 1) * 8;
		}
		if (at > 1024)
			return frame_bad(f, CAUSE_EXTENSION_HEADER), -1;
		next = ext.next;
	}
	return frame_bad(f, CAUSE_EXTENSION_HEADER), -1;
}

/* The protocol, or -1 with f->kind set. `size` is the frame's. */
static __always_inline int frame_ipv4(struct xdp_md *ctx, struct frame *f, __u32 size)
{
	struct ipv4 ip;

	if (bpf_xdp_load_bytes(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return frame_bad(f, CAUSE_MALFORMED), -1;
	__u32 header = (ip.version_ihl & 15) * 4;

	f->length = bpf_ntohs(ip.length);
	f->ttl = ip.ttl;
	f->l4 = ETH_HLEN + header;
	map_v4(&f->ends.saddr, ip.saddr);
	map_v4(&f->ends.daddr, ip.daddr);
	set_ends(&f->ends, 0, 0, ip.proto);
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || f->length < header || f->length + ETH_HLEN > size)
		return frame_bad(f, CAUSE_MALFORMED), -1;
	if (ip.frag & bpf_htons(IPV4_OFF))
		f->fragment = FRAG_LATER;
	else if (ip.frag & bpf_htons(IPV4_MF))
		f->fragment = FRAG_FIRST;
	return ip.proto;
}

static __always_inline int frame_ipv6(struct xdp_md *ctx, struct frame *f, __u32 size)
{
	struct ipv6 ip;

	if (bpf_xdp_load_bytes(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return frame_bad(f, CAUSE_MALFORMED), -1;
	f->length = bpf_ntohs(ip.length) + sizeof(ip);
	f->ttl = ip.ttl;
	copy_addr(&f->ends.saddr, &ip.saddr);
	copy_addr(&f->ends.daddr, &ip.daddr);
	set_ends(&f->ends, 0, 0, ip.next);
	/* What looks like IPv4 in our tables is nobody's on the wire: see parse_ipv6(). */
	if (*(__u8 *)&ip >> 4 != 6 || f->length + ETH_HLEN > size || is_v4(&f->ends.saddr) || is_v4(&f->ends.daddr))
		return frame_bad(f, CAUSE_MALFORMED), -1;
	f->l4 = ETH_HLEN + sizeof(ip);
	return frame_extensions(ctx, f, ip.next);
}

/* IP that is not plain, or not even right. */
static __noinline int frame_other(struct xdp_md *ctx, struct frame *f)
{
	__u32 size = bpf_xdp_get_buff_len(ctx);
	int proto = f->family == 4 ? frame_ipv4(ctx, f, size) : frame_ipv6(ctx, f, size);
	struct l4_head head = {};

	if (proto < 0)
		return 0;
	f->kind = FRAME_OTHER;
	set_ends(&f->ends, 0, 0, proto);
	if (f->fragment == FRAG_LATER || !has_ports(proto))
		return 0;
	/* Of all that have ports, the first eight bytes are one header's. */
	if (!frame_has(f, sizeof(struct icmp_head)) || bpf_xdp_load_bytes(ctx, f->l4, &head, sizeof(struct icmp_head)))
		return frame_bad(f, CAUSE_MALFORMED);
	set_ends(&f->ends, head.sport, head.dport, proto);
	if (proto != IPPROTO_TCP)
		return 0;
	if (!frame_has(f, sizeof(head)) || bpf_xdp_load_bytes(ctx, f->l4, &head, sizeof(head)) || head.more[8] < 0x50)
		return frame_bad(f, CAUSE_MALFORMED);
	f->tcp_flags = head.more[9];
	return 0;
}

/* Is it plain? Then all is in place; else `f` may hold anything but kind and family. */
static __always_inline bool frame_plain(void *data, void *end, struct frame *f)
{
	struct l4_head *head;
	__u32 headers;
	__u8 proto;

	if (f->family == 4) {
		struct ipv4 *ip = data + ETH_HLEN;

		headers = sizeof(*ip);
		if ((void *)(ip + 1) + sizeof(struct icmp_head) > end)
			return false;
		if (ip->version_ihl != 0x45 || ip->frag & bpf_htons(IPV4_MF | IPV4_OFF))
			return false;
		f->length = bpf_ntohs(ip->length);
		f->ttl = ip->ttl;
		proto = ip->proto;
		map_v4(&f->ends.saddr, ip->saddr);
		map_v4(&f->ends.daddr, ip->daddr);
	} else {
		struct ipv6 *ip = data + ETH_HLEN;

		headers = sizeof(*ip);
		if ((void *)(ip + 1) + sizeof(struct icmp_head) > end)
			return false;
		if (*(__u8 *)ip >> 4 != 6)
			return false;
		f->length = bpf_ntohs(ip->length) + sizeof(*ip);
		f->ttl = ip->ttl;
		proto = ip->next;
		copy_addr(&f->ends.saddr, &ip->saddr);
		copy_addr(&f->ends.daddr, &ip->daddr);
		if (is_v4(&f->ends.saddr) || is_v4(&f->ends.daddr))
			return false;
	}
	f->size = end - data;
	if (f->length + ETH_HLEN > f->size)
		return false;
	f->l4 = ETH_HLEN + headers;
	head = data + ETH_HLEN + headers;
	if (proto == IPPROTO_TCP) {
		if ((void *)(head + 1) > end || !frame_has(f, sizeof(*head)) || head->more[8] < 0x50)
			return false;
		f->tcp_flags = head->more[9];
	} else if (proto != IPPROTO_UDP || !frame_has(f, sizeof(struct icmp_head))) {
		return false;
	}
	set_ends(&f->ends, head->sport, head->dport, proto);
	return true;
}

/* `f` is zero. Each packet reads the epoch once, here. */
static __always_inline void frame_read(struct xdp_md *ctx, struct frame *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethernet *eth = data;

	f->epoch = node_epoch();
	if ((void *)(eth + 1) > end) {
		frame_bad(f, CAUSE_MALFORMED);
		return;
	}
	if (eth->proto == bpf_htons(ETH_P_IP)) {
		f->family = 4;
	} else if (eth->proto == bpf_htons(ETH_P_IPV6)) {
		f->family = 6;
	} else {
		f->kind = FRAME_NOT_IP;
		return;
	}
	if (!frame_plain(data, end, f))
		frame_other(ctx, f);
}

#endif
