/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * XDP's program and one that does nothing, for frames that come again and again: both
 * write the frame anew first, for live frames have what the last run left, and give it
 * another client. Both send it back, whatever was decided; that is counted.
 */
#include "xdp_net.h"

#define HEAD 80

struct course {
	__u8 head[HEAD];	/* of the frame */
	__u32 client;		/* offset of the last two bytes of its source address */
	__u32 ports;		/* and of its ports */
	__u32 mask;		/* clients - 1, or all ones: always another */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct course);
} course SEC(".maps");

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
	__u32 zero = 0, seven = 7, verdict = XDP_TX;
	struct course *c = bpf_map_lookup_elem(&course, &zero);
	__u64 *frames = bpf_map_lookup_elem(&verdicts, &seven);

	if (!c || !frames || data + HEAD > end)
		return XDP_ABORTED;
	for (int i = 0; i < HEAD / 8; i++)
		((__u64 *)data)[i] = ((__u64 *)c->head)[i];
	__u32 n = (*frames)++ & c->mask;
	__be16 *client = data + (c->client & 63), *ports = data + (c->ports & 63);

	if ((void *)(client + 1) > end || (void *)(ports + 1) > end)
		return XDP_ABORTED;
	*client = bpf_htons(n >> 16);
	*ports = bpf_htons(n);
	if (work)
		verdict = from_card(ctx) & 7;
	__u64 *count = bpf_map_lookup_elem(&verdicts, &verdict);

	if (count)
		(*count)++;
	return XDP_TX;
}

SEC("xdp.frags")
int balanced(struct xdp_md *ctx)
{
	return run(ctx, true);
}

SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
	return run(ctx, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
