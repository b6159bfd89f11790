/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * service.h: service addresses per packet, for what had no socket where the
 * socket hooks could see it.
 */
#ifndef LOCKGATE_SERVICE_H
#define LOCKGATE_SERVICE_H

#include "backend.h"
#include "cidr.h"
#include "nat.h"

enum service_answer {
	NOT_A_SERVICE = 0,
	TRANSLATED    = 1,
	REFUSED       = 2,	/* p->cause says why */
};

static __always_inline struct service_view *service_find(struct packet *p, const struct tuple *t, bool any_port)
{
	struct service_key key = { .addr = t->daddr };
	struct service *service;

	if (!any_port) {
		key.port = t->dport;
		key.proto = t->proto;
	}
	service = bpf_map_lookup_elem(&services, &key);
	if (!service)
		return NULL;
	struct service_view *view = &service->view[p->epoch & 1];

	return view->flags & SVC_PRESENT ? view : NULL;
}

/* Put a backend of the service in p->now's destination: the one that the client
 * keeps, or one at random. */
static __always_inline bool backend_for_packet(struct packet *p, struct service_view *view)
{
	struct affinity_key client = { .service = view->id, .by_address = 1 };
	void *image = image_of(p->epoch);
	struct affinity kept;

	if (!image || !view->count)
		return false;
	__builtin_memcpy(client.client, &p->wire.saddr, sizeof(client.client));
	if (view->affinity &&
	    affinity_find(&client, view, p->epoch, p->wire.proto, live_inside(view), p->now_s, p->dry, &kept)) {
		p->now.daddr = kept.addr;
		p->now.dport = kept.port;
		return true;
	}
	__u32 word = view->backends + bpf_get_prandom_u32() % view->count * BACKEND_WORDS;
	__u64 *high = image_word(image, word);
	__u64 *low = image_word(image, word + 1);
	__u64 *port = image_word(image, word + 2);

	if (!high || !low || !port)
		return false;
	((__u64 *)&p->now.daddr)[0] = *high;
	((__u64 *)&p->now.daddr)[1] = *low;
	p->now.dport = (__be16)*port;
	if (view->affinity && !p->dry)
		affinity_keep(&client, &p->now.daddr, p->now.dport, p->now_s);
	return true;
}

/* Send the packet to a backend of the service: p->wire → p->now. A pod that is its
 * own backend sees the service's address as its peer: a packet from itself would be
 * refused by its stack. */
static __noinline int to_backend(struct packet *p, struct service_view *view, __u8 *flags)
{
	if (!view || !flags)
		return NOT_A_SERVICE;
	p->service = view->id;
	if (view->flags & SVC_RANGES && cidr_class(p->epoch, view->ranges, &p->wire.saddr) != 1) {
		GIVE_UP(p, CAUSE_SOURCE_RANGE);
		return REFUSED;
	}
	if (!backend_for_packet(p, view)) {
		GIVE_UP(p, view->flags & SVC_INTERNAL_LOCAL ? CAUSE_NO_LOCAL_BACKEND : CAUSE_NO_BACKEND);
		return REFUSED;
	}
	if (p->wire.proto == IPPROTO_SCTP && p->now.dport != p->wire.dport) {
		GIVE_UP(p, CAUSE_SCTP_PORT_REWRITE);
		return REFUSED;
	}
	p->now.saddr = same_addr(&p->now.daddr, &p->wire.saddr) ? p->wire.daddr : p->wire.saddr;
	p->now.sport = p->wire.sport;
	*flags |= CT_NAT_REPLY | CT_SERVICE;
	return TRANSLATED;
}

/* Does another connection of the pod have the ends of p->now? A pod may use one
 * port towards a service and towards its backend, or towards two services of one
 * backend: two connections for its stack, but one for the backend's. This and
 * the next are global, so that the verifier walks them once and not at every
 * try and on every way here. */
__noinline int is_taken(struct packet *p)
{
	if (!p)
		return PORT_FREE;
	reverse_of(&p->tuple, &p->now);
	reverse_of(&p->inner, &p->wire);
	struct nat *back = bpf_map_lookup_elem(&nat, &p->tuple);

	if (back && same_ends(&back->to, &p->inner))
		return PORT_FREE;	/* this one, from before */
	ct_key_of(&p->key, &p->now);
	struct ct *ct = bpf_map_lookup_elem(&connections, &p->key);

	if (!ct)
		ct = bpf_map_lookup_elem(&half_open, &p->key);
	if (!ct || is_past(p, ct->seen, ct_timeout(ct, p->now.proto)))
		return PORT_FREE;
	if (!back && ct->flags & CT_NAT_REPLY)
		return PORT_FREE;
	return ct->state == CT_CLOSED && p->now.proto == IPPROTO_TCP ? PORT_CLOSED : PORT_TAKEN;
}

