/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * maps.h: every map, with its default size. The loader may set other sizes
 * before loading; the agent pins each map under its name here.
 */
#ifndef LOCKGATE_MAPS_H
#define LOCKGATE_MAPS_H

#include "config.h"

/* ---- What the agent publishes ------------------------------------------------ */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct node_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct last_ids);
} ids SEC(".maps");

/* The agent puts an image of the size it needs in here: BPF_F_INNER_MAP
 * lets inner maps differ in max_entries. */
struct image {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__type(key, __u32);
	__type(value, __u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct image);
} images SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct peer);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

/* 30,000 services with two ports and both families: six keys each. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct backend_key);
	__type(value, struct backend_state);
} service_backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_HOPS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct hop);
} hops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct route_key);
	__type(value, __u32);
} routes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
} link_roles SEC(".maps");

/* Bits that say what cannot be in `peers`, and no frontend for XDP (bits.h). */
#define PEER_BITS     20
#define FRONTEND_BITS 16

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << (PEER_BITS - 6));
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} peer_bits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << (FRONTEND_BITS - 6));
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} frontend_bits SEC(".maps");

/* ---- What the programs remember ---------------------------------------------- */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 524288);
	__type(key, struct ct_key);
	__type(value, struct ct);
} connections SEC(".maps");

/* Apart from `connections`, so that a flood of first packets evicts only
 * other first packets. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct ct_key);
	__type(value, struct ct);
} half_open SEC(".maps");

/* Apart from both: what comes to a pod faster than its share, until the one who
 * began it was answered and came again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct ct_key);
	__type(value, struct ct);
} crowd SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct tuple);
	__type(value, struct nat);
} nat SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct frag_key);
	__type(value, struct frag);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct socket_key);
	__type(value, struct socket_peer);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinities SEC(".maps");

/* Outside clients' flows and the backend that each has: memory of UDP, a shortcut
 * for TCP (docs/services.md). No hash map: a look-up of one costs XDP as much as
 * half of all that it does for a packet. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct flow_set);
} flows SEC(".maps");

/* For FLOW_TAG_SETS elements of `flows` one: of each flow's hash the highest 8 bits, in a byte
 * of its own. Who has others is not there. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096 / FLOW_TAG_SETS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} flow_tags SEC(".maps");

/* The sockets that ever asked for a service: spares all others the look-up in
 * `sockets` with each connection. Ends with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} askers SEC(".maps");

/* ---- What the programs tell -------------------------------------------------- */

/* One record type per ring: struct event, struct event_raw. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events_raw SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* ---- Reading a view ---------------------------------------------------------- */

/* Read once per packet; the view is epoch & 1. 0 = nothing published yet. */
static __always_inline __u32 node_epoch(void)
{
	__u32 zero = 0;
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);

	return node ? *(volatile __u32 *)&node->epoch : 0;
}

/* The verdict image of the epoch's view, or NULL. */
static __always_inline void *image_of(__u32 epoch)
{
	__u32 view = epoch & 1;

	return bpf_map_lookup_elem(&images, &view);
}

/* A hop as the epoch has it, or NULL. */
static __always_inline struct hop_view *hop_of(__u32 epoch, __u32 index)
{
	struct hop *hop = bpf_map_lookup_elem(&hops, &index);

	return hop ? &hop->view[epoch & 1] : NULL;
}

/* What the link at this hook leads to, or 0. */
static __always_inline __u32 role_of(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	__u32 *role = bpf_map_lookup_elem(&link_roles, &ifindex);

	return role ? *role : 0;
}

/* Word of an image, or NULL beyond its end. `image` is not NULL. */
static __always_inline __u64 *image_word(void *image, __u32 index)
{
	return bpf_map_lookup_elem(image, &index);
}

#endif
