/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* frame_event.h: what XDP drops, into the ring. As event.h, for frames. */
#ifndef LOCKGATE_FRAME_EVENT_H
#define LOCKGATE_FRAME_EVENT_H

#include "count.h"
#include "frame.h"

static __always_inline void frame_event_fill(struct event *e, struct xdp_md *ctx, const struct frame *f)
{
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_boot_ns();
	copy_addr(&e->saddr, &f->ends.saddr);
	copy_addr(&e->daddr, &f->ends.daddr);
	e->sport = f->ends.sport;
	e->dport = f->ends.dport;
	e->proto = f->ends.proto;
	if (e->proto == IPPROTO_ICMP || e->proto == IPPROTO_ICMPV6) {
		struct icmp_head icmp = {};

		if (f->fragment != FRAG_LATER)
			bpf_xdp_load_bytes(ctx, f->l4, &icmp, sizeof(icmp));
		e->sport = bpf_htons(icmp.type);
		e->dport = bpf_htons(icmp.code);
	}
	e->type = EVENT_DROP;
	e->verdict = VERDICT_DENY;
	e->tcp_flags = f->tcp_flags;
	e->place = PLACE_XDP;
	e->ifindex = ctx->ingress_ifindex;
	e->length = f->length;
	e->epoch = f->epoch;
}

/* Tell a drop, with the packet's first bytes when the node asks for them. */
static __noinline int frame_event(struct xdp_md *ctx, struct frame *f, __u32 cause, __u32 reason)
{
	__u32 zero = 0, size = bpf_xdp_get_buff_len(ctx);
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);
	__u32 want = config_capture && node ? node->capture : 0;
	struct event *e;

	if (want) {
		struct event_raw *raw = bpf_ringbuf_reserve(&events_raw, sizeof(*raw), 0);

		if (!raw)
			goto lost;
		e = &raw->event;
		frame_event_fill(e, ctx, f);
		e->cause = cause;
		e->reason = reason;
		__builtin_memset(raw->head, 0, sizeof(raw->head));
		if (want > EVENT_CAPTURE_MAX)
			want = EVENT_CAPTURE_MAX;
		if (want > size)
			want = size;
		/* 1 to EVENT_CAPTURE_MAX it is already; the verifier must see it. */
		want--;
		asm volatile("" : "+r"(want));
		want = (want & (EVENT_CAPTURE_MAX - 1)) + 1;
		if (!bpf_xdp_load_bytes(ctx, 0, raw->head, want))
			e->captured = want;
		bpf_ringbuf_submit(raw, 0);
	} else {
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
		if (!e)
			goto lost;
		frame_event_fill(e, ctx, f);
		e->cause = cause;
		e->reason = reason;
		bpf_ringbuf_submit(e, 0);
	}
	count(COUNT_EVENTS);
	return 0;
lost:
	count(COUNT_EVENTS_LOST);
	return 0;
}

#endif
