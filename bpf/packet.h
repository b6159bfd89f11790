/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * packet.h: the packet in hand: what was parsed, what was judged, and where
 * it goes. One per CPU and kind of run, so that it costs no stack.
 */
#ifndef LOCKGATE_PACKET_H
#define LOCKGATE_PACKET_H

#include "headers.h"
#include "maps.h"

#define TCX_NEXT     -1		/* let the next program, then the stack, have it */
#define TCX_DROP     2

#define PACKET_HOST 0		/* skb->pkt_type: for this node */

#define AF_INET  2
#define AF_INET6 10

enum fragment {
	FRAG_NONE  = 0,
	FRAG_FIRST = 1,
	FRAG_LATER = 2,		/* has no ports of its own */
};

enum ct_table {			/* in the order in which they are asked */
	IN_CONNECTIONS = 0,
	IN_HALF_OPEN   = 1,
	IN_CROWD       = 2,
};

struct packet {
	struct tuple wire;	/* as it came */
	struct tuple now;	/* as it will leave: rewrite() makes it so */
	struct tuple inner;	/* ICMP error: the packet it speaks of */
	struct tuple tuple;	/* scratch for building keys */
	struct tuple asked;	/* the connection before it is translated; at a frontend: client to it */
	struct owner owner;	/* the backend that serves it */
	struct addr outer;	/* where the outer header leads, of what came encapsulated */
	struct ct_key key;
	struct ct fresh;	/* connection to be stored */
	struct nat translation;
	struct event event;
	__u8  bytes[128];	/* headers being read or built */

	struct addr met_addr;	/* asked of peers before the verdict, and the answer */
	struct peer_view met;

	__u32 epoch;
	__u32 now_s;		/* seconds, monotonic */
	__u32 slot;		/* of the pod at this hook, or NO_SLOT */
	__u32 place;		/* enum place */
	__u32 role;		/* enum link_role of the link, at from_net */
	__u32 length;		/* from the IP header on */
	__u32 frag_id;
	__u32 service;		/* id of the service asked, 0 = none */
	__u32 target;		/* where it goes: kind << 28 | slot or hop */
	__u32 cause;		/* enum cause of the drop, with its line */
	__u32 line;
	__u32 hash;		/* of p->asked */
	__be16 hint;		/* the backend's port: see encapsulate.h */

	__u16 l3, l4;		/* offsets in the frame */
	__u16 inner_l3, inner_l4;
	__u8  family;		/* 4 or 6 */
	__u8  ttl;
	__u8  fragment;		/* enum fragment */
	__u8  tcp_flags;	/* or what is the same to SCTP: see sctp_flags() */
	__u8  icmp_type, icmp_code;
	__u8  icmp_error;	/* `inner` is valid */
	__u8  dry;
	__u8  judged;		/* directions judged: 1 << enum direction */
	__u8  reply;		/* the packet flows from responder to originator */
	__u8  own_socket;	/* sent by a socket of this node */
	__u8  table;		/* enum ct_table: where the connection found lives */
	__u8  twin;		/* another connection has these ends: see is_taken() */
	__u8  has_met;		/* `met` is valid */
	__u8  late;		/* or a backend that went may have begun that: see find_untranslated() */
	__u8  outer_size;	/* of the outer header, 0 = there is none */
	__u8  outer_ttl;
	__u8  quoted;		/* an ICMP error, related to nothing, of which `inner` is valid */
	__u8  third;		/* in the name of another node than sent it: see arrive.h */
	__u8  snat;		/* leaves for a backend as this node */
	__u8  to_host;		/* to an address of the node itself, by peers */

	/* Both ends as the last verdict saw them, originator first. */
	__u32 src_endpoint, dst_endpoint;
	__u32 src_slot, dst_slot;
	__u32 src_class, dst_class;
	__u32 src_target, dst_target;
	__u32 egress_cell, ingress_cell;
	__u32 egress_pending, ingress_pending;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);		/* live traffic, dry runs */
	__type(key, __u32);
	__type(value, struct packet);
} packets SEC(".maps");

/* Record why and where a packet is given up; the value is the cause. */
#define GIVE_UP(p, why) ((p)->line = __LINE__, (p)->cause = (why))

