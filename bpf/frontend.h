/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * frontend.h: clients outside the cluster, at the card: a packet of no known connection to a
 * service's frontend (docs/services.md), and how it gets to the backend that choose.h finds.
 */
#ifndef LOCKGATE_FRONTEND_H
#define LOCKGATE_FRONTEND_H

#include "bits.h"
#include "choose.h"
#include "forward.h"
#include "service.h"

enum frontend_answer {		/* or what the program answers: the packet is done with */
	GO_BEGIN = -10,		/* begin the connection p->now, served here or as this node */
	GO_STACK = -11,		/* no frontend of a service: the stack's */
};

/* Nobody serves it: the client is told, if it is the one who sent it. */
static __always_inline int nobody_serves(struct __sk_buff *skb, struct packet *p, bool tell)
{
	if (!tell || p->outer_size || p->quoted)
		return drop(skb, p);
	return drop_and_tell(skb, p, refuse(skb, p));
}

/* An echo request to an address that is nobody's but services': answered in their name. */
__noinline int answer_echo(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return TCX_DROP;
	__u32 csum = p->l4 + 2;
	__u8 ttl = p->ttl;
	__u8 type = p->family == 4 ? ICMP_ECHO_REPLY : ICMP6_REPLY;
	__be16 was = bpf_htons((p->family == 4 ? ICMP_ECHO : ICMP6_ECHO) << 8 | p->icmp_code);
	__be16 is = bpf_htons(type << 8 | p->icmp_code);

	p->target = target_of(TO_HOST, 0);
	if (p->dry)
		return answer_dry(skb, p);
	reverse_of(&p->tuple, &p->wire);
	if (store_addresses(skb, p->family, p->l3, &p->tuple) || turn_around(skb))
		return TCX_DROP;
	if (p->family == 4 &&
	    (bpf_l3_csum_replace(skb, p->l3 + 10, bpf_htons(ttl << 8), bpf_htons(64 << 8), 2)))
		return TCX_DROP;
	ttl = 64;
	if (bpf_skb_store_bytes(skb, p->l3 + (p->family == 4 ? 8 : 7), &ttl, 1, 0))
		return TCX_DROP;
	if (p->fragment != FRAG_LATER &&
	    (bpf_l4_csum_replace(skb, csum, was, is, 2) || bpf_skb_store_bytes(skb, p->l4, &type, 1, 0)))
		return TCX_DROP;
	return answer_sender(skb, p);
}

