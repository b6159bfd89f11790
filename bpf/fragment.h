/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fragment.h: only the first fragment has ports. It leaves them to those that
 * come later.
 */
#ifndef LOCKGATE_FRAGMENT_H
#define LOCKGATE_FRAGMENT_H

#include "limit.h"

static __always_inline struct frag_key *frag_key(struct packet *p)
{
	struct tuple *t = &p->wire;
	struct frag_key *key = (void *)p->bytes;

	key->saddr = t->saddr;
	key->daddr = t->daddr;
	key->id = p->frag_id;
	key->proto = t->proto;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
	return key;
}

/* Later fragments take the ports that the first left. */
static __noinline int take_ports(struct packet *p)
{
	struct frag *first = bpf_map_lookup_elem(&fragments, frag_key(p));

	if (!first || is_past(p, first->seen, TIMEOUT_FRAGMENT))
		return GIVE_UP(p, CAUSE_FRAGMENT_UNTRACKED);
	p->wire.sport = first->sport;
	p->wire.dport = first->dport;
	return 0;
}

/* The first leaves them, once its source is known to be true: else one pod could say what the
 * pieces of another's packets are. False: over the budget of the pod in `slot`. */
static __noinline int leave_ports(struct packet *p, __u32 slot)
{
	struct frag ports = { .sport = p->wire.sport, .dport = p->wire.dport, .seen = p->now_s };
	struct budget *budget = budget_at(slot);

	if (p->dry)
		return 1;
	if (budget && !take(&budget->fragments, now_ns(), config_fragment_ns)) {
		GIVE_UP(p, CAUSE_FRAGMENT_RATE);
		return 0;
	}
	bpf_map_update_elem(&fragments, frag_key(p), &ports, BPF_ANY);
	return 1;
}

#endif
