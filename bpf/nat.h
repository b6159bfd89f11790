/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * nat.h: a packet with one tuple becomes a packet with another. One engine
 * for services per packet, masquerade and hairpin: `nat` says what becomes of
 * a tuple, rewrite() makes it so on the wire.
 */
#ifndef LOCKGATE_NAT_H
#define LOCKGATE_NAT_H

#include "conntrack.h"
#include "parse.h"

#define MASQUERADE_TRIES 16

enum port {
	PORT_FREE   = 0,
	PORT_CLOSED = 1,	/* a connection that is over had it lately */
	PORT_TAKEN  = 2,
};

/* Source ports for a pod's connection whose own is taken: below those that the
 * kernel gives to sockets (net.ipv4.ip_local_port_range). */
#define TWIN_TRIES    4
#define TWIN_PORT_MIN 1024
#define TWIN_PORTS    31744

static __always_inline bool same_ends(const struct tuple *a, const struct tuple *b)
{
	return same_addr(&a->saddr, &b->saddr) && same_addr(&a->daddr, &b->daddr) &&
	       a->sport == b->sport && a->dport == b->dport;
}

/* A translation is in use, and so is the way back, which may see no packets
 * for long: both live on. Once a second. */
static __noinline int nat_seen(struct packet *p, struct nat *found)
{
	struct tuple back;

	if (!found)
		return 0;
	found->seen = p->now_s;
	reverse_of(&back, &found->to);
	struct nat *other = bpf_map_lookup_elem(&nat, &back);

	if (other)
		other->seen = p->now_s;
	return 0;
}

/* What becomes of `t`, or NULL. Its lifetime is that of its use. */
static __always_inline struct nat *nat_find(struct packet *p, const struct tuple *t)
{
	struct nat *found = bpf_map_lookup_elem(&nat, t);

	if (found && found->seen != p->now_s)
		nat_seen(p, found);
	return found;
}

/* From now on `from` becomes `to`. With BPF_NOEXIST: false if taken. */
static __always_inline bool nat_add(struct packet *p, const struct tuple *from, const struct tuple *to, __u64 flags)
{
	p->translation.to = *to;
	p->translation.seen = p->now_s;
	p->translation.pad = 0;
	return p->dry || !bpf_map_update_elem(&nat, from, &p->translation, flags);
}

/* Offset of the checksum in the L4 header, 0 = none to mend. */
static __always_inline __u32 csum_offset(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:    return 16;
	case IPPROTO_UDP:    return 6;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6: return 2;
	}
	return 0;
}

/* Where the port or echo identifier of a side stands, 0 = it has none. */
static __always_inline __u32 port_offset(__u8 proto, bool source)
{
	if (has_ports(proto))
		return source ? 0 : 2;
	return 4;		/* identifier of ICMP echo, the same field for both */
}

static __always_inline int store_addresses(struct __sk_buff *skb, __u8 family, __u32 l3, const struct tuple *t)
{
	if (family == 4)
		return bpf_skb_store_bytes(skb, l3 + 12, &t->saddr.b[12], 4, 0) ||
		       bpf_skb_store_bytes(skb, l3 + 16, &t->daddr.b[12], 4, 0);
	return bpf_skb_store_bytes(skb, l3 + 8, &t->saddr, 32, 0);
}

/* Change one port of the L4 header at `l4`, and the checksum at `csum`. */
static __always_inline int store_port(struct __sk_buff *skb, __u32 at, __u32 csum, __be16 from, __be16 to, __u64 flags)
{
	if (from == to)
		return 0;
	if (csum && bpf_l4_csum_replace(skb, csum, from, to, 2 | flags))
		return -1;
	return bpf_skb_store_bytes(skb, at, &to, 2, 0);
}

/* Turn the packet from p->wire into p->now. False when it cannot be. */
static __noinline int rewrite(struct __sk_buff *skb, struct packet *p)
{
	struct tuple *from = &p->wire, *to = &p->now;
	__u64 mangled = from->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 at = csum_offset(from->proto);
	__u32 csum = at && p->fragment != FRAG_LATER ? p->l4 + at : 0;
	bool ports = from->sport != to->sport || from->dport != to->dport;

	if (same_ends(from, to))
		return 1;
	if (from->proto == IPPROTO_SCTP && ports) {
		GIVE_UP(p, CAUSE_SCTP_PORT_REWRITE);
		return 0;
	}
	GIVE_UP(p, CAUSE_NAT_FAILED);
	__s64 diff = bpf_csum_diff((__be32 *)&from->saddr, 32, (__be32 *)&to->saddr, 32, 0);

	if (p->family == 4 && bpf_l3_csum_replace(skb, p->l3 + 10, 0, diff, 0))
		return 0;
	if (csum && from->proto != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(skb, csum, 0, diff, BPF_F_PSEUDO_HDR | mangled))
		return 0;
	if (store_addresses(skb, p->family, p->l3, to))
		return 0;
	if (ports && p->fragment != FRAG_LATER) {
		if (store_port(skb, p->l4 + port_offset(from->proto, true), csum, from->sport, to->sport, mangled))
			return 0;
		if (store_port(skb, p->l4 + port_offset(from->proto, false), csum, from->dport, to->dport, mangled))
			return 0;
	}
	p->cause = CAUSE_NONE;
	return 1;
}

/* The same for an ICMP error: the packet it quotes becomes p->tuple, its own
 * addresses those of p->now. The quoted IPv4 header's checksum balances its
 * addresses, so the outer ICMP checksum only sees ports; ICMPv6 sees all. */
