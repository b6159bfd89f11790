/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * firewall.h: what a card may bring, before anything else is done with it. The
 * most specific entry of the source that matches decides (docs/firewall.md).
 */
#ifndef LOCKGATE_FIREWALL_H
#define LOCKGATE_FIREWALL_H

#include "balance.h"
#include "bucket.h"
#include "firewall_maps.h"
#include "firewall_known.h"
#include "frame_event.h"

/* 0 removes the firewall. */
const volatile __u32 config_firewall = 0;

/* What was found; the rest of a drop's record. */
struct fw_answer {
	__u32 cause;		/* enum cause; 0 = pass */
	__u32 reason;		/* id of the journal */
	__u32 fallen;		/* no entry matched: the default decided */
};

/* ---- Which entry ---------------------------------------------------------------- */

/* Prefixes of one address that are still to be looked for, the longest first. */
struct fw_probe {
	__u64 length[2];	/* as struct fw_filter */
	__u64 high, low;	/* the address, cut to the last length */
	__u32 number;
	__u32 bloom_mask;
};

/* Can the hash have it? lockgate/compile/firewall_layout.py has the same function. */
static __always_inline bool fw_may_be_there(const struct fw_probe *p, __u32 length)
{
	__u64 x = p->high * HASH_MULTIPLIER + p->low;

	x = ((x ^ x >> 29) + length) * HASH_MULTIPLIER;
	x ^= x >> 32;
	__u32 index = x >> 12 & p->bloom_mask;
	__u64 *word = bpf_map_lookup_elem(&fw_bloom, &index);
	__u64 bits = 1ull << (x & 63) | 1ull << (x >> 6 & 63);

	return word && (*(volatile __u64 *)word & bits) == bits;
}

static long fw_probe_one(__u64 i, void *context)
{
	struct fw_probe *p = context;
	bool longer = p->length[0];
	__u64 left = longer ? p->length[0] : p->length[1];
	struct fw_key key = {};
	__be32 *k = (__be32 *)&key.addr;
	struct fw_prefix *found;
	__u32 bit;

	if (!left)
		return 1;
	bit = __builtin_ctzll(left) & 63;
	if (longer) {
		p->length[0] = left & (left - 1);
		p->low &= ~0ull << bit;
	} else {
		p->length[1] = left & (left - 1);
		p->low = 0;
		p->high &= ~0ull << bit;
	}
	key.length = (longer ? 128 : 64) - bit;
	if (!fw_may_be_there(p, key.length))
		return 0;
	k[0] = bpf_htonl(p->high >> 32);
	k[1] = bpf_htonl(p->high);
	k[2] = bpf_htonl(p->low >> 32);
	k[3] = bpf_htonl(p->low);
	found = bpf_map_lookup_elem(&fw_prefixes, &key);
	if (!found)
		return 0;
	p->number = *(volatile __u32 *)&found->number;
	return 1;
}

/* The number of the first of those lengths that has a prefix with the address, else `rest`. */
static __noinline int fw_probe(const struct addr *addr, __u64 longer, __u64 shorter, __u32 rest)
{
	__u32 zero = 0;
	struct fw_state *now = bpf_map_lookup_elem(&fw_state, &zero);
	const __be32 *w = (const __be32 *)addr;
	struct fw_probe p = {
		.length = { longer, shorter },
		.high = (__u64)bpf_ntohl(w[0]) << 32 | bpf_ntohl(w[1]),
		.low = (__u64)bpf_ntohl(w[2]) << 32 | bpf_ntohl(w[3]),
		.number = rest,
		.bloom_mask = now ? now->bloom_mask : 0,
	};

	bpf_loop(128, fw_probe_one, &p, 0);
	return p.number;
}

static __always_inline __u32 fw_filter_index(const struct addr *addr)
{
	return *(const __be32 *)addr * 0x9e3779b1u >> (32 - FW_FILTER_BITS);
}

