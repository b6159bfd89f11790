/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * conntrack.h: connections, by one look-up for both directions.
 *
 * A connection is keyed by the two real ends: after a service address became
 * a backend, before a pod's address became the node's. It begins in
 * `half_open` and moves to `connections` with the first reply, unless it
 * begins there again.
 *
 * Who floods a pod from elsewhere takes no room of others': what comes faster
 * than the pod's budget begins in `crowd`, stays there when the pod answers (a
 * server with SYN cookies answers everything), and moves when the one who began
 * it comes again, which a forged source does not, and the budget has room.
 */
#ifndef LOCKGATE_CONNTRACK_H
#define LOCKGATE_CONNTRACK_H

#include "ct_key.h"
#include "event.h"

/* An element of an LRU map that was found may at any time be evicted by another CPU and given
 * to another key: then it bears another tag, but for one in 65,536. */
static __always_inline __u16 ct_tag(const struct ct_key *key)
{
	__u64 x = *(const __u64 *)&key->lo.b[8] * 0x9e3779b97f4a7c15ull;

	x = (x ^ x >> 32 ^ *(const __u64 *)&key->hi.b[8]) * 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 32 ^ *(const __u64 *)&key->lo_port) * 0x9e3779b97f4a7c15ull;
	return x >> 48;
}

/* The live connection that `t` belongs to, or NULL. Sets p->reply and leaves
 * the key in p->key. A SYN on a closed connection begins a new one. */
