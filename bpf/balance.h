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

/* lockgate/compile/balance.py has the same function. `t` as on the wire, client to
 * frontend, 8-byte aligned, with its padding zero. */
static __always_inline __u32 flow_hash(const struct tuple *t)
{
	const __u64 *w = (const __u64 *)t;
	__u64 x = w[0] * HASH_MULTIPLIER;

	x = (x ^ x >> 32 ^ w[1]) * HASH_MULTIPLIER;
	x = (x ^ x >> 32 ^ w[2]) * HASH_MULTIPLIER;
	x = (x ^ x >> 32 ^ w[3]) * HASH_MULTIPLIER;
	x = (x ^ x >> 32 ^ w[4]) * HASH_MULTIPLIER;
	return x >> 32;
}

/* The owners of the slot of a flow: OWNERS numbers, the first in the lowest bits.
 * All ones where the view has no table. */
static __always_inline __u64 owners_of(void *image, const struct service_view *view, __u32 hash)
{
	__u64 *slot = image_word(image, view->table + (hash & ((1u << (view->slot_bits & 31)) - 1)));

	return slot && view->owner_count ? *slot : ~0ull;
}

/* Owner number `number` of the view. False: the image has none there. */
static __always_inline bool owner_at(void *image, const struct service_view *view, __u32 number, struct owner *owner)
{
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
