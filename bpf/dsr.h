/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * dsr.h: what XDP sends on by itself: plain TCP and UDP to a frontend whose backend is
 * behind another node's direct hop. It may only do what from_net would do with the same
 * packet, and passes the rest to it, errors to be told above all.
 */
#ifndef LOCKGATE_DSR_H
#define LOCKGATE_DSR_H

#include "bits.h"
#include "cidr.h"
#include "count.h"
#include "flow.h"
#include "frame.h"
#include "outer.h"

/* 0 removes the balancer. */
const volatile __u32 config_balance = 0;

/* Generic XDP: frames come as the stack has them, so that one may be several that GRO joined;
 * and leave by any link. */
const volatile __u32 config_generic = 0;

/* The cards' own MACs, the first byte in the lowest bits. A frame for another, which a bridge
 * sent everywhere, is another machine's. Where there are more cards, tcx does the others' work. */
#define CARD_MACS 8
const volatile __u64 config_macs[CARD_MACS] = {};

static __always_inline bool is_syn(const struct frame *f)
{
	return (f->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Frontends that this CPU asked for lately, as they are in their epoch: most packets are for few. */
struct front {
	struct addr addr;
	__u32 ends;		/* port and protocol */
	__u32 epoch;
	struct service_view view;
} __attribute__((aligned(64)));

#define FRONT_BITS 8

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << FRONT_BITS);
	__type(key, __u32);
	__type(value, struct front);
} fronts SEC(".maps");

/* The service at the packet's destination. */
static __always_inline struct service_view *front_of(const struct frame *f, __u64 hash)
{
	__u32 index = hash >> (64 - FRONTEND_BITS - FRONT_BITS) & ((1 << FRONT_BITS) - 1);
	__u32 ends = f->ends.dport | (__u32)f->ends.proto << 16;
	struct front *front = bpf_map_lookup_elem(&fronts, &index);
	struct service_key key = { .addr = f->ends.daddr, .port = f->ends.dport, .proto = f->ends.proto };
	struct service *service;

	if (!front)
		return NULL;
	if (front->epoch == f->epoch && front->ends == ends && same_addr(&front->addr, &f->ends.daddr))
		return &front->view;
	service = bpf_map_lookup_elem(&services, &key);
	if (!service)
		return NULL;
	front->addr = f->ends.daddr;
	front->ends = ends;
	front->epoch = f->epoch;
	front->view = service->view[f->epoch & 1];
	return &front->view;
}

/* The frontend that the packet is for, if clients outside get there by DSR. */
static __always_inline struct service_view *dsr_frontend(const struct frame *f, __u64 hash)
{
	const __u16 mine = SVC_PRESENT | SVC_FRONTEND;
	const __u16 others = SVC_SNAT | SVC_HOST_ONLY;
	struct service_view *view = front_of(f, hash);

	if (!view || (view->flags & (mine | others)) != mine || view->affinity)
		return NULL;
	if (view->flags & SVC_RANGES && cidr_class(f->epoch, view->ranges, &f->ends.saddr) != 1)
		return NULL;
	return view;
}

static __always_inline bool is_for_us(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u64 mac;

	if (data + sizeof(mac) > end)
		return false;
	mac = *(__u64 *)data & 0xffffffffffff;
	for (int i = 0; i < CARD_MACS; i++)
		if (mac == config_macs[i])
			return true;
	return false;
}

/* Another node, a pod, or somebody who pretends: from_net knows whom to believe. */
static __always_inline bool is_peer(const struct frame *f, const struct addr *addr)
{
	if (!may_be_peer(addr))
		return false;
	struct peer *peer = bpf_map_lookup_elem(&peers, addr);

	return peer && peer->view[f->epoch & 1].kind != PEER_NONE;
}

/* Which backend serves it, by what is not known of its flow in this epoch? False: from_net
 * finds out. */
static __always_inline bool dsr_backend(const struct frame *f, const struct service_view *view, struct flow *flow,
					__u32 hash, __u32 now, struct owner *owner, bool *chosen)
{
	if (is_peer(f, &f->ends.saddr))
		return false;
	if (!is_syn(f) && flow_serves(flow, view, f->ends.proto, f->epoch, now, FLOW_STRANGER, owner, false))
		return true;
	/* Served here, or as this node; or an answer to what left masqueraded. */
	if (bpf_map_lookup_elem(&nat, &f->ends))
		return false;
	void *image = image_of(f->epoch);

	*chosen = true;
	return image && owner_at(image, view, owners_of(image, view, hash), 0, owner) &&
	       !(owner->flags & OWNER_ENDS);
}

static __always_inline __u32 outer_size(const struct frame *f)
{
	return f->family == 4 ? sizeof(struct ipv4) : sizeof(struct ipv6);
}

