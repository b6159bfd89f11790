/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * connection.h: what every hook does with a parsed packet: find its
 * connection or begin one, judge when that is due, and forward.
 */
#ifndef LOCKGATE_CONNECTION_H
#define LOCKGATE_CONNECTION_H

#include "arrive.h"
#include "forward.h"
#include "frontend.h"
#include "related.h"
#include "service.h"
#include "verdict.h"

static __always_inline int deny(struct __sk_buff *skb, struct packet *p)
{
	tell_verdicts(skb, p);
	GIVE_UP(p, CAUSE_POLICY);
	return drop(skb, p);
}

static __always_inline bool masquerades(struct packet *p)
{
	__u32 index = target_index(p->target);

	if (p->place != PLACE_FROM_POD || target_kind(p->target) != TO_HOP)
		return false;
	struct hop_view *hop = hop_of(p->epoch, index);

	return hop && hop->flags & HOP_MASQ && !(hop->flags & HOP_DROP);
}

/* May the new connection pass? Fills ends, cells and flags. */
static __always_inline bool admit(struct __sk_buff *skb, struct packet *p, __u8 *flags)
{
	/* The originator as it is, also when a hairpin hides it. */
	p->tuple = p->now;
	p->tuple.saddr = p->wire.saddr;
	bool allowed = judge(p, &p->tuple);

	/* A frontend's client was looked at: see is_believed(). */
	if (p->place == PLACE_FROM_NET && !(*flags & CT_SERVICE) &&
	    (is_ours(p->src_target) || !comes_by(skb, p, p->src_target))) {
		p->judged = 0;
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return false;
	}
	/* The pod at this hook is not published (yet, or any more) under the
	 * address: nothing was judged for it. */
	if ((p->place == PLACE_FROM_POD && p->src_slot != p->slot) ||
	    (p->place == PLACE_TO_POD && p->dst_slot != p->slot && !p->own_socket)) {
		p->judged = 0;
		GIVE_UP(p, CAUSE_NOT_READY);
		return false;
	}
	if (p->place == PLACE_TO_POD && p->own_socket) {
		*flags |= CT_EXEMPT;
		p->judged = 1 << DIR_INGRESS;
		p->ingress_cell = p->ingress_pending = CELL_ALLOW;
		return true;
	}
	if (p->src_slot != NO_SLOT && p->src_slot == p->dst_slot)
		*flags |= CT_EXEMPT;
	return allowed;
}

/* A pod that begins more than its share would push other pods' half-open
 * connections out before they are answered. */
static __always_inline bool may_begin(struct packet *p)
{
	struct budget *budget = budget_of(p);

	if (p->place != PLACE_FROM_POD || p->dry || !budget ||
	    take(&budget->connections, now_ns(), config_connection_ns))
		return true;
	GIVE_UP(p, CAUSE_NEW_CONNECTION_RATE);
	return false;
}

/* The client's connection p->now becomes one of this node's own, to the backend. */
static __noinline int leave_as_node(struct packet *p)
{
	__u32 index = target_index(p->target);
	struct hop_view *hop = hop_of(p->epoch, index);

	if (hop && target_kind(p->target) == TO_HOP && !(hop->flags & HOP_DROP))
		return masquerade(p, &p->wire, hop);
	GIVE_UP(p, CAUSE_NO_ROUTE);
	return 0;
}

/* A packet of no known connection whose services are resolved: verdict,
 * entry, way out. `flags`: enum ct_flag bits found so far. This, judge(), related() and
 * forward() are global, so that the verifier walks them once and not on every way there. */
__noinline int begin(struct __sk_buff *skb, struct packet *p, __u32 found)
{
	__u8 flags = found;

	if (!p)
		return TCX_DROP;

	p->reply = 0;
	if (!admit(skb, p, &flags))
		return p->cause ? drop(skb, p) : deny(skb, p);
	if (!may_begin(p))
		return drop(skb, p);
	p->target = p->place == PLACE_TO_POD ? target_of(TO_LOCAL, p->slot)
					     : way_to(p->dst_target, &p->now.daddr);
	if (flags & CT_NAT_REPLY && !(p->snat ? leave_as_node(p) : remember_service(p)))
		return drop(skb, p);
	tell_verdicts(skb, p);
	if (p->dry)
		return forward(skb, p);
	if (masquerades(p))
		flags |= CT_NAT_ORIGIN;
	if (!(p->tcp_flags & TCP_RST)) {
		p->fresh.flags = flags;
		p->fresh.src_endpoint = p->src_endpoint;
		p->fresh.dst_endpoint = p->dst_endpoint;
		p->fresh.target[0] = p->target;
		p->fresh.target[1] = p->place == PLACE_TO_POD ? target_of(TO_HOST, 0)
							      : way_to(p->src_target, &p->wire.saddr);
		ct_begin(p, &p->now);
	}
	if (flags & CT_NAT_ORIGIN) {
		__u32 index = target_index(p->target);
		struct hop_view *hop = hop_of(p->epoch, index);

		if (!hop || !masquerade(p, &p->now, hop)) {
			ct_forget(p);
			return drop(skb, p);
		}
	}
	return forward(skb, p);
}

