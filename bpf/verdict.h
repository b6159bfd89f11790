/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * verdict.h: who the two ends are, and whether they may talk. The number of
 * look-ups is fixed, whatever the number of rules.
 */
#ifndef LOCKGATE_VERDICT_H
#define LOCKGATE_VERDICT_H

#include "cidr.h"
#include "event.h"

struct end {			/* what an address is, in this view */
	__u32 class, endpoint, slot, target;
};

/* Is the address that of the pod at this hook, in this view? Then the pod's
 * own entry says what peers would. */
static __always_inline bool is_own(struct packet *p, const struct addr *addr, struct end *end)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &p->slot);
	__u32 class;

	if (!ep)
		return false;
	struct endpoint_view *view = &ep->view[p->epoch & 1];

	if (same_addr(addr, &ep->addr4))
		class = view->class4;
	else if (same_addr(addr, &ep->addr6))
		class = view->class6;
	else
		return false;
	/* While a slot changes hands the view may be about another pod. */
	if (class == NO_CLASS || view->endpoint != ep->id)
		return false;
	end->class = class;
	end->endpoint = view->endpoint;
	end->slot = p->slot;
	end->target = target_of(TO_LOCAL, p->slot);
	return true;
}

/* Never fails: an address that is no peer is of the world. */
static __always_inline int find_end(struct packet *p, const struct addr *addr, struct end *end)
{
	struct peer *peer;

	if (is_own(p, addr, end))
		return 0;
	peer = bpf_map_lookup_elem(&peers, addr);
	end->endpoint = 0;
	end->slot = NO_SLOT;
	if (peer) {
		struct peer_view *view = &peer->view[p->epoch & 1];

		if (view->kind != PEER_NONE) {
			end->class = view->class;
			end->endpoint = view->endpoint;
			if (view->kind == PEER_LOCAL) {
				end->slot = view->target;
				end->target = target_of(TO_LOCAL, view->target);
			} else if (view->kind == PEER_HOST) {
				end->target = target_of(TO_HOST, 0);
			} else {
				end->target = target_of(TO_HOP, view->target);
			}
			return 0;
		}
	}
	end->class = cidr_class(p->epoch, IMAGE_CIDRS, addr);
	end->target = TO_NOWHERE;
	return 0;
}

/* Where packets to an end go: the peer it is, or where routes say the world is.
 * Apart from the verdict, which does not need it. */
static __always_inline __u32 way_to(__u32 target, const struct addr *addr)
{
	struct route_key key = { .prefixlen = 128, .addr = *addr };
	__u32 *hop;

	if (target != TO_NOWHERE)
		return target;
	hop = bpf_map_lookup_elem(&routes, &key);
	if (!hop)
		return TO_NOWHERE;
	/* No hop has number 0: it stands for this node's own addresses. */
	return *hop ? target_of(TO_HOP, *hop) : target_of(TO_HOST, 0);
}

/* Equivalence class of the destination port; 0 for a protocol without ports. */
static __always_inline __u32 port_class(void *image, const struct tuple *t)
{
	__u32 table;

	switch (t->proto) {
	case IPPROTO_TCP:  table = 0; break;
	case IPPROTO_UDP:  table = 1; break;
	case IPPROTO_SCTP: table = 2; break;
	default: return 0;
	}
	__u32 index = table * 65536 + bpf_ntohs(t->dport);
	__u64 *word = image_word(image, IMAGE_PORTS + (index >> 2));

	return word ? (__u16)(*word >> (index & 3) * 16) : 0;
}

/* The cell of one endpoint in one direction, pending in the upper half. A
 * table that does not hold what the view promises denies, for reason 0. */
static __always_inline __u64 read_cell(struct packet *p, const struct tuple *t, __u32 slot, __u32 class,
				  __u32 direction)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);
	void *image = image_of(p->epoch);

	if (!ep || !image)
		return 0;
	struct endpoint_view *view = &ep->view[p->epoch & 1];
	__u32 isolation = direction == DIR_INGRESS ? ISOLATED_INGRESS : ISOLATED_EGRESS;
	__u32 shift = direction == DIR_INGRESS ? 0 : 32;

	if (!(view->isolated & isolation))
		return (__u64)CELL_ALLOW << 32 | CELL_ALLOW;
	__u64 *row = image_word(image, view->rows + class);
	__u64 *column = image_word(image, view->cols + port_class(image, t));

	if (!row || !column)
		return 0;
	__u64 *cell = image_word(image, (__u32)(*row >> shift) + (__u32)(*column >> shift));

	return cell ? *cell : 0;
}

/* Judge the connection `t`, oriented from its originator. Fills the ends and
 * cells of the packet. True when it may pass. */
__noinline int judge(struct packet *p, const struct tuple *t)
{
	struct end src, dst;

	if (!p || !t)
		return 0;

	find_end(p, &t->saddr, &src);
	find_end(p, &t->daddr, &dst);
	p->src_endpoint = src.endpoint;
	p->dst_endpoint = dst.endpoint;
	p->src_slot = src.slot;
	p->dst_slot = dst.slot;
	p->src_class = src.class;
	p->dst_class = dst.class;
	p->src_target = src.target;
	p->dst_target = dst.target;
	p->judged = 0;
	if (src.slot != NO_SLOT && src.slot == dst.slot) {	/* to itself, always */
		p->egress_cell = p->ingress_cell = CELL_ALLOW;
		p->judged = 1 << DIR_EGRESS | 1 << DIR_INGRESS;
		return 1;
	}
	if (src.slot != NO_SLOT) {
		__u64 cell = read_cell(p, t, src.slot, dst.class, DIR_EGRESS);

		p->egress_cell = cell;
		p->egress_pending = cell >> 32;
		p->judged |= 1 << DIR_EGRESS;
		if (!(p->egress_cell & CELL_ALLOW))
			return 0;
	}
	if (dst.slot != NO_SLOT) {
		__u64 cell = read_cell(p, t, dst.slot, src.class, DIR_INGRESS);

		p->ingress_cell = cell;
		p->ingress_pending = cell >> 32;
		p->judged |= 1 << DIR_INGRESS;
		if (!(p->ingress_cell & CELL_ALLOW))
			return 0;
	}
	return 1;
}

#endif
