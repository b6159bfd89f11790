/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bucket.h: token buckets in one word each. */
#ifndef LOCKGATE_BUCKET_H
#define LOCKGATE_BUCKET_H

#include "config.h"

/* What may come at once after a pause: a quarter of a second's worth. */
#define BURST_NS 250000000ull

/* A bucket is the time when it will be full again less BURST_NS: each token taken
 * moves it on by the time that one takes to come back (the GCRA of ATM). All CPUs
 * share it; when two fill it at once, one token is not paid.
 * May one more pass, where one in `every` nanoseconds is allowed? 0 = any. */
static __always_inline bool take(__u64 *bucket, __u64 now, __u64 every)
{
	__u64 paid_until = *(volatile __u64 *)bucket;

	if (!every)
		return true;
	if (paid_until > now)
		return false;
	if (paid_until + BURST_NS < now)
		*(volatile __u64 *)bucket = now - BURST_NS + every;
	else
		__sync_fetch_and_add(bucket, every);
	return true;
}

#endif
