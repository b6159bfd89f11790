/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The firewall and a program that does nothing, for frames that come again and again:
 * both give the frame another source first. What was decided is counted; what becomes of
 * the frame is the run's choice, so that a filter of the stack can have it instead.
 */
#include "xdp_net.h"

#define SOURCES (1 << 20)

struct course {
	__u32 source;		/* offset of the source address */
	__u32 size;		/* of it: 4 or 16 */
	__u32 mask;		/* sources - 1; 0: the first alone */
	__u32 action;		/* what the program that does nothing answers */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct course);
} course SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SOURCES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct addr);
} sources SEC(".maps");

/* By what was decided; the last: frames so far. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} verdicts SEC(".maps");

static __always_inline int run(struct xdp_md *ctx, const bool work)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 zero = 0, seven = 7, verdict;
	struct course *c = bpf_map_lookup_elem(&course, &zero);
	__u64 *frames = bpf_map_lookup_elem(&verdicts, &seven);

	if (!c || !frames)
		return XDP_ABORTED;
	__u32 n = (*frames)++ & c->mask;
	struct addr *source = bpf_map_lookup_elem(&sources, &n);
	__be32 *at = data + (c->source & 63);

	if (!source || (void *)(at + 4) > end)
		return XDP_ABORTED;
	const __be32 *w = (const __be32 *)source;

	if (c->size == 4) {
		at[0] = w[3];
	} else {
		at[0] = w[0];
		at[1] = w[1];
		at[2] = w[2];
		at[3] = w[3];
	}
	verdict = c->action;
	if (work)
		verdict = from_card(ctx);
	verdict &= 7;
	__u64 *count = bpf_map_lookup_elem(&verdicts, &verdict);

	if (count)
		(*count)++;
	return verdict;
}

SEC("xdp.frags")
int guarded(struct xdp_md *ctx)
{
	return run(ctx, true);
}

SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
	return run(ctx, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