static __noinline int rewrite_error(struct __sk_buff *skb, struct packet *p)
{
	struct tuple *from = &p->inner, *to = &p->tuple;
	__u32 csum = p->l4 + 2;
	__s64 quoted, outer;

	GIVE_UP(p, CAUSE_NAT_FAILED);
	if (from->proto == IPPROTO_SCTP && (from->sport != to->sport || from->dport != to->dport)) {
		GIVE_UP(p, CAUSE_SCTP_PORT_REWRITE);
		return 0;
	}
	quoted = bpf_csum_diff((__be32 *)&from->saddr, 32, (__be32 *)&to->saddr, 32, 0);
	outer = bpf_csum_diff((__be32 *)&p->wire.saddr, 32, (__be32 *)&p->now.saddr, 32, 0);
	if (p->family == 4) {
		if (bpf_l3_csum_replace(skb, p->l3 + 10, 0, outer, 0) ||
		    bpf_l3_csum_replace(skb, p->inner_l3 + 10, 0, quoted, 0))
			return 0;
	} else {
		if (bpf_l4_csum_replace(skb, csum, 0, quoted, 0) ||
		    bpf_l4_csum_replace(skb, csum, 0, outer, BPF_F_PSEUDO_HDR))
			return 0;
	}
	if (store_addresses(skb, p->family, p->inner_l3, to) ||
	    store_addresses(skb, p->family, p->l3, &p->now))
		return 0;
	if (store_port(skb, p->inner_l4 + port_offset(from->proto, true), csum, from->sport, to->sport, 0) ||
	    store_port(skb, p->inner_l4 + port_offset(from->proto, false), csum, from->dport, to->dport, 0))
		return 0;
	p->cause = CAUSE_NONE;
	return 1;
}

/* Does the connection of `t` need its port? */
static __noinline enum port port_of(struct packet *p, const struct tuple *t)
{
	struct ct_key key;

	if (!t)
		return PORT_TAKEN;
	ct_key_of(&key, t);
	struct ct *ct = bpf_map_lookup_elem(&connections, &key);

	if (!ct)
		ct = bpf_map_lookup_elem(&half_open, &key);
	if (!ct || is_past(p, ct->seen, ct_timeout(ct, t->proto)))
		return PORT_FREE;
	return ct->state == CT_CLOSED && t->proto == IPPROTO_TCP ? PORT_CLOSED : PORT_TAKEN;
}

/* Try to translate the connection p->asked to `out`, answers to which come back
 * as p->tuple. PORT_FREE: done; else another connection has that port, or had it until
 * lately and is not `overridden`: one that is past has it no more, whatever the sweep has
 * got to. Those that leave for a backend are known by `out`, the others by what they were.
 * Global, so that the verifier walks it once and not at every try. */
__noinline int masquerade_as(struct packet *p, const struct tuple *out, __u32 overridden)
{
	struct tuple back;

	if (!p || !out)
		return PORT_TAKEN;
	reverse_of(&back, out);
	if (!nat_add(p, &back, &p->tuple, BPF_NOEXIST)) {
		struct nat *taken = bpf_map_lookup_elem(&nat, &back);

		if (taken && !same_ends(&taken->to, &p->tuple)) {
			enum port was = port_of(p, &taken->to), is = port_of(p, &back);
			enum port port = was > is ? was : is;

			if (port == PORT_TAKEN || (port == PORT_CLOSED && !overridden))
				return port;
			/* Its own packets, should any come, need another port. */
			reverse_of(&back, &taken->to);
			bpf_map_delete_elem(&nat, &back);
			reverse_of(&back, out);
		}
		nat_add(p, &back, &p->tuple, BPF_ANY);
	}
	nat_add(p, &p->asked, out, BPF_ANY);
	p->now = *out;
	return PORT_FREE;
}

/* Give the connection p->now a source address and port of the node's: a pod's to the
 * world (`from` is p->now itself), or a client's to a backend (`from` is what it asked).
 * Leaves p->now translated; false with a cause when none is free. One of a connection that
 * is closed is taken where no other is found: see remember_service(). */
static __noinline int masquerade(struct packet *p, const struct tuple *from, const struct hop_view *hop)
{
	__u32 span = masquerade_port_max - masquerade_port_min + 1;
	const struct addr *source = p->family == 4 ? &hop->masq4 : &hop->masq6;
	struct tuple *out = &p->inner;	/* free: no ICMP error begins a connection */
	bool choose = p->now.proto != IPPROTO_SCTP && (p->now.sport || has_ports(p->now.proto));

	if (zero_addr(source)) {
		GIVE_UP(p, CAUSE_NO_ROUTE);
		return 0;
	}
	p->asked = *from;
	reverse_of(&p->tuple, from);
	*out = p->now;
	out->saddr = *source;

	/* A connection whose entry was evicted, or that begins anew, keeps its port. */
	struct nat *kept = bpf_map_lookup_elem(&nat, &p->asked);

	if (kept && same_addr(&kept->to.saddr, source) && same_addr(&kept->to.daddr, &out->daddr) &&
	    kept->to.dport == out->dport) {
		out->sport = kept->to.sport;
		if (masquerade_as(p, out, false) == PORT_FREE)
			return 1;
	}
	__u32 first = bpf_get_prandom_u32();
	bool closed = false;
	__be16 sport = 0;

	for (int i = 0; i < MASQUERADE_TRIES; i++) {
		if (choose)
			out->sport = bpf_htons(masquerade_port_min + (first + i * 7919) % span);
		int port = masquerade_as(p, out, false);

		if (port == PORT_FREE)
			return 1;
		if (port == PORT_CLOSED && !closed) {
			closed = true;
			sport = out->sport;
		}
		if (!choose)
			break;
	}
	out->sport = sport;
	if (closed && masquerade_as(p, out, true) == PORT_FREE)
		return 1;
	GIVE_UP(p, CAUSE_NAT_EXHAUSTED);
	return 0;
}

#endif
