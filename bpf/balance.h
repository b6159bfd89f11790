/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * balance.h: which backend serves a client outside the cluster. A function of
 * the packet and of what the API says, and so the same on every node: see
 * docs/services.md. Shared by XDP and tcx.
 */
#ifndef LOCKGATE_BALANCE_H
#define LOCKGATE_BALANCE_H

#include "maps.h"

#define HASH_MULTIPLIER 0x9e3779b97f4a7c15ull

static __always_inline __u64 fold(__u64 x)
{
	return x ^ x >> 32;
}

/* lockgate/compile/balance.py has the same function. `t` as on the wire, client to
 * frontend, 8-byte aligned, with its padding zero. All that differs between flows goes through
 * two products at least: the low bits say the slot, and one client's ports count up. */
static __always_inline __u32 flow_hash(const struct tuple *t)
{
	const __u64 *w = (const __u64 *)t;
	__u64 client = (fold(w[0] * HASH_MULTIPLIER) ^ w[1]) * HASH_MULTIPLIER;
	__u64 frontend = (fold(w[2] * HASH_MULTIPLIER) ^ w[3]) * HASH_MULTIPLIER;
	__u64 ports = (fold(client) ^ w[4]) * HASH_MULTIPLIER;

	return (fold(ports) ^ fold(frontend)) * HASH_MULTIPLIER >> 32;
}

/* The owners of the slot of a flow, for owner_at(). */
static __always_inline __u64 owners_of(void *image, const struct service_view *view, __u32 hash)
{
	__u32 bit = (hash & ((1u << (view->slot_bits & 31)) - 1)) * OWNERS * view->number_bits;
	__u64 *word = image_word(image, view->table + bit / 64);

	return word ? *word >> bit % 64 : 0;
}

/* The owner of that rank, from 0. False: there is none. */
static __always_inline bool owner_at(void *image, const struct service_view *view, __u64 owners, __u32 rank,
				     struct owner *owner)
{
	__u32 bits = view->number_bits & 31;
	__u32 number = owners >> rank * bits & ((1u << bits) - 1);
	__u32 at = view->owners + number * BACKEND_WORDS;
	__u64 *high = image_word(image, at), *low = image_word(image, at + 1), *rest = image_word(image, at + 2);

	if (number >= view->owner_count || !high || !low || !rest)
		return false;
	((__u64 *)owner)[0] = *high;
	((__u64 *)owner)[1] = *low;
	((__u64 *)owner)[2] = *rest;
	return true;
}

#endif