static __always_inline __u32 target_of(__u32 kind, __u32 index)
{
	return kind << 28 | (index & 0x0fffffff);
}

static __always_inline __u32 target_kind(__u32 target)
{
	return target >> 28;
}

static __always_inline __u32 target_index(__u32 target)
{
	return target & 0x0fffffff;
}

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline bool zero_addr(const struct addr *a)
{
	const __u64 *x = (const __u64 *)a;

	return !(x[0] | x[1]);
}

static __always_inline bool is_v4(const struct addr *a)
{
	const __u32 *w = (const __u32 *)a;

	return !w[0] && !w[1] && w[2] == bpf_htonl(0xffff);
}

/* Tuples and keys are written and compared by 64-bit words: a load that spans
 * several smaller stores waits for them to reach the cache. */
static __always_inline void map_v4(struct addr *to, __be32 from)
{
	__u64 *w = (__u64 *)to;
	union {
		__be32 half[2];
		__u64 whole;
	} low = { .half = { bpf_htonl(0xffff), from } };

	w[0] = 0;
	w[1] = low.whole;
}

/* Both 8-byte aligned, as in tuples, connection keys and events. */
static __always_inline void copy_addr(struct addr *to, const struct addr *from)
{
	((__u64 *)to)[0] = ((const __u64 *)from)[0];
	((__u64 *)to)[1] = ((const __u64 *)from)[1];
}

/* The third part of a tuple or of a connection key (little-endian machines). */
static __always_inline __u64 ends_of(__be16 first, __be16 second, __u8 proto)
{
	return (__u64)first | (__u64)second << 16 | (__u64)proto << 32;
}

static __always_inline void set_ends(struct tuple *t, __be16 sport, __be16 dport, __u8 proto)
{
	*(__u64 *)&t->sport = ends_of(sport, dport, proto);
}

static __always_inline void reverse_of(struct tuple *to, const struct tuple *from)
{
	copy_addr(&to->saddr, &from->daddr);
	copy_addr(&to->daddr, &from->saddr);
	set_ends(to, from->dport, from->sport, from->proto);
}

static __always_inline bool has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* The kernel's ticks since it started; its count of them begins 300 s before 32 bits are full.
 * A load, where a helper's call costs 15 ns and more. `config_hz` is not 0. */
static __always_inline __u64 ticks(void)
{
	return bpf_jiffies64() - ((1ull << 32) - 300ull * config_hz);
}

/* Seconds of CLOCK_MONOTONIC_COARSE, or one less: the first tick came after a while. */
static __always_inline __u32 now_seconds(void)
{
	return config_hz ? ticks() / config_hz : bpf_ktime_get_coarse_ns() / 1000000000ull;
}

/* Nanoseconds of the same, for buckets. */
static __always_inline __u64 now_ns(void)
{
	return config_hz ? ticks() * (1000000000u / config_hz) : bpf_ktime_get_coarse_ns();
}

/* Was it last seen more than `timeout` seconds before `now`? Signed: another
 * CPU may have seen it in the second after this packet's. */
static __always_inline bool is_later(__u32 now, __u32 seen, __s32 timeout)
{
	return (__s32)(now - seen) > timeout;
}

static __always_inline bool is_past(const struct packet *p, __u32 seen, __s32 timeout)
{
	return is_later(p->now_s, seen, timeout);
}

/* The packet in hand of this CPU, cleared of what the last one left. */
static __always_inline struct packet *packet_begin(struct __sk_buff *skb, __u32 place)
{
	__u32 which = skb->mark == DRY_MARK;
	struct packet *p = bpf_map_lookup_elem(&packets, &which);

	if (!p)
		return NULL;
	p->dry = which;
	p->place = place;
	p->epoch = node_epoch();
	p->now_s = now_seconds();
	p->slot = NO_SLOT;
	p->service = p->target = p->cause = p->line = 0;
	p->tcp_flags = p->icmp_type = p->icmp_code = p->icmp_error = 0;
	p->fragment = p->judged = p->reply = p->own_socket = p->has_met = 0;
	p->outer_size = p->quoted = p->third = p->snat = p->to_host = 0;
	p->src_endpoint = p->dst_endpoint = 0;
	p->egress_cell = p->ingress_cell = 0;
	p->egress_pending = p->ingress_pending = 0;
	return p;
}

#endif
