/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * choose.h: which backend serves a packet of no known connection to a service's frontend
 * (docs/services.md): what its flow or its client had, or an owner of its slot.
 */
#ifndef LOCKGATE_CHOOSE_H
#define LOCKGATE_CHOOSE_H

#include "arrive.h"
#include "flow.h"

static __always_inline bool is_ordered(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_SCTP;
}

/* Does the packet begin a connection, as far as it says? */
static __always_inline bool begins(const struct packet *p)
{
	return !p->quoted && (!is_ordered(p->asked.proto) || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN);
}

static __always_inline bool is_backend(const struct owner *owner, const struct addr *addr, __be16 port)
{
	return same_addr(&owner->addr, addr) && owner->port == port;
}

/* Which slot is a flow's? All of a client's, where it shall keep its backend: so that it
 * does whichever node it comes by. */
static __always_inline __u32 slot_hash(struct packet *p, const struct service_view *view)
{
	if (!view->affinity)
		return p->hash;
	p->tuple = p->asked;
	p->tuple.sport = 0;
	return flow_hash(&p->tuple);
}

static __always_inline void set_owner(struct packet *p, const struct addr *addr, __be16 port)
{
	p->owner.addr = *addr;
	p->owner.port = p->hint = port;
	p->owner.target = peer_target(p, addr);
}

/* The backend that the flow p->asked was given before, as far as this node remembers. */
static __noinline int owner_of_flow(struct packet *p, struct service_view *view)
{
	if (!view || !config_flows || (is_ordered(p->asked.proto) && begins(p)))
		return 0;
	struct flow *flow = flow_look(&p->asked, p->hash);

	if (!flow_serves(flow, view, p->asked.proto, p->epoch, p->now_s, 0, &p->owner, p->dry))
		return 0;
	p->hint = p->owner.port;
	return 1;
}

/* The one that the client keeps, with affinity. */
static __noinline int owner_of_client(struct packet *p, struct service_view *view)
{
	struct affinity_key client = { .by_address = 1 };
	__u8 live = begins(p) ? LIVE_OUTSIDE : LIVE_OUTSIDE | LIVE_KEEPS;
	struct affinity kept;

	if (!view || !view->affinity)
		return 0;
	client.service = view->id;
	__builtin_memcpy(client.client, &p->asked.saddr, sizeof(client.client));
	if (!affinity_find(&client, view, p->epoch, p->asked.proto, live, p->now_s, p->dry || p->quoted, &kept))
		return 0;
	set_owner(p, &kept.addr, kept.port);
	return 1;
}

/* Whose time with its backend is over, begins with the next owner of its slot that takes new
 * connections, in p->owner: by the hash alone it would keep one for ever. Any node finds that
 * one along the chain. False: the first it is. */
static __noinline int owner_after(struct packet *p, struct service_view *view, __u64 owners)
{
	struct affinity_key client = { .by_address = 1 };
	void *image = image_of(p->epoch);
	bool behind = false;

	if (!view || !image || !view->affinity || !begins(p))
		return 0;
	client.service = view->id;
	__builtin_memcpy(client.client, &p->asked.saddr, sizeof(client.client));
	struct affinity *was = bpf_map_lookup_elem(&affinities, &client);

	if (!was || !is_past(p, was->seen, view->affinity))
		return 0;
	for (int i = 0; i < OWNERS; i++) {
		if (!owner_at(image, view, owners, i, &p->owner))
			break;
		if (behind && backend_live(p->epoch, view->id, &p->owner.addr, p->owner.port, p->asked.proto) &
				      LIVE_OUTSIDE)
			return 1;
		behind |= is_backend(&p->owner, &was->addr, was->port);
	}
	return 0;
}

/* From now on the client of p->asked has p->owner. Calls of their own, this and those above: the
 * stack of all calls in a row is short. */
static __noinline int keep_owner(struct packet *p, __u32 service)
{
	struct affinity_key client = { .service = service, .by_address = 1 };

	__builtin_memcpy(client.client, &p->asked.saddr, sizeof(client.client));
	affinity_keep(&client, &p->owner.addr, p->owner.port, p->now_s);
	return 0;
}

/* The next owner behind `place` that is on another node, in p->owner: it may know a connection
 * that began before the owners changed. Behind the last comes the first: for who sent it here
 * with an older order, `place` may have been before those that are before it now. False: there is
 * none, p->owner is as it was. */
