/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* find.h: which connection a packet is of, by the tuple that it has on the wire. */
#ifndef LOCKGATE_FIND_H
#define LOCKGATE_FIND_H

#include "arrive.h"
#include "nat.h"
#include "service.h"

/* Is it the address of a pod of this node? Then it is as if that pod were at this hook:
 * the verdict need not look for it again. */
static __always_inline bool is_at_pod(struct packet *p, const struct addr *addr)
{
	struct peer *peer = bpf_map_lookup_elem(&peers, addr);

	if (!peer || peer->view[p->epoch & 1].kind != PEER_LOCAL)
		return false;
	p->slot = peer->view[p->epoch & 1].target;
	return true;
}

static __always_inline bool for_a_pod(struct packet *p)
{
	struct peer *peer = bpf_map_lookup_elem(&peers, &p->wire.daddr);
	enum peer_kind kind = peer ? peer->view[p->epoch & 1].kind : PEER_NONE;

	p->to_host = kind == PEER_HOST;
	if (kind != PEER_LOCAL)
		return false;
	p->slot = peer->view[p->epoch & 1].target;
	return true;
}

/* Can what goes to a pod's address be translated? Datagrams to a backend that went
 * are, until their socket ends (service_again()); and so errors about the answers. */
static __always_inline bool may_have_moved(struct __sk_buff *skb, struct packet *p)
{
	return p->place == PLACE_FROM_POD &&
	       (p->icmp_error || (p->wire.proto == IPPROTO_UDP && may_have_asked(skb)));
}

/* The connection with just the ends of `t`. Where that is one to a service, the
 * pod sends its packets to the service's address: this one is of a twin. And where a
 * late answer of a backend that went began it, it does not take the client back. */
static __noinline struct ct *find_untranslated(struct __sk_buff *skb, struct packet *p, const struct tuple *t)
{
	p->twin = p->late = 0;
	/* A frontend's. The client may be a pod of this node, which has an entry of its own. */
	if (p->outer_size)
		return NULL;
	struct ct *ct = ct_find(p, t);

	p->twin = ct && (p->place == PLACE_FROM_POD || p->place == PLACE_FROM_NET) && !p->reply &&
		  (ct->flags & (CT_NAT_ORIGIN | CT_NAT_REPLY)) == CT_NAT_REPLY;
	p->late = ct && p->reply && p->table != IN_CONNECTIONS && may_have_moved(skb, p);
	return p->twin || p->late ? NULL : ct;
}

/* Is the connection that the datagram is translated to one of an earlier socket, on
 * the same port, that asked for another service? The service of its own may have
 * another id by now. */
static __noinline bool is_anothers(struct __sk_buff *skb, struct packet *p, struct ct *ct)
{
	if (p->place != PLACE_FROM_POD || p->icmp_error || p->wire.proto != IPPROTO_UDP)
		return false;
	struct socket_peer *asked = service_asked(skb, p);

	if (!asked || asked->service == ct->service)
		return false;
	p->tuple = p->wire;
	p->tuple.daddr = asked->addr;
	p->tuple.dport = asked->port;
	struct service_view *view = service_find(p, &p->tuple, false);

	return !view || view->id != ct->service;
}

/* The connection of tuple `t` as seen on the wire, and in p->now the tuple it
 * is known by. On the wire another than its own only stands towards a service's
 * address or a node's, or of a twin, or for a backend that went, so what else goes
 * to a pod is spared the look-up in `nat`. */
static __always_inline struct ct *find_connection(struct __sk_buff *skb, struct packet *p, const struct tuple *t)
{
	struct ct *ct = find_untranslated(skb, p, t);

	if (ct || p->dry) {
		p->now = *t;
		return ct;
	}
	if (p->twin || p->late || may_have_moved(skb, p) || !is_pod(p, &t->daddr)) {
		struct nat *translated = nat_find(p, t);

		if (translated) {
			p->now = translated->to;
			ct = ct_find(p, &p->now);
			if (!ct && p->place == PLACE_FROM_NET && is_at_pod(p, &p->now.daddr) && is_crowded(p))
				ct = ct_find(p, &p->now);
		}
	}
	if (ct && !is_anothers(skb, p, ct))
		return ct;
	p->now = *t;
	return p->late ? ct_find(p, t) : NULL;
}

#endif
