/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * conntrack.h: connections, by one look-up for both directions.
 *
 * A connection is keyed by the two real ends: after a service address became
 * a backend, before a pod's address became the node's. It begins in
 * `half_open` and moves to `connections` with the first reply.
 */
#ifndef LOCKGATE_CONNTRACK_H
#define LOCKGATE_CONNTRACK_H

#include "event.h"

/* True when the sender of `t` is the higher end of the key. The order is of
 * the bytes as they lie in memory: any total order will do. */
static __always_inline bool ct_key_of(struct ct_key *key, const struct tuple *t)
{
	const __u64 *s = (const __u64 *)&t->saddr, *d = (const __u64 *)&t->daddr;
	bool high;

	if (s[1] != d[1])
		high = s[1] > d[1];
	else if (s[0] != d[0])
		high = s[0] > d[0];
	else
		high = t->sport > t->dport;
	copy_addr(&key->lo, high ? &t->daddr : &t->saddr);
	copy_addr(&key->hi, high ? &t->saddr : &t->daddr);
	*(__u64 *)&key->lo_port = high ? ends_of(t->dport, t->sport, t->proto)
				       : ends_of(t->sport, t->dport, t->proto);
	return high;
}

static __always_inline __u32 ct_timeout(const struct ct *ct, __u8 proto)
{
	if (ct->state == CT_NEW)
		return timeout_half_open;
	if (ct->state == CT_CLOSED)
		return timeout_closed;
	return proto == IPPROTO_TCP || proto == IPPROTO_SCTP ? timeout_established : timeout_datagram;
}

/* The live connection that `t` belongs to, or NULL. Sets p->reply and leaves
 * the key in p->key. A SYN on a closed connection begins a new one. */
static __noinline struct ct *ct_find(struct packet *p, const struct tuple *t)
{
	bool high = ct_key_of(&p->key, t);
	struct ct *ct = bpf_map_lookup_elem(&connections, &p->key);

	p->reply = 0;
	if (!ct)
		ct = bpf_map_lookup_elem(&half_open, &p->key);
	if (!ct || p->dry)
		return NULL;
	if (p->now_s - ct->seen > ct_timeout(ct, t->proto))
		return NULL;
	if (ct->state == CT_CLOSED && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return NULL;
	p->reply = high != !!(ct->flags & CT_ORIGIN_HI);
	return ct;
}

/* A packet of the connection passed: states, FIN and RST, and the move out
 * of the half-open map. An ICMP error changes nothing. */
static __always_inline void ct_seen(struct packet *p, struct ct *ct)
{
	if (ct->seen != p->now_s)
		ct->seen = p->now_s;
	if (p->tcp_flags & TCP_FIN)
		ct->flags |= p->reply ? CT_FIN_REPLY : CT_FIN_ORIGIN;
	if (p->tcp_flags & TCP_RST)
		ct->state = CT_CLOSED;
	else if ((ct->flags & (CT_FIN_ORIGIN | CT_FIN_REPLY)) == (CT_FIN_ORIGIN | CT_FIN_REPLY))
		ct->state = CT_CLOSED;
	else if (ct->flags & (CT_FIN_ORIGIN | CT_FIN_REPLY) && ct->state == CT_ESTABLISHED)
		ct->state = CT_CLOSING;
	if (ct->state == CT_NEW && p->reply) {
		p->fresh = *ct;
		p->fresh.state = CT_ESTABLISHED;
		bpf_map_update_elem(&connections, &p->key, &p->fresh, BPF_ANY);
		bpf_map_delete_elem(&half_open, &p->key);
	}
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
	ct->pad = 0;
	ct->service = p->service;
	/* A closed or expired predecessor would hide the new entry. */
	bpf_map_delete_elem(&connections, &p->key);
	bpf_map_update_elem(&half_open, &p->key, ct, BPF_ANY);
	count(COUNT_FORWARDED);
}

static __always_inline void ct_forget(struct packet *p)
{
	bpf_map_delete_elem(&connections, &p->key);
	bpf_map_delete_elem(&half_open, &p->key);
}

#endif
