/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * flow.h: which backend a client outside was given lately. UDP's memory, for nothing
 * else tells a new flow from an old one; for TCP a shortcut, which nobody relies on.
 */
#ifndef LOCKGATE_FLOW_H
#define LOCKGATE_FLOW_H

#include "backend.h"
#include "balance.h"
#include "bucket.h"

/* What every balancer may have of an earlier connection with the same ends, whose SYN
 * another saw, must soon count no more. */
#define FLOW_SHORTCUT 60	/* seconds without a packet */

/* Of the node: when it may learn again, as `budget`'s words. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} learning SEC(".maps");

/* May what is chosen for this packet be remembered, and only for it? */
static __always_inline bool flow_begins(__u8 proto, __u8 tcp_flags)
{
	return proto == IPPROTO_UDP || (tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* The flow `t`, if it is one of this service and in time. NULL: ask the table. A SYN does
 * so always. `hash` is flow_hash(t); elements change hands at any time, it tells. */
static __always_inline struct flow *flow_find(const struct tuple *t, const struct service_view *view, __u32 hash,
					      __u32 now)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, t);

	if (!flow || flow->hash != hash || flow->service != view->id ||
	    is_later(now, flow->seen, t->proto == IPPROTO_UDP ? TIMEOUT_DATAGRAM : FLOW_SHORTCUT))
		return NULL;
	if (flow->seen != now)
		flow->seen = now;
	return flow;
}

static __always_inline __u32 flow_target(const struct flow *flow)
{
	return flow->target & ~FLOW_STRANGER;
}

/* The epoch moved on: does the backend still serve, and where is it now? `mark`:
 * FLOW_STRANGER, if that is known of the client, or 0. */
static __noinline int flow_again(struct flow *flow, __u8 proto, __u32 epoch, __u32 mark)
{
	struct addr addr;

	if (!flow)
		return 0;
	__u64 *word = (__u64 *)&flow->target, was = *(volatile __u64 *)word;

	addr = flow->addr;
	if (!backend_live(epoch, flow->service, &addr, flow->port, proto))
		return 0;
	struct peer *peer = bpf_map_lookup_elem(&peers, &addr);
	struct peer_view *view = peer ? &peer->view[epoch & 1] : NULL;
	__u32 target;

	if (!view)
		return 0;
	switch (view->kind) {
	case PEER_LOCAL:
		target = target_of(TO_LOCAL, view->target);
		break;
	case PEER_REMOTE:
	case PEER_NODE:
		target = target_of(TO_HOP, view->target);
		break;
	case PEER_HOST:
		target = target_of(TO_HOST, 0);
		break;
	default:
		return 0;
	}
	/* The element may be another flow's by now: then the word is another. */
	__sync_val_compare_and_swap(word, was, (target | mark) | (__u64)epoch << 32);
	return 1;
}

/* Remember the owner that was chosen for `t`, with a mark as flow_again(). In the place of what was remembered before
 * at any time, else at most so many a second: a flood pushes nobody out. */
static __noinline int flow_learn(const struct tuple *t, const struct owner *owner, __u32 service, __u32 epoch,
				 __u32 mark)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 zero = 0;
	__u64 *bucket = bpf_map_lookup_elem(&learning, &zero);
	struct flow flow = {
		.addr = owner->addr,
		.port = owner->port,
		.service = service,
		.target = owner->target | mark,
		.epoch = epoch,
		.seen = now / 1000000000ull,
		.hash = flow_hash(t),
	};

	if (!bucket || (!bpf_map_lookup_elem(&flows, t) && !take(bucket, now, config_flow_ns)))
		return 0;
	bpf_map_update_elem(&flows, t, &flow, BPF_ANY);
	return 0;
}

#endif