/* May it be more than one packet? SYNs and bare acknowledgements are never joined. */
static __always_inline bool may_be_joined(struct xdp_md *ctx, const struct frame *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct l4_head *head = data + (f->family == 4 ? ETH_HLEN + sizeof(struct ipv4) : ETH_HLEN + sizeof(struct ipv6));

	if (f->ends.proto != IPPROTO_TCP)
		return false;
	return (void *)(head + 1) > end || frame_has(f, (head->more[8] >> 4) * 4 + 1);
}

/* The hop to the owner, if XDP can send there. It sends all that is in the frame, also what
 * follows the packet. */
static __always_inline struct hop_view *dsr_hop(const struct frame *f, const struct owner *owner)
{
	const __u32 wanted = config_generic ? HOP_MAC : HOP_MAC | HOP_XDP;
	struct hop_view *hop;

	if (target_kind(owner->target) != TO_HOP || is_v4(&owner->addr) != (f->family == 4) || f->ttl <= 1)
		return NULL;
	hop = hop_of(f->epoch, target_index(owner->target));
	if (!hop || (hop->flags & (wanted | HOP_DROP | HOP_MASQ | HOP_TUNNEL)) != wanted)
		return NULL;
	return !hop->mtu || f->size + outer_size(f) <= hop->mtu + ETH_HLEN ? hop : NULL;
}

/* Make room for an outer header of `size`, and put the hop's MACs in front. The Ethernet
 * header, with both headers behind it; NULL: it is as it was. */
static __always_inline struct ethernet *make_room(struct xdp_md *ctx, const struct hop_view *hop, const int size)
{
	struct ethernet *eth;

	if (bpf_xdp_adjust_head(ctx, -size))
		return NULL;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) + 2 * size > (void *)(long)ctx->data_end)
		return NULL;	/* never: frame_plain() saw as much */
	__builtin_memcpy(eth, hop->dmac, 12);	/* and smac */
	return eth;
}

static __always_inline bool encapsulate(struct xdp_md *ctx, const struct frame *f, const struct addr *to,
					const struct hop_view *hop, __u32 hash, __be16 hint)
{
	if (f->family == 4) {
		struct ethernet *eth = make_room(ctx, hop, sizeof(struct ipv4));
		struct ipv4 *outer = (void *)(eth + 1), *inner = outer + 1;

		if (!eth)
			return false;
		eth->proto = bpf_htons(ETH_P_IP);
		inner->csum = less_ttl_csum(inner->csum, f->ttl);
		inner->ttl = f->ttl - 1;
		outer_ipv4(outer, to, hash, inner->tos, f->length, OUTER_TTL, hint);
	} else {
		struct ethernet *eth = make_room(ctx, hop, sizeof(struct ipv6));
		struct ipv6 *outer = (void *)(eth + 1), *inner = outer + 1;

		if (!eth)
			return false;
		eth->proto = bpf_htons(ETH_P_IPV6);
		inner->ttl = f->ttl - 1;
		outer_ipv6(outer, to, hash, inner->version_class_flow, f->length, OUTER_TTL, hint);
	}
	return true;
}

/* The verdict; XDP_PASS: nothing was changed. */
static __always_inline int balance_frame(struct xdp_md *ctx, const struct frame *f)
{
	__u64 front = frontend_hash(&f->ends);

	if (f->kind != FRAME_PLAIN || !f->epoch || !may_be_frontend(front))
		return XDP_PASS;
	if (!is_for_us(ctx) || (config_generic && may_be_joined(ctx, f)))
		return XDP_PASS;
	__u32 hash = flow_hash(&f->ends), now = config_flows ? now_seconds() : 0;
	struct flow *flow = config_flows ? flow_look(&f->ends, hash) : NULL;
	struct service_view *view = NULL;
	struct hop_view *hop;
	struct owner owner;
	bool chosen = false;

	if (is_syn(f) || !flow_known(flow, f->ends.proto, f->epoch, now, &owner)) {
		view = dsr_frontend(f, front);
		if (!view || !dsr_backend(f, view, flow, hash, now, &owner, &chosen))
			return XDP_PASS;
	}
	hop = dsr_hop(f, &owner);
	if (!hop)
		return XDP_PASS;
	if (config_flows && chosen && view && flow_begins(f->ends.proto, f->tcp_flags)) {
		owner.target |= FLOW_STRANGER;
		if (!flow_says(flow, &owner, f->epoch, now))
			flow_learn(&f->ends, flow, hash, &owner,
				   f->epoch | (__u64)view->id << 32);
	}
	if (!encapsulate(ctx, f, &owner.addr, hop, hash, chosen ? 0 : owner.port))
		return XDP_PASS;
	count(COUNT_BALANCED);
	return hop->ifindex == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(hop->ifindex, 0);
}

#endif