static __always_inline bool is_echo(const struct packet *p)
{
	if (p->asked.proto != (p->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return false;
	return p->fragment == FRAG_LATER || p->icmp_type == (p->family == 4 ? ICMP_ECHO : ICMP6_ECHO);
}

/* To no frontend. Where the address is a service's and nobody else's, nothing else is there. */
static __always_inline int no_frontend(struct __sk_buff *skb, struct packet *p)
{
	if (p->outer_size) {
		GIVE_UP(p, CAUSE_NO_FRONTEND);
		return drop(skb, p);
	}
	struct service_view *address = p->quoted || p->to_host ? NULL : service_find(p, &p->asked, true);

	if (!address || (address->flags & (SVC_FRONTEND | SVC_OPEN)) != SVC_FRONTEND)
		return GO_STACK;
	if (is_echo(p))
		return p->fragment == FRAG_FIRST && !leave_ports(p, NO_SLOT) ? drop(skb, p) : answer_echo(skb, p);
	GIVE_UP(p, CAUSE_UNKNOWN_SERVICE_PORT);
	return nobody_serves(skb, p, p->asked.proto != (p->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6));
}

/* To p->owner, on another node: the packet as it is, in an outer header. */
__noinline int send_encapsulated(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return TCX_DROP;
	__u32 index = target_index(p->owner.target);
	struct hop_view *hop = hop_of(p->epoch, index);
	int verdict;

	p->target = p->owner.target;
	if (!hop || !hop->ifindex || hop->flags & HOP_DROP) {
		GIVE_UP(p, CAUSE_NO_ROUTE);
		return drop(skb, p);
	}
	if (!p->outer_size) {
		if (cannot_leave(skb, p, outer_size(p), &verdict))
			return verdict;
		if (decrement_ttl(skb, p) || !encapsulate(skb, p))
			return drop(skb, p);
	} else {
		if (hop->mtu && !fits(skb, p->l4 - ETH_HLEN, hop->mtu)) {
			GIVE_UP(p, CAUSE_PACKET_TOO_BIG);
			return drop(skb, p);
		}
		if (!encapsulate_again(skb, p))
			return drop(skb, p);
	}
	return leave_by(skb, p, hop);
}

/* Can it be a client's who is not of this node, by this link? What another node sent here
 * encapsulated, it took from the client, who may be anywhere. */
static __always_inline bool is_believed(struct __sk_buff *skb, struct packet *p)
{
	__u32 source = peer_target(p, &p->wire.saddr);

	return p->outer_size || (!is_ours(source) && (comes_by(skb, p, source) || is_between_nodes(p)));
}

/* The node port that another node's client asked there, as this node has it. All nodes have
 * the same ports, each at its own addresses, of which the others do not know all; one may be
 * an external IP as well. */
static __always_inline struct service_view *node_port(struct packet *p)
{
	__u32 zero = 0;
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);

	if (!p->outer_size || !node || is_pod(p, &p->asked.daddr))
		return NULL;
	struct service_view *address = service_find(p, &p->asked, true);

	if (address && !(address->flags & SVC_OPEN))
		return NULL;
	p->tuple = p->asked;
	p->tuple.daddr = p->family == 4 ? node->node4 : node->node6;
	return service_find(p, &p->tuple, false);
}

/* Is it of a connection to a frontend that is no more, as a node port that was changed, while its
 * backend still serves and knows it? As far as this node remembers the flow. */
static __noinline int goes_on(struct __sk_buff *skb, struct packet *p)
{
	if (!config_flows || p->outer_size || p->asked.proto != IPPROTO_TCP || p->fragment || begins(p) ||
	    !may_be_frontend(frontend_hash(&p->asked)))
		return 0;
	p->hash = flow_hash(&p->asked);
	p->hint = 0;
	struct flow *flow = flow_look(&p->asked, p->hash);
	__u64 word = flow ? flow_word(flow) : 0;

	if (!flow_epoch(word) || flow_is_past(flow, IPPROTO_TCP, p->now_s))
		return 0;
	if (flow_epoch(word) != p->epoch)
		word = flow_again(flow, word, IPPROTO_TCP, p->epoch, 0);
	p->service = flow->service;
	return word && flow_read(flow, word, p->now_s, &p->owner, p->dry) &&
	       target_kind(p->owner.target) == TO_HOP && is_believed(skb, p);
}

/* Is the client a process of the node that p->owner is one of? From outside, its stack takes
 * nothing that has its own address as the source. */
static __always_inline bool asks_itself(struct packet *p)
{
	return same_addr(&p->owner.addr, &p->asked.saddr) && !is_pod(p, &p->owner.addr);
}

/* Serve p->now's client by p->owner, here or as this node. */
static __always_inline int serve(struct packet *p)
{
	p->now.daddr = p->owner.addr;
	p->now.dport = p->owner.port;
	/* A pod that is its own backend: see to_backend(). */
	p->now.saddr = same_addr(&p->now.daddr, &p->wire.saddr) ? p->wire.daddr : p->wire.saddr;
	p->now.sport = p->wire.sport;
	p->slot = target_kind(p->owner.target) == TO_LOCAL ? target_index(p->owner.target) : NO_SLOT;
	return GO_BEGIN;
}

/* A packet at a card that is of no known connection and to no pod, or came encapsulated. Global,
 * so that the verifier walks it once. */
__noinline int frontend(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return TCX_DROP;
	if (p->quoted) {
		reverse_of(&p->asked, &p->inner);
	} else {
		copy_addr(&p->asked.saddr, &p->wire.saddr);
		copy_addr(&p->asked.daddr, &p->wire.daddr);
		set_ends(&p->asked, p->wire.sport, p->wire.dport, p->wire.proto);
	}
	/* A frame for another machine's MAC, that a bridge sent everywhere, is that one's. */
	if (p->role != LINK_TUNNEL && !p->dry && skb->pkt_type != PACKET_HOST)
		return GO_STACK;
	struct service_view *view = service_find(p, &p->asked, false);

	if (!view)
		view = node_port(p);
	if (!view || !(view->flags & SVC_FRONTEND))
		return goes_on(skb, p) ? send_encapsulated(skb, p) : no_frontend(skb, p);
	p->service = view->id;
	p->hash = flow_hash(&p->asked);
	if (view->flags & SVC_RANGES && cidr_class(p->epoch, view->ranges, &p->asked.saddr) != 1) {
		GIVE_UP(p, CAUSE_SOURCE_RANGE);
		return drop(skb, p);
	}
	if (!is_believed(skb, p)) {
		GIVE_UP(p, CAUSE_SPOOFED_SOURCE);
		return drop(skb, p);
	}
	if (p->fragment == FRAG_FIRST && !leave_ports(p, NO_SLOT))
		return drop(skb, p);
	if (p->outer_size ? !choose_inside(p, view) : !choose(p, view)) {
		GIVE_UP(p, view->flags & SVC_LOCAL ? CAUSE_NO_LOCAL_BACKEND :
			   p->outer_size ? CAUSE_NO_FRONTEND : CAUSE_NO_BACKEND);
		return nobody_serves(skb, p, !(view->flags & SVC_LOCAL));
	}
	bool snat = !is_ours(p->owner.target) && !p->outer_size &&
		    (view->flags & SVC_SNAT || target_kind(p->owner.target) != TO_HOP || asks_itself(p));

	if (snat || is_ours(p->owner.target)) {
		/* An error about what nobody here knows. */
		if (p->quoted) {
			GIVE_UP(p, CAUSE_UNRELATED_ERROR);
			return drop(skb, p);
		}
		if (p->asked.proto == IPPROTO_SCTP && p->owner.port != p->asked.dport) {
			GIVE_UP(p, CAUSE_SCTP_PORT_REWRITE);
			return nobody_serves(skb, p, true);
		}
		p->snat = snat;
		/* What had the same ends before may have gone to another node: XDP, which looks
		 * for flows before connections, shall not send this after it. */
		if (config_flows && !p->dry)
			flow_forget(&p->asked, p->hash);
		return serve(p);
	}
	if (!p->dry && !p->outer_size && begins(p) && (is_ordered(p->asked.proto) || !p->hint)) {
		if (config_flows && (is_ordered(p->asked.proto) || !p->hint))
			flow_learn(&p->asked, flow_look(&p->asked, p->hash), p->hash, &p->owner,
				   p->epoch | (__u64)view->id << 32);
		/* Served here before, with the same ends: what comes next shall not go there. */
		bpf_map_delete_elem(&nat, &p->asked);
	}
	return send_encapsulated(skb, p);
}

#endif