static __noinline struct ct *ct_find(struct packet *p, const struct tuple *t)
{
	bool high = ct_key_of(&p->key, t);
	struct ct *ct = bpf_map_lookup_elem(&connections, &p->key);

	p->reply = 0;
	p->table = IN_CONNECTIONS;
	if (!ct) {
		p->table = IN_HALF_OPEN;
		ct = bpf_map_lookup_elem(&half_open, &p->key);
	}
	if (!ct && is_crowded(p)) {
		p->table = IN_CROWD;
		ct = bpf_map_lookup_elem(&crowd, &p->key);
	}
	if (!ct || p->dry)
		return NULL;
	if (is_past(p, ct->seen, ct_timeout(ct, t->proto)))
		return NULL;
	if (ct->state == CT_CLOSED && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return NULL;
	p->reply = high != !!(ct->flags & CT_ORIGIN_HI);
	return ct;
}

/* A reset closes. We do not follow sequence numbers, so it may be a forged one
 * that its receiver ignores: then the receiver goes on, and so does the entry.
 * If it was true, the sender answers that with another. */
static __always_inline void ct_reset(struct ct *ct, __u8 tcp_flags, bool reply)
{
	const __u8 fins = CT_FIN_ORIGIN | CT_FIN_REPLY;

	if (tcp_flags & TCP_RST) {
		ct->state = CT_CLOSED;
		ct->flags = reply ? ct->flags | CT_RST_REPLY : ct->flags & ~CT_RST_REPLY;
	} else if (!!(ct->flags & CT_RST_REPLY) != reply && (ct->flags & fins) != fins) {
		ct->state = CT_ESTABLISHED;
	}
}

/* A packet of the connection passed: its states, by either way of the packet. */
static __always_inline void ct_follow(struct ct *ct, __u8 tcp_flags, bool reply, __u32 now)
{
	const __u8 fins = CT_FIN_ORIGIN | CT_FIN_REPLY;

	if (ct->seen != now)
		ct->seen = now;
	if (tcp_flags & TCP_FIN)
		ct->flags |= reply ? CT_FIN_REPLY : CT_FIN_ORIGIN;
	if (tcp_flags & TCP_RST || ct->state == CT_CLOSED)
		ct_reset(ct, tcp_flags, reply);
	else if ((ct->flags & fins) == fins)
		ct->state = CT_CLOSED;
	else if (ct->flags & fins && ct->state == CT_ESTABLISHED)
		ct->state = CT_CLOSING;
	else if (ct->state == CT_NEW && reply)
		ct->state = CT_ESTABLISHED;
}

/* Does the packet in hand, of a connection that was in state `was`, settle it? */
static __always_inline bool ct_settles(struct packet *p, struct ct *ct, __u8 was)
{
	if (p->table == IN_HALF_OPEN)
		return was == CT_NEW && ct->state == CT_ESTABLISHED;
	if (p->table != IN_CROWD)
		return false;
	set_crowded(p);
	return was == CT_ESTABLISHED && !p->reply && !(p->tcp_flags & (TCP_SYN | TCP_RST)) && may_settle(p);
}

/* The same, and the move into `connections`. */
static __always_inline void ct_seen(struct packet *p, struct ct *ct)
{
	__u8 was = ct->state;

	ct_follow(ct, p->tcp_flags, p->reply, p->now_s);
	if (!ct_settles(p, ct, was))
		return;
	p->fresh = *ct;
	if (p->fresh.tag != ct_tag(&p->key))
		return;	/* another's by now */
	bpf_map_update_elem(&connections, &p->key, &p->fresh, BPF_ANY);
	if (p->table == IN_HALF_OPEN)
		bpf_map_delete_elem(&half_open, &p->key);
	else
		bpf_map_delete_elem(&crowd, &p->key);
}

/* Put a word of `now` in the place of that of `was`. False: it is another by now. What tells
 * an element's owner, with its states, is one word; when it was seen and judged another. */
static __always_inline bool ct_swap(void *word, const void *was, const void *now)
{
	return __sync_val_compare_and_swap((__u64 *)word, *(const __u64 *)was, *(const __u64 *)now) ==
	       *(const __u64 *)was;
}

/* The connection was judged in this epoch. `was`: its first word before; if that changed, the
 * next packet judges again. */
static __always_inline void ct_judged(struct packet *p, struct ct *ct, __u64 was)
{
	struct { __u32 seen, epoch; } now = { p->now_s, p->epoch };

	ct_swap(&ct->seen, &was, &now);
}

/* The same two ends begin again what was closed or expired, as clients do that
 * run out of ports: the entry in `connections` begins anew where it is. That
 * spares the moves between the maps, and evicts nobody. False: they are not
 * the same, or do not talk the same way, or the entry is no longer theirs. */
static __always_inline bool ct_reopen(struct ct *past, const struct ct *ct)
{
	const __u8 lasting = CT_ORIGIN_HI | CT_EXEMPT | CT_NAT_ORIGIN | CT_NAT_REPLY;
	struct ct was = *past;

	if ((was.flags ^ ct->flags) & lasting || was.tag != ct->tag || was.src_endpoint != ct->src_endpoint ||
	    was.dst_endpoint != ct->dst_endpoint || was.target[0] != ct->target[0] ||
	    was.target[1] != ct->target[1] || was.service != ct->service)
		return false;
	if (!ct_swap(&past->state, &was.state, &ct->state))
		return false;
	ct_swap(&past->seen, &was.seen, &ct->seen);	/* or the next packet judges again */
	return true;
}

/* Remember a connection begun by `t`, whose flags, ends and targets are in
 * p->fresh. */
static __always_inline void ct_begin(struct packet *p, const struct tuple *t)
{
	struct ct *ct = &p->fresh;

	if (p->dry)
		return;
	ct->seen = p->now_s;
	ct->epoch = p->epoch;
	ct->state = CT_NEW;
	if (ct_key_of(&p->key, t))
		ct->flags |= CT_ORIGIN_HI;
	ct->tag = ct_tag(&p->key);
	ct->spare[0] = ct->spare[1] = 0;
	ct->service = p->service;
	count(COUNT_FORWARDED);
	struct ct *past = bpf_map_lookup_elem(&connections, &p->key);

	if (past && ct_reopen(past, ct))
		return;
	if (past)	/* would hide the new entry */
		bpf_map_delete_elem(&connections, &p->key);
	if (p->place == PLACE_FROM_POD || p->own_socket || may_settle(p)) {
		bpf_map_update_elem(&half_open, &p->key, ct, BPF_ANY);
		return;
	}
	count(COUNT_CROWDED);
	set_crowded(p);
	bpf_map_delete_elem(&half_open, &p->key);	/* likewise */
	bpf_map_update_elem(&crowd, &p->key, ct, BPF_ANY);
}

static __always_inline void ct_forget(struct packet *p)
{
	bpf_map_delete_elem(&connections, &p->key);
	bpf_map_delete_elem(&half_open, &p->key);
	if (p->table == IN_CROWD)
		bpf_map_delete_elem(&crowd, &p->key);
}

#endif
