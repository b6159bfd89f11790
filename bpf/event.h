/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * event.h: what happened, into the ring. Losses are counted, never silent.
 */
#ifndef LOCKGATE_EVENT_H
#define LOCKGATE_EVENT_H

#include "count.h"
#include "limit.h"

/* Send p->event, with the packet's first bytes when the node asks for them. */
static __noinline int event_send(struct __sk_buff *skb, struct packet *p)
{
	__u32 zero = 0;
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);
	__u32 want = config_capture && node ? node->capture : 0;

	struct budget *budget = budget_of(p);
	__u32 told = p->event.egress_cell ? 2 : 1;

	p->event.captured = 0;
	if (budget && !take(&budget->events, p->event.time, config_event_ns * told)) {
		count_many(COUNT_EVENTS_CUT, told);
		return 0;
	}
	if (want) {
		struct event_raw *raw = bpf_ringbuf_reserve(&events_raw, sizeof(*raw), 0);

		if (!raw) {
			count_many(COUNT_EVENTS_LOST, told);
			return 0;
		}
		if (want > EVENT_CAPTURE_MAX)
			want = EVENT_CAPTURE_MAX;
		if (want > skb->len)
			want = skb->len;
		__builtin_memset(raw->head, 0, sizeof(raw->head));
		if (want && want <= EVENT_CAPTURE_MAX && !bpf_skb_load_bytes(skb, 0, raw->head, want))
			p->event.captured = want;
		raw->event = p->event;
		bpf_ringbuf_submit(raw, 0);
	} else if (bpf_ringbuf_output(&events, &p->event, sizeof(p->event), 0)) {
		count_many(COUNT_EVENTS_LOST, told);
		return 0;
	}
	count_many(COUNT_EVENTS, told);
	return 0;
}

/* Fields that every record has. `t` is oriented as the event speaks of it. */
static __always_inline void event_fill(struct __sk_buff *skb, struct packet *p, const struct tuple *t)
{
	struct event *e = &p->event;

	e->time = bpf_ktime_get_boot_ns();
	e->saddr = t->saddr;
	e->daddr = t->daddr;
	if (p->icmp_type || p->icmp_code || t->proto == IPPROTO_ICMP || t->proto == IPPROTO_ICMPV6) {
		e->sport = bpf_htons(p->icmp_type);
		e->dport = bpf_htons(p->icmp_code);
	} else {
		e->sport = t->sport;
		e->dport = t->dport;
	}
	e->proto = t->proto;
	e->tcp_flags = t->proto == IPPROTO_TCP ? p->tcp_flags : 0;
	e->place = p->place;
	e->src_endpoint = p->src_endpoint;
	e->dst_endpoint = p->dst_endpoint;
	e->service = p->service;
	e->ifindex = skb->ifindex;
	e->length = p->length;
	e->epoch = p->epoch;
	e->class = e->reason = e->pending = 0;
	e->egress_class = e->egress_cell = e->egress_pending = 0;
	e->line = 0;
	e->cause = CAUSE_NONE;
}

/* What the last judgement said, in one direction or both. A denial ends it: where
 * ingress was judged too, egress allowed. */
static __noinline int tell_verdicts(struct __sk_buff *skb, struct packet *p)
{
	struct event *e = &p->event;
	bool ingress = p->judged & 1 << DIR_INGRESS, egress = p->judged & 1 << DIR_EGRESS;
	__u32 cell = ingress ? p->ingress_cell : p->egress_cell;

	if (p->dry || !p->judged)
		return 0;
	if (p->reply)	/* events speak of connections, from their originator */
		reverse_of(&p->tuple, &p->now);
	else
		p->tuple = p->now;
	event_fill(skb, p, &p->tuple);
	e->type = EVENT_VERDICT;
	e->verdict = cell & CELL_ALLOW ? VERDICT_ALLOW : VERDICT_DENY;
	e->direction = ingress ? DIR_INGRESS : DIR_EGRESS;
	e->reason = cell & CELL_REASON;
	e->class = ingress ? p->src_class : p->dst_class;
	e->pending = ingress ? p->ingress_pending : p->egress_pending;
	if (ingress && egress) {
		e->egress_class = p->dst_class;
		e->egress_cell = p->egress_cell;
		e->egress_pending = p->egress_pending;
	}
	if (e->verdict == VERDICT_DENY)
		e->cause = CAUSE_POLICY;
	return event_send(skb, p);
}

/* Drop for p->cause. The way every program ends that gives a packet up. Global, so that
 * the verifier walks it once and not on every way here. */
__noinline int drop(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return TCX_DROP;
	if (p->dry) {
		skb->cb[DRY_RESULT] = VERDICT_DENY | p->cause << 8 | (__u32)p->judged << 16;
		skb->cb[DRY_EGRESS] = p->egress_cell;
		skb->cb[DRY_INGRESS] = p->ingress_cell;
		skb->cb[DRY_TARGET] = 0;
		skb->cb[DRY_SERVICE] = p->service;
		return TCX_DROP;
	}
	count(COUNT_CAUSE + p->cause);
	/* Multicast chatter (MLD, mDNS) is counted only; denials sent their verdict. */
	if (p->cause == CAUSE_MULTICAST || p->cause == CAUSE_POLICY)
		return TCX_DROP;
	event_fill(skb, p, &p->wire);
	p->event.type = EVENT_DROP;
	p->event.verdict = VERDICT_DENY;
	p->event.direction = DIR_NONE;
	p->event.cause = p->cause;
	p->event.line = p->line;
	event_send(skb, p);
	return TCX_DROP;
}

#endif
