/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * bits.h: what is in a table, as bits by hash (Bloom 1970, with one hash). Where the bit is
 * not set it is not there, which spares XDP most look-ups; where it is, it may be. The agent
 * sets them (lockgate/agent/bits.py has the same hashes), before what is added is in force.
 */
#ifndef LOCKGATE_BITS_H
#define LOCKGATE_BITS_H

#include "balance.h"

static __always_inline bool is_set(void *map, __u32 number)
{
	__u32 word = number >> 6;
	__u64 *bits = bpf_map_lookup_elem(map, &word);

	return bits && *(volatile __u64 *)bits >> (number & 63) & 1;
}

/* `addr` is 8-byte aligned. */
static __always_inline bool may_be_peer(const struct addr *addr)
{
	const __u64 *w = (const __u64 *)addr;
	__u64 x = w[0] * HASH_MULTIPLIER;

	x = (x ^ x >> 32 ^ w[1]) * HASH_MULTIPLIER;
	return is_set(&peer_bits, x >> (64 - PEER_BITS));
}

/* Of a packet's destination. */
static __always_inline __u64 frontend_hash(const struct tuple *t)
{
	const __u64 *w = (const __u64 *)&t->daddr;
	__u64 x = w[0] * HASH_MULTIPLIER;

	return (x ^ x >> 32 ^ w[1] ^ (__u64)t->dport << 8 ^ t->proto) * HASH_MULTIPLIER;
}

/* Is there perhaps a frontend? No harm where a bit is missing: from_net knows. */
static __always_inline bool may_be_frontend(__u64 hash)
{
	return is_set(&frontend_bits, hash >> (64 - FRONTEND_BITS));
}

#endif
