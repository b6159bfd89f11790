/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What bpf/frame.h makes of a frame, for tests to look at. */
#include "frame.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame);
} frames SEC(".maps");

SEC("xdp.frags")
int read_frame(struct xdp_md *ctx)
{
	struct frame frame = {};
	__u32 zero = 0;

	frame_read(ctx, &frame);
	bpf_map_update_elem(&frames, &zero, &frame, BPF_ANY);
	return XDP_PASS;
}

/* Their names, for the object's BTF. */
const volatile enum frame_kind frame_kind = 0;
char LICENSE[] SEC("license") = "Dual BSD/GPL";
