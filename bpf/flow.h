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

/* Bits of flow_hash() that no table is large enough to use as its index. */
static __always_inline __u8 flow_tag(__u32 hash)
{
	return hash >> 24;
}

_Static_assert(FLOW_TAG_SETS * FLOW_WAYS == sizeof(__u64), "a byte for each flow");

/* The word with the tags of a set, and where in it they begin: first way, lowest bits. */
static __always_inline __u64 *flow_tags_of(__u32 set)
{
	__u32 index = set / FLOW_TAG_SETS;

	return bpf_map_lookup_elem(&flow_tags, &index);
}

static __always_inline __u32 flow_tags_at(__u32 set)
{
	return set % FLOW_TAG_SETS * FLOW_WAYS * 8;
}

/* The element of the flow `t`, or NULL. `hash` is flow_hash(t). Of a flow that is not there, as
 * all that begins, only the tags are read: they stay in the processor's cache, the lines that
 * flows take do not. */
static __always_inline struct flow *flow_look(const struct tuple *t, __u32 hash)
{
	__u32 index = hash & config_flow_mask;
	__u64 *word = flow_tags_of(index);
	struct flow_set *set = bpf_map_lookup_elem(&flows, &index);

	if (!word || !set)
		return NULL;
	__u64 tags = *(volatile __u64 *)word >> flow_tags_at(index);

	for (int i = 0; i < FLOW_WAYS; i++) {
		struct flow *flow = &set->way[i];

		if ((__u8)(tags >> 8 * i) == flow_tag(hash) && flow->hash == hash && flow->sport == t->sport &&
		    same_addr(&flow->client, &t->saddr))
			return flow;
	}
	return NULL;
}

static __always_inline __u64 flow_word(const struct flow *flow)
{
	return *(const volatile __u64 *)&flow->target;
}

static __always_inline __u32 flow_epoch(__u64 word)
{
	return word >> 32;
}

static __always_inline bool flow_is_past(const struct flow *flow, __u8 proto, __u32 now)
{
	return is_later(now, flow->seen, proto == IPPROTO_UDP ? TIMEOUT_DATAGRAM : FLOW_SHORTCUT);
}

/* Backend of the flow in `owner`. False: the element, which had this word, was given to
 * another flow meanwhile. A question (`dry`) does not make it last. */
static __always_inline bool flow_read(struct flow *flow, __u64 word, __u32 now, struct owner *owner, bool dry)
{
	copy_addr(&owner->addr, &flow->addr);
	owner->port = flow->port;
	owner->target = (__u32)word & ~FLOW_STRANGER;
	if (flow_word(flow) != word)
		return false;
	if (!dry && flow->seen != now)
		flow->seen = now;
	return true;
}

/* The backend of a flow (or NULL) whose client was no peer, in this same epoch: then nothing
 * else is to be asked. */
static __always_inline bool flow_known(struct flow *flow, __u8 proto, __u32 epoch, __u32 now, struct owner *owner)
{
	__u64 word = flow ? flow_word(flow) : 0;

	return flow && flow_epoch(word) == epoch && word & FLOW_STRANGER && !flow_is_past(flow, proto, now) &&
	       flow_read(flow, word, now, owner, false);
}

/* The word of a flow in this epoch, if its backend still serves; 0 = it does not. `mark`:
 * FLOW_STRANGER, if that is known of the client, or 0. */
static __noinline __u64 flow_again(struct flow *flow, __u64 word, __u8 proto, __u32 epoch, __u32 mark)
{
	struct addr addr;
	__u64 now;

	if (!flow)
		return 0;
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
	now = (target | mark) | (__u64)epoch << 32;
	return __sync_val_compare_and_swap((__u64 *)&flow->target, word, now) == word ? now : 0;
}

/* The backend of a flow (or NULL), if it is one of this service, in time, and serves. Else: ask
 * the table. A SYN does so always. `mark` as flow_again(). */
static __always_inline bool flow_serves(struct flow *flow, const struct service_view *view, __u8 proto, __u32 epoch,
					__u32 now, __u32 mark, struct owner *owner, bool dry)
{
	__u64 word = flow ? flow_word(flow) : 0;

	if (!flow_epoch(word) || flow->service != view->id || flow_is_past(flow, proto, now))
		return false;
	if (flow_epoch(word) != epoch || mark & ~(__u32)word)
		word = flow_again(flow, word, proto, epoch, mark);
	return word && flow_read(flow, word, now, owner, dry);
}

/* Where a flow that is not there may be put: what was silent for longest. Its tag is then this
 * flow's. Where two CPUs put a flow there at once, the tag may be neither's: it is not found. */
static __always_inline struct flow *flow_place(__u32 hash)
{
	__u32 index = hash & config_flow_mask, way = 0;
	__u64 *word = flow_tags_of(index);
	struct flow_set *set = bpf_map_lookup_elem(&flows, &index);

	if (!word || !set)
		return NULL;
	for (__u32 i = 1; i < FLOW_WAYS; i++) {
		struct flow *oldest = &set->way[way], *flow = &set->way[i];

		if (oldest->epoch && (!flow->epoch || is_later(oldest->seen, flow->seen, 0)))
			way = i;
	}
	__u32 at = flow_tags_at(index) + way * 8;

	__sync_fetch_and_xor(word, (__u64)((__u8)(*(volatile __u64 *)word >> at) ^ flow_tag(hash)) << at);
	return &set->way[way];
}

/* May another flow be learned? At most so many a second: a flood pushes nobody out. */
static __always_inline bool may_learn(__u64 now)
{
	__u32 zero = 0;
	__u64 *bucket = bpf_map_lookup_elem(&learning, &zero);

	return bucket && take(bucket, now, config_flow_ns);
}

/* Remember the owner that was chosen for `t`: in the place of what was remembered before, `flow`,
 * or (NULL) somewhere, if that is allowed at this time. The owner's target with a mark as
 * flow_again(); `of`: the epoch, and above it the service. The word goes first and comes last,
 * so that nobody reads half of it. */
static __noinline int flow_write(const struct tuple *t, struct flow *flow, __u32 hash, const struct owner *owner,
				 __u64 of)
{
	if (!flow)
		flow = flow_place(hash);
	if (!flow)
		return 0;
	__u64 *word = (__u64 *)&flow->target;

	__sync_lock_test_and_set(word, 0);
	copy_addr(&flow->client, &t->saddr);
	copy_addr(&flow->addr, &owner->addr);
	flow->sport = t->sport;
	flow->port = owner->port;
	flow->hash = hash;
	flow->service = of >> 32;
	flow->seen = now_seconds();
	__sync_lock_test_and_set(word, owner->target | of << 32);
	return 0;
}

static __always_inline void flow_learn(const struct tuple *t, struct flow *flow, __u32 hash, const struct owner *owner,
				       __u64 of)
{
	if (flow || may_learn(now_ns()))
		flow_write(t, flow, hash, owner, of);
}

/* Is just this remembered of the flow (or NULL)? */
static __always_inline bool flow_says(struct flow *flow, const struct owner *owner, __u32 epoch, __u32 now)
{
	if (!flow || flow_word(flow) != (owner->target | (__u64)epoch << 32) || flow->port != owner->port ||
	    !same_addr(&flow->addr, &owner->addr))
		return false;
	if (flow->seen != now)
		flow->seen = now;
	return true;
}

static __always_inline void flow_forget(const struct tuple *t, __u32 hash)
{
	struct flow *flow = flow_look(t, hash);

	if (flow && flow->epoch)
		__sync_lock_test_and_set((__u64 *)&flow->target, 0);
}

#endif
