/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The verdict of verdict.h, timed in the kernel: a loop over questions that were
 * put into an array, and the same loop without the verdict.
 */
#include "verdict.h"

#define QUESTIONS 65536

struct question {
	struct tuple tuple;
	__u32 slot;		/* of the pod it is for, as from_net has it by then */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, QUESTIONS);
	__type(key, __u32);
	__type(value, struct question);
} questions SEC(".maps");

struct result {
	__u64 ns;
	__u64 allowed;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct result);
} result SEC(".maps");

static __always_inline struct packet *ready(__u32 index, __u32 mask)
{
	__u32 zero = 0, question = index & mask;
	struct packet *p = bpf_map_lookup_elem(&packets, &zero);
	struct question *q = bpf_map_lookup_elem(&questions, &question);

	if (!p || !q)
		return NULL;
	p->tuple = q->tuple;
	p->slot = q->slot;
	return p;
}

static long with_verdict(__u32 index, __u32 *mask)
{
	struct packet *p = ready(index, *mask);
	__u32 zero = 0;
	struct result *r = bpf_map_lookup_elem(&result, &zero);

	if (!p || !r)
		return 1;
	r->allowed += judge(p, &p->tuple);
	return 0;
}

static long without(__u32 index, __u32 *mask)
{
	struct packet *p = ready(index, *mask);
	__u32 zero = 0;
	struct result *r = bpf_map_lookup_elem(&result, &zero);

	if (!p || !r)
		return 1;
	r->allowed += p->tuple.proto & 1;
	return 0;
}

/* mark: 1 = with the verdict; cb[0]: mask of question numbers (0 = always the first) */
SEC("tc")
int verdicts(struct __sk_buff *skb)
{
	__u32 zero = 0, mask = skb->cb[0] & (QUESTIONS - 1);
	struct packet *p = packet_begin(skb, PLACE_FROM_NET);
	struct result *r = bpf_map_lookup_elem(&result, &zero);
	__u64 begin;

	if (!p || !r)
		return TCX_DROP;
	r->allowed = 0;
	begin = bpf_ktime_get_ns();
	if (skb->mark == 1)
		bpf_loop(QUESTIONS, with_verdict, &mask, 0);
	else
		bpf_loop(QUESTIONS, without, &mask, 0);
	r->ns = bpf_ktime_get_ns() - begin;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