static __always_inline __u32 fw_find(const struct addr *addr, __u8 family)
{
	const __be32 *w = (const __be32 *)addr;
	__u32 index;

	if (family == 4) {
		__u32 group = bpf_ntohl(w[3]) >> 14;
		__u64 *used = bpf_map_lookup_elem(&fw_slots_used, &group);

		index = bpf_ntohl(w[3]) >> 8;
		if (!used || !(*(volatile __u64 *)used >> (index & 63) & 1))
			return 0;
		__u32 *slot = bpf_map_lookup_elem(&fw_slots, &index);
		__u32 word = slot ? *(volatile __u32 *)slot : 0;

		if (!(word >> FW_LENGTHS))
			return word & FW_NUMBER;
		return fw_probe(addr, word >> FW_LENGTHS, 0, word & FW_NUMBER);
	}
	index = fw_filter_index(addr);
	struct fw_filter *filter = bpf_map_lookup_elem(&fw_filter6, &index);
	__u32 zero = 0;
	struct fw_state *now = bpf_map_lookup_elem(&fw_state, &zero);

	if (!filter || !now)
		return 0;
	__u64 long6 = *(volatile __u64 *)&filter->length[0], short6 = *(volatile __u64 *)&filter->length[1];
	__u32 root = *(volatile __u32 *)&now->root6;

	short6 |= *(volatile __u64 *)&now->short6;
	return long6 | short6 ? fw_probe(addr, long6, short6, root) : root;
}

/* ---- What it says ---------------------------------------------------------------- */

static __always_inline bool fw_has_port(__u32 set, const struct frame *f, __u8 action)
{
	struct fw_ports *ports = bpf_map_lookup_elem(&fw_ports, &set);
	__u32 table, port = bpf_ntohs(f->ends.dport);

	if (!ports)
		return false;
	switch (f->ends.proto) {
	case IPPROTO_TCP:  table = 0; break;
	case IPPROTO_UDP:  table = 1; break;
	case IPPROTO_SCTP: table = 2; break;
	case IPPROTO_ICMP:
		return f->family == 4 && ports->protocols & FW_ICMP;
	case IPPROTO_ICMPV6:
		return f->family == 6 && ports->protocols & FW_ICMP;
	default:
		return false;
	}
	/* It follows its first fragment, which was judged by the port. */
	if (f->fragment == FRAG_LATER)
		return action == FW_ALLOW && ports->protocols & (1u << table);
	return ports->bits[table][port >> 6] >> (port & 63) & 1;
}

static __always_inline bool fw_within_rate(const struct frame *f, __u32 number, const struct fw_rule *rule)
{
	struct fw_source key = { .rule = number };
	__u64 now = now_ns();
	__u64 *bucket;

	key.addr = f->ends.saddr;
	if (f->family == 6)
		((__u32 *)&key.addr)[2] = ((__u32 *)&key.addr)[3] = 0;
	bucket = bpf_map_lookup_elem(&fw_sources, &key);
	if (bucket)
		return take(bucket, now, rule->every_ns);
	now += rule->every_ns;
	now -= BURST_NS;
	bpf_map_update_elem(&fw_sources, &key, &now, BPF_ANY);
	return true;
}

/* Does this card lead to other nodes? */
static __always_inline bool fw_is_inside(struct xdp_md *ctx)
{
	__u32 ifindex = ctx->ingress_ifindex;
	__u32 *role = bpf_map_lookup_elem(&link_roles, &ifindex);

	return role && *role == LINK_UNDERLAY;
}

static __always_inline __u32 fw_obey(struct xdp_md *ctx, const struct frame *f, const struct fw_rule *rule)
{
	switch (rule->action) {
	case FW_ALLOW:
		return 0;
	case FW_DENY:
		return CAUSE_FIREWALL;
	case FW_MEMBER:
		return fw_is_inside(ctx) ? 0 : CAUSE_SPOOFED_SOURCE;
	case FW_UNSPECIFIED:
		return fw_to_many(&f->ends.daddr) ? 0 : CAUSE_SPOOFED_SOURCE;
	case FW_NOBODY:
		return CAUSE_SPOOFED_SOURCE;
	}
	return 0;
}

