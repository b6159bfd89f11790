/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * limit.h: how much of what all pods share one pod may use up in a second:
 * token buckets by endpoint slot. Nothing of a known connection asks them.
 */
#ifndef LOCKGATE_LIMIT_H
#define LOCKGATE_LIMIT_H

#include "bucket.h"
#include "packet.h"

struct budget {
	__u64 answers;		/* ICMP errors and resets that we send */
	__u64 connections;	/* that it begins */
	__u64 events;
	__u64 fragments;	/* packets in fragments, from it and to it */
	__u64 arrivals;		/* connections to it, begun elsewhere */
	__u32 crowded;		/* when `crowd` was last used for it, in seconds; 0 = never */
} __attribute__((aligned(64)));	/* CPUs at work for other pods write to others */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_ENDPOINTS + 1);		/* the last: packets of no pod */
	__type(key, __u32);
	__type(value, struct budget);
} budgets SEC(".maps");

/* The budgets of the pod in a slot, or those of no pod; NULL never comes. */
static __always_inline struct budget *budget_at(__u32 slot)
{
	if (slot > MAX_ENDPOINTS)
		slot = MAX_ENDPOINTS;
	return bpf_map_lookup_elem(&budgets, &slot);
}

/* Those of the pod that the packet is to or from. */
static __always_inline struct budget *budget_of(struct packet *p)
{
	return budget_at(p->slot);
}

/* May one more connection to the pod, begun elsewhere, take room that others need? */
static __always_inline bool may_settle(struct packet *p)
{
	struct budget *budget = budget_of(p);

	return !budget || take(&budget->arrivals, now_ns(), config_connection_ns);
}

/* Can connections of the pod be in `crowd`? */
static __always_inline bool is_crowded(struct packet *p)
{
	struct budget *budget = budget_of(p);

	return budget && budget->crowded && !is_past(p, budget->crowded, TIMEOUT_DATAGRAM);
}

static __always_inline void set_crowded(struct packet *p)
{
	struct budget *budget = budget_of(p);

	if (budget && budget->crowded != p->now_s)
		budget->crowded = p->now_s;
}

#endif