#define UNKNOWN (-2)		/* it is not done with */

/* A packet in another node's name than sent it: an answer, or dropped. */
__noinline int of_a_third(struct __sk_buff *skb, struct packet *p, struct ct *ct)
{
	if (!p)
		return TCX_DROP;
	if (ct && answers_for_another(p, ct))
		return UNKNOWN;
	if (!ct && answers_for_the_stack(p))
		return TCX_NEXT;
	GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
	return drop(skb, p);
}

/* What a service refuses is told, and what it keeps to some clients dropped. */
static __always_inline int unserved(struct __sk_buff *skb, struct packet *p)
{
	if (p->cause == CAUSE_SOURCE_RANGE || p->cause == CAUSE_NO_LOCAL_BACKEND)
		return drop(skb, p);
	return drop_and_tell(skb, p, refuse(skb, p));
}

enum again {
	STANDS = 0,		/* the entry holds, in the new epoch too */
	BEGINS = 1,		/* forgotten: begin a new connection with p->now */
	ENDS   = 2,		/* denied, until a verdict says otherwise */
	UNSERVED = 3,		/* its service has no backend left */
	AFRESH   = 4,		/* an end is somebody else now: as if it were unknown */
};

/* Is it a client's connection that this node has with the backend in its stead? */
static __always_inline bool is_snat(const struct ct *ct)
{
	return (ct->flags & (CT_SERVICE | CT_NAT_REPLY)) == (CT_SERVICE | CT_NAT_REPLY) &&
	       target_kind(ct->target[0]) == TO_HOP && target_kind(ct->target[1]) == TO_HOP;
}

/* Put its client in p->tuple's source. */
static __always_inline void whose(struct packet *p)
{
	struct nat *back = p->reply ? bpf_map_lookup_elem(&nat, &p->now) : NULL;

	if (!p->reply)
		p->tuple.saddr = p->wire.saddr;
	else if (back)
		p->tuple.saddr = back->to.daddr;
}