/* Is the source in the prefix? A slot leads to longer prefixes than its own without asking, where
 * all of these lie in one another. */
static __always_inline bool fw_has_source(const struct fw_entry *entry, const struct frame *f)
{
	__u32 beyond = 128 - entry->length;

	if (f->family != 4 || beyond >= 8)
		return true;
	return !((bpf_ntohl(((const __be32 *)&f->ends.saddr)[3]) ^ bpf_ntohl(((const __be32 *)&entry->addr)[3])) >> beyond);
}

static __always_inline bool fw_matches(const struct fw_entry *entry, const struct fw_rule *rule, const struct frame *f)
{
	__u32 expires = *(const volatile __u32 *)&entry->expires;

	if (!fw_has_source(entry, f))
		return false;
	if (expires && bpf_ktime_get_coarse_ns() >= expires * 1000000000ull)
		return false;
	return !rule->ports || fw_has_port(rule->ports, f, rule->action);
}

struct fw_chain {
	const struct frame *frame;
	__u32 number;
};

static long fw_match_one(__u64 i, void *context)
{
	struct fw_chain *c = context;
	struct fw_entry *entry = bpf_map_lookup_elem(&fw_entries, &c->number);

	if (!entry || !c->number)
		return 1;
	__u32 which = *(volatile __u32 *)&entry->rule;
	struct fw_rule *rule = bpf_map_lookup_elem(&fw_rules, &which);

	if (rule && fw_matches(entry, rule, c->frame))
		return 1;
	c->number = *(volatile __u32 *)&entry->next;
	return 0;
}

/* The number of the first entry from `number` on that matches, 0 = none. */
static __noinline int fw_match(const struct frame *f, __u32 number)
{
	struct fw_chain c = { .frame = f, .number = number };

	/* More than that do not lead on: the default decides. */
	return bpf_loop(FW_STEPS, fw_match_one, &c, 0) > FW_STEPS - 1 ? 0 : c.number;
}

/* By the first entry from `number` on that matches, or the default. Mostly it is the first. */
static __noinline int fw_judge(struct xdp_md *ctx, struct frame *f, struct fw_answer *a, __u32 number)
{
	struct fw_entry *entry = bpf_map_lookup_elem(&fw_entries, &number);
	struct fw_rule *rule;
	__u32 which;

	a->cause = a->fallen = 0;
	if (!entry)
		return 0;
	which = *(volatile __u32 *)&entry->rule;
	rule = bpf_map_lookup_elem(&fw_rules, &which);
	if (!rule)
		return 0;
	if (number && !fw_matches(entry, rule, f)) {
		number = fw_match(f, *(volatile __u32 *)&entry->next);
		entry = bpf_map_lookup_elem(&fw_entries, &number);
		if (!entry)
			return 0;
		which = *(volatile __u32 *)&entry->rule;
		rule = bpf_map_lookup_elem(&fw_rules, &which);
		if (!rule)
			return 0;
	}
	a->reason = rule->reason;
	a->cause = fw_obey(ctx, f, rule);
	a->fallen = !number;
	if (!number)
		return 0;
	if (!a->cause && rule->every_ns && !fw_within_rate(f, which, rule))
		a->cause = CAUSE_FIREWALL_RATE;
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, f->length);
	return 0;
}

static __always_inline void fw_ask(struct xdp_md *ctx, struct frame *f, struct fw_answer *a)
{
	fw_judge(ctx, f, a, fw_find(&f->ends.saddr, f->family));
}

/* ---- What comes in other packets -------------------------------------------------- */

/* An error speaks of a packet that went the other way: it passes where the answer to that
 * would, so path MTU discovery works for whom the entries allow, and for our own. */