/* Keep the translation and its way back, once the connection may begin: what is
 * refused must not push other pods' translations out. Where another connection
 * has those ends, p->now gets another source port; one of a connection that is
 * closed where none is free, as in Linux (nf_nat_used_tuple_harder): else who begins
 * many short connections would find none for as long as closed ones are kept.
 * False with a cause when all are taken. */
__noinline int remember_service(struct packet *p)
{
	__u32 first = bpf_get_prandom_u32();
	bool closed = false;
	__be16 sport = 0;
	int i;

	if (!p)
		return 0;

	for (i = 0; i < TWIN_TRIES; i++) {
		int taken = is_taken(p);

		if (taken == PORT_FREE)
			break;
		if (p->wire.proto == IPPROTO_SCTP) {
			GIVE_UP(p, CAUSE_SCTP_PORT_REWRITE);
			return 0;
		}
		if (taken == PORT_CLOSED && !closed) {
			closed = true;
			sport = p->now.sport;
		}
		p->now.sport = bpf_htons(TWIN_PORT_MIN + (first + i * 7919) % TWIN_PORTS);
	}
	if (i == TWIN_TRIES) {
		if (!closed) {
			GIVE_UP(p, CAUSE_NAT_EXHAUSTED);
			return 0;
		}
		p->now.sport = sport;
	}
	nat_add(p, &p->wire, &p->now, BPF_ANY);
	reverse_of(&p->tuple, &p->now);
	reverse_of(&p->inner, &p->wire);
	nat_add(p, &p->tuple, &p->inner, BPF_ANY);
	return 1;
}

/* Did the sender's socket ever ask for a service? A full socket knows; of what
 * stands in for one (a request, TIME_WAIT) it is not known. */
static __always_inline bool may_have_asked(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	return !sk || bpf_sk_storage_get(&askers, sk, NULL, 0);
}

/* The service that the sender's socket asked for when it was given this
 * destination, or NULL. */
static __always_inline struct socket_peer *service_asked(struct __sk_buff *skb, struct packet *p)
{
	struct socket_key key = {
		.cookie = bpf_get_socket_cookie(skb),
		.addr = p->wire.daddr,
		.port = p->wire.dport,
		.proto = p->wire.proto,
	};

	return bpf_map_lookup_elem(&sockets, &key);
}

/* UDP to a backend of a service that went: choose another. `asked` is what the
 * sender's socket asked for, or NULL. A connected socket goes on seeing the
 * address it was given. */
static __noinline int service_again(struct packet *p, struct socket_peer *asked, __u32 service, __u8 *flags)
{
	if (p->now.proto != IPPROTO_UDP)
		return NOT_A_SERVICE;
	p->tuple = p->wire;
	if (asked) {
		service = asked->service;
		p->tuple.daddr = asked->addr;
		p->tuple.dport = asked->port;
	}
	if (!service || backend_live(p->epoch, service, &p->now.daddr, p->now.dport, p->now.proto))
		return NOT_A_SERVICE;
	return to_backend(p, service_find(p, &p->tuple, false), flags);
}

/* A new connection of a socket that was given a backend when it asked for a
 * service. Before its first datagram, or while it was silent for so long that its
 * connection was forgotten, that may have gone. */
static __noinline int service_of_socket(struct __sk_buff *skb, struct packet *p, __u8 *flags)
{
	struct socket_peer *asked;

	if (!flags || p->dry || !has_ports(p->wire.proto) || !may_have_asked(skb))
		return NOT_A_SERVICE;
	asked = service_asked(skb, p);
	if (!asked)
		return NOT_A_SERVICE;
	p->service = asked->service;
	*flags |= CT_SERVICE;
	return service_again(p, asked, asked->service, flags);
}

/* A new connection to what may be a service. */
static __noinline int service_begin(struct __sk_buff *skb, struct packet *p, __u8 *flags)
{
	/* Asked by address alone first, as most have an address that is no service's. */
	struct service_view *address = service_find(p, &p->wire, true);
	struct service_view *view = address ? service_find(p, &p->wire, false) : NULL;

	if (view && !(view->flags & SVC_HOST_ONLY))
		return to_backend(p, view, flags);
	if (!address || !is_cluster_ip(address->flags))
		return service_of_socket(skb, p, flags);
	GIVE_UP(p, CAUSE_UNKNOWN_SERVICE_PORT);
	return REFUSED;
}

#endif