/* The node's state moved on since the connection was judged: judge again. */
static __noinline int judge_again(struct __sk_buff *skb, struct packet *p, struct ct *ct, __u8 *flags)
{
	__u8 reply = p->reply;

	if (!flags || !ct)
		return STANDS;
	__u64 judged = *(volatile __u64 *)&ct->seen;	/* and when */

	p->service = ct->service;
	if (!reply && p->place == PLACE_FROM_POD && ct->flags & CT_SERVICE) {
		int moved = service_again(p, service_asked(skb, p), ct->service, flags);

		if (moved != NOT_A_SERVICE) {
			ct_forget(p);
			return moved == TRANSLATED ? BEGINS : UNSERVED;
		}
	}
	if (!reply && p->place == PLACE_FROM_NET && ct->flags & CT_SERVICE && p->now.proto == IPPROTO_UDP &&
	    !backend_live(p->epoch, ct->service, &p->now.daddr, p->now.dport, IPPROTO_UDP)) {
		ct_forget(p);
		bpf_map_delete_elem(&nat, &p->wire);
		return AFRESH;	/* another backend serves it */
	}
	if (reply)
		reverse_of(&p->tuple, &p->now);
	else
		p->tuple = p->now;
	if (is_snat(ct))
		whose(p);
	bool allowed = judge(p, &p->tuple);
	bool exempt = ct->flags & CT_EXEMPT;

	/* A hairpin hides its originator behind the service's address. */
	if (p->dst_endpoint != ct->dst_endpoint || (!exempt && p->src_endpoint != ct->src_endpoint)) {
		ct_forget(p);
		return AFRESH;
	}
	if (exempt) {
		ct_judged(p, ct, judged);
		return STANDS;
	}
	/* The entry stays, of an old epoch: forgotten, the next packet of the
	 * responder would begin a connection the other way round, as whose reply
	 * the originator's packets pass. */
	if (!allowed) {
		if (!reply || (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
			return ENDS;
		ct_forget(p);	/* a connection of the responder's own */
		return AFRESH;
	}
	if (target_kind(ct->target[1]) != TO_HOST) {
		ct->target[0] = way_to(p->dst_target, &p->tuple.daddr);
		ct->target[1] = way_to(p->src_target, &p->tuple.saddr);
	}
	ct_judged(p, ct, judged);
	return STANDS;
}

/* The translation was evicted: another, from the same port if that is free. */
static __noinline int masquerade_again(struct packet *p)
{
	__u32 index = target_index(p->target);
	struct hop_view *hop = hop_of(p->epoch, index);

	if (hop)
		return masquerade(p, &p->now, hop);
	GIVE_UP(p, CAUSE_NAT_FAILED);
	return 0;
}

/* The translation of the answers to p->now was evicted, maybe, and that of what is asked was not:
 * another, so that they go on. Once a second. */
static __noinline int answer_again(struct packet *p)
{
	if (!p || same_ends(&p->wire, &p->now))
		return 0;
	reverse_of(&p->tuple, &p->now);
	if (bpf_map_lookup_elem(&nat, &p->tuple))
		return 0;
	reverse_of(&p->inner, &p->wire);
	nat_add(p, &p->tuple, &p->inner, BPF_NOEXIST);
	return 1;
}

/* A packet of a known connection. */
static __always_inline int known(struct __sk_buff *skb, struct packet *p, struct ct *ct)
{
	if (p->place == PLACE_FROM_NET && !p->outer_size && sent_here(p, ct)) {
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return drop(skb, p);
	}
	if (ct->epoch != p->epoch) {
		__u8 flags = 0;

		switch (judge_again(skb, p, ct, &flags)) {
		case BEGINS:
			return begin(skb, p, flags);
		case ENDS:
			return deny(skb, p);
		case UNSERVED:
			return unserved(skb, p);
		case AFRESH:
			p->now = p->wire;
			p->reply = p->service = 0;
			return UNKNOWN;
		}
	}
	if (p->place == PLACE_FROM_NET && !p->outer_size && !comes_by(skb, p, ct->target[!p->reply]) &&
	    !answers_for_another(p, ct) && !(ct->flags & CT_SERVICE && is_between_nodes(p))) {
		p->judged = 0;
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return drop(skb, p);
	}
	p->target = ct->target[p->reply & 1];
	if (!p->reply && ct->flags & CT_NAT_REPLY && ct->seen != p->now_s)
		answer_again(p);
	if (ct->flags & (p->reply ? CT_NAT_REPLY : CT_NAT_ORIGIN)) {
		struct nat *next = nat_find(p, &p->now);

		if (next) {
			p->now = next->to;
		} else if (p->reply) {
			GIVE_UP(p, CAUSE_NAT_FAILED);	/* until its originator says more */
			return drop(skb, p);
		} else if (!masquerade_again(p)) {
			return drop(skb, p);
		}
	}
	ct_seen(p, ct);
	return forward(skb, p);
}

/* The slot of the pod of this node whose packet it is. */
static __always_inline __u32 pod_of(struct packet *p, struct ct *ct)
{
	__u32 target = ct ? ct->target[p->reply & 1] : 0;

	return p->slot == NO_SLOT && target_kind(target) == TO_LOCAL ? target_index(target) : p->slot;
}

/* From the parsed packet to its verdict and way out. */
static __always_inline int connection(struct __sk_buff *skb, struct packet *p, const enum place place)
{
	if (p->icmp_error && !p->dry) {
		int relation = related(skb, p);

		if (relation < 0)
			return drop(skb, p);
		if (relation)
			return forward(skb, p);
	}
	/* The stack of a node, and of others, would believe it about sockets and paths that
	 * the pod has no part in: UDP, and so VXLAN, knows no sequence numbers. */
	if (place == PLACE_FROM_POD && speaks_of_another(p)) {
		GIVE_UP(p, CAUSE_UNRELATED_ERROR);
		return drop(skb, p);
	}
	struct ct *ct = find_connection(skb, p, &p->wire);
	const bool from_net = place == PLACE_FROM_NET;
	bool to_pod = false;
	__u8 flags = 0;

	if (from_net && ct && p->outer_size && !is_inside(p, ct)) {
		GIVE_UP(p, CAUSE_NO_FRONTEND);
		return drop(skb, p);
	}
	if (from_net && p->third) {
		int answer = of_a_third(skb, p, ct);

		if (answer != UNKNOWN)
			return answer;
	}
	if (!ct && from_net && !p->outer_size) {
		to_pod = for_a_pod(p);
		if (to_pod && is_crowded(p))	/* as was not known before */
			ct = ct_find(p, &p->wire);
	}
	if (p->fragment == FRAG_FIRST && (ct || to_pod || !from_net) && !leave_ports(p, pod_of(p, ct)))
		return drop(skb, p);
	if (ct) {
		int verdict = known(skb, p, ct);

		if (verdict != UNKNOWN)
			return verdict;
		if (from_net && !p->outer_size)
			to_pod = for_a_pod(p);
	}
	if (from_net && !to_pod) {
		int answer = frontend(skb, p);

		if (answer == GO_STACK)
			return for_the_stack(skb, p);
		if (answer != GO_BEGIN)
			return answer;
		flags = CT_NAT_REPLY | CT_SERVICE;
	}
	if (place == PLACE_FROM_POD) {
		int answer = service_begin(skb, p, &flags);

		if (answer == REFUSED)
			return unserved(skb, p);
	}
	if (p->twin)
		flags |= CT_NAT_REPLY;
	return begin(skb, p, flags);
}

#endif