static __noinline int fw_ask_quoted(struct xdp_md *ctx, struct frame *f, struct fw_answer *a)
{
	struct frame q = {};
	__u8 family = f->family;

	q.epoch = f->epoch;
	q.length = f->length;
	if (!frame_inside(ctx, &q, f->l4 + sizeof(struct icmp_head), family))
		return 0;
	struct tuple there = q.ends;

	reverse_of(&q.ends, &there);
	fw_ask(ctx, &q, a);
	if (a->cause && a->fallen && fw_is_known(ctx, &q))
		a->cause = 0;
	return 0;
}

/* From another node's balancer, which hides the client in a packet: judged as that. The client
 * may be of this node, and have asked that node's port. */
static __noinline int fw_ask_inner(struct xdp_md *ctx, struct frame *f, struct fw_answer *a)
{
	struct frame q = {};

	q.epoch = f->epoch;
	q.length = f->length;
	if (!frame_inside(ctx, &q, f->l4, f->family))
		return 0;
	fw_ask(ctx, &q, a);
	if (a->cause == CAUSE_SPOOFED_SOURCE ? fw_is_ours(&q) : a->cause && a->fallen && fw_is_known(ctx, &q))
		a->cause = 0;
	return 0;
}

/* ---- The whole of it -------------------------------------------------------------- */

/* What never comes whole from who means well: 0 or a cause. Frames that can't be read
 * have theirs already. */
static __always_inline __u32 fw_inspect(struct xdp_md *ctx, struct frame *f)
{
	const __u8 strange = TCP_FIN | TCP_RST;

	if (same_addr(&f->ends.saddr, &f->ends.daddr))
		return CAUSE_SPOOFED_SOURCE;
	if (fw_is_loopback(&f->ends.daddr))
		return CAUSE_MALFORMED;
	if (f->ends.proto == IPPROTO_TCP && f->fragment != FRAG_LATER &&
	    (!(f->tcp_flags & 0x3f) || (f->tcp_flags & TCP_SYN && f->tcp_flags & strange)))
		return CAUSE_MALFORMED;
	if (f->kind == FRAME_PLAIN)
		return f->ends.proto == IPPROTO_UDP && fw_bad_udp(ctx, f) ? CAUSE_MALFORMED : 0;
	return fw_bad_fragment(ctx, f) ? CAUSE_MALFORMED : 0;
}

static __noinline int fw_drop(struct xdp_md *ctx, struct frame *f, __u32 cause, __u32 reason)
{
	__u32 zero = 0;
	struct fw_state *now = bpf_map_lookup_elem(&fw_state, &zero);

	count(COUNT_CAUSE + cause);
	if (now && !take(&now->told, now_ns(), config_event_ns))
		count(COUNT_EVENTS_CUT);
	else
		frame_event(ctx, f, cause, reason);
	return XDP_DROP;
}

/* XDP_PASS: go on with it. XDP_DROP: it ends here. */
static __always_inline int firewall(struct xdp_md *ctx, struct frame *f)
{
	struct fw_answer a = {};

	if (f->kind == FRAME_NOT_IP)
		return XDP_PASS;
	a.cause = f->kind == FRAME_BAD ? f->cause : fw_inspect(ctx, f);
	if (a.cause)
		return fw_drop(ctx, f, a.cause, 0);
	if (f->kind == FRAME_OTHER && fw_is_encapsulated(ctx, f)) {
		fw_ask_inner(ctx, f, &a);
	} else {
		fw_ask(ctx, f, &a);
		if (a.cause && a.fallen) {
			if (fw_is_known(ctx, f))
				a.cause = 0;
			else if (f->kind == FRAME_OTHER && fw_is_error(ctx, f))
				fw_ask_quoted(ctx, f, &a);
		}
	}
	return a.cause ? fw_drop(ctx, f, a.cause, a.reason) : XDP_PASS;
}

#endif
