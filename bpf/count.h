/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* count.h: totals, per CPU, by enum counter. */
#ifndef LOCKGATE_COUNT_H
#define LOCKGATE_COUNT_H

#include "maps.h"

static __always_inline void count_many(__u32 counter, __u64 many)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &counter);

	if (n)
		*n += many;
}

static __always_inline void count(__u32 counter)
{
	count_many(counter, 1);
}

#endif