static __always_inline bool next_elsewhere(struct packet *p, void *image, const struct service_view *view,
					   __u64 owners, int place)
{
	struct owner *was = (struct owner *)p->bytes;

	*was = p->owner;
	for (int i = 0; i < 2 * OWNERS - 1; i++) {
		if (i <= place || i >= OWNERS + (place > 0 ? place : 0))
			continue;
		if (!owner_at(image, view, owners, i % OWNERS, &p->owner))
			continue;
		if (target_kind(p->owner.target) == TO_HOP)
			return true;
	}
	p->owner = *was;
	return false;
}

/* Is the packet of a connection with p->owner, here, whose translation was evicted? */
static __noinline int is_with_owner(struct packet *p)
{
	if (!p || !is_ordered(p->asked.proto))
		return 0;
	p->tuple = p->asked;
	p->tuple.daddr = p->owner.addr;
	p->tuple.dport = p->owner.port;
	struct ct *ct = ct_find(p, &p->tuple);
	bool asks = ct && !p->reply && ct->flags & CT_NAT_REPLY && ct->service == p->service;

	p->reply = 0;
	return asks;
}

/* Is p->owner, which the client keeps, an owner of its slot other than the first? That one, in
 * p->owner, begins the chain on which all of the client's connections are: the kept one may
 * have come after some of them. */
static __noinline int is_on_chain(struct packet *p, struct service_view *view, __u64 owners)
{
	struct owner *kept = (struct owner *)p->bytes;
	void *image = image_of(p->epoch);
	bool found = false;

	if (!view || !image || view->flags & SVC_SNAT)
		return 0;
	*kept = p->owner;
	for (int i = 1; i < OWNERS; i++) {
		if (!owner_at(image, view, owners, i, &p->owner))
			break;
		found |= is_backend(&p->owner, &kept->addr, kept->port);
	}
	if (found && owner_at(image, view, owners, 0, &p->owner))
		return 1;
	p->owner = *kept;
	return 0;
}

/* The backend of a packet as a client sent it, in p->owner. False: there is none. */
static __noinline int choose(struct packet *p, struct service_view *view)
{
	void *image = image_of(p->epoch);

	p->hint = 0;
	if (!view || !image)
		return 0;
	__u64 owners = owners_of(image, view, slot_hash(p, view));
	bool known = owner_of_flow(p, view);
	bool kept = known || owner_of_client(p, view);

	if (!kept && !owner_after(p, view, owners) && !owner_at(image, view, owners, 0, &p->owner))
		return 0;
	if (!begins(p)) {
		if (kept && !known && is_on_chain(p, view, owners)) {
			p->hint = 0;
			kept = false;
		}
		/* Not known here, or it would not be asked for. */
		if (is_ours(p->owner.target) && !(view->flags & SVC_SNAT) && !is_with_owner(p) &&
		    next_elsewhere(p, image, view, owners, kept ? -1 : 0))
			p->hint = 0;
		return 1;
	}
	if (kept)
		return 1;
	if (p->owner.flags & OWNER_ENDS)	/* so do all others */
		return 0;
	if (view->affinity && !p->dry)
		keep_owner(p, view->id);
	return 1;
}

/* The backend of a packet that another node sent here, encapsulated: the pod that it was
 * sent to, if it begins a connection; else the next owner on another node. There is none, or it
 * has been at four: it is for this one, so that the client hears a reset. For this node the pod
 * may be no backend any more, or not yet: then the first owner serves it. False: none here or
 * elsewhere. */
static __noinline int choose_inside(struct packet *p, struct service_view *view)
{
	void *image = image_of(p->epoch);
	int place = -1;
	bool mine;

	if (!view || !image)
		return 0;
	__u64 owners = owners_of(image, view, slot_hash(p, view));

	for (int i = 0; i < OWNERS; i++) {
		if (!owner_at(image, view, owners, i, &p->owner))
			break;
		if (same_addr(&p->owner.addr, &p->outer)) {
			place = i;
			break;
		}
	}
	mine = place >= 0;
	if (backend_live(p->epoch, view->id, &p->outer, p->hint, p->asked.proto)) {
		set_owner(p, &p->outer, p->hint);
		mine = true;
	}
	if (!mine) {
		if (!owner_at(image, view, owners, 0, &p->owner) ||
		    (begins(p) && p->owner.flags & OWNER_ENDS))
			return 0;
		mine = is_ours(p->owner.target);
		place = mine ? 0 : -1;
	}
	if (mine && (begins(p) || is_with_owner(p)))
		return 1;
	if (p->outer_ttl > OUTER_TTL_STEP && next_elsewhere(p, image, view, owners, place))
		return 1;
	return mine;
}

#endif
