/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * fast.h: the short way of a plain packet of a known connection, tried
 * before everything else. It keeps nothing per packet but what fits in
 * registers and a connection key.
 *
 * It may only do what the long way (parse.h, spoof.h, connection.h) would do
 * with the same packet; whatever it does not know by heart it leaves to it.
 * Why it is a subset:
 *
 *   parse()       no VLAN tag, no IP options or extension headers, no fragment,
 *                 TCP or UDP, all in the linear part, lengths that agree: what
 *                 is left is read at fixed offsets, and no check can fail.
 *   spoofing      MAC, source and multicast of a pod's packets are checked
 *                 here too; what a card brings comes by the link that leads back to
 *                 its source, which this epoch's judgement chose: the world's by a hop
 *                 that no pod is behind, and a node's by its own tunnel.
 *   connection    an entry in `connections` (looked up first there, too) of
 *                 this epoch, in time, without translation, and no packet that
 *                 may begin another: known() then judges nothing and tells
 *                 nothing. ct_follow() follows the states, there and here.
 *   forward()     a live pod, the host, or a hop whose MACs are known, TTL and
 *                 MTU sufficing: the cases of deliver() and leave() that have no
 *                 error to tell.
 *
 * Dry runs take the long way. tests/bytecode/test_fast.py compares the two.
 */
#ifndef LOCKGATE_FAST_H
#define LOCKGATE_FAST_H

#include "connection.h"
#include "spoof.h"

#define LONG_WAY (-2)		/* no answer: nothing was changed */

struct plain {
	struct tuple ends;
	__u8 ttl;
	__u8 tcp_flags;
};

/* A plain TCP or UDP packet. False: it is not plain. */
static __always_inline bool read_plain(struct __sk_buff *skb, struct plain *plain)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct tuple *t = &plain->ends;
	struct l4_head *head;
	__u32 length, headers;
	__u8 proto;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = data + ETH_HLEN;

		headers = sizeof(*ip);
		if ((void *)(ip + 1) + sizeof(struct icmp_head) > end)
			return false;
		if (ip->version_ihl != 0x45 || ip->frag & bpf_htons(IPV4_MF | IPV4_OFF))
			return false;
		length = bpf_ntohs(ip->length);
		proto = ip->proto;
		plain->ttl = ip->ttl;
		map_v4(&t->saddr, ip->saddr);
		map_v4(&t->daddr, ip->daddr);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = data + ETH_HLEN;

		headers = sizeof(*ip);
		if ((void *)(ip + 1) + sizeof(struct icmp_head) > end)
			return false;
		if (*(__u8 *)ip >> 4 != 6)
			return false;
		length = bpf_ntohs(ip->length) + sizeof(*ip);
		proto = ip->next;
		plain->ttl = ip->ttl;
		copy_addr(&t->saddr, &ip->saddr);
		copy_addr(&t->daddr, &ip->daddr);
		if (is_v4(&t->saddr) || is_v4(&t->daddr))
			return false;
	} else {
		return false;
	}
	if (!skb->gso_size && length + ETH_HLEN > skb->len)
		return false;
	head = data + ETH_HLEN + headers;
	plain->tcp_flags = 0;
	if (proto == IPPROTO_TCP) {
		if ((void *)(head + 1) > end || length < headers + sizeof(*head))
			return false;
		plain->tcp_flags = head->more[9];
		if (head->more[8] < 0x50 || (plain->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
			return false;
	} else if (proto != IPPROTO_UDP || length < headers + sizeof(struct icmp_head)) {
		return false;
	}
	set_ends(t, head->sport, head->dport, proto);
	return true;
}

/* Does the pod behind this interface speak for itself, to one receiver? */
static __always_inline bool speaks_for_itself(struct __sk_buff *skb, const struct tuple *t)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 slot = skb->ifindex - IFINDEX_BASE;
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);

	if (!ep || !(ep->flags & EP_LIVE) || data + ETH_HLEN > end || !same_mac(data + 6, ep->mac))
		return false;
	return same_addr(&t->saddr, is_v4(&t->saddr) ? &ep->addr4 : &ep->addr6) && !is_multicast(&t->daddr);
}

/* Did what `source` leads back to come by this link? False: perhaps not. */
static __always_inline bool comes_from(struct __sk_buff *skb, __u32 epoch, __u32 source)
{
	struct hop_view *hop = target_kind(source) == TO_HOP ? hop_of(epoch, target_index(source)) : NULL;

	if (!hop || hop->ifindex != skb->ifindex)
		return false;
	if (!config_tunnel || !(hop->flags & HOP_TUNNEL))
		return true;
	if (!sent_by(skb, hop))
		return false;
	bpf_skb_change_type(skb, PACKET_HOST);	/* see from_net() */
	return true;
}

/* Into a pod of this node; see deliver(). */
static __always_inline int deliver_plain(struct __sk_buff *skb, __u32 place, __u32 slot)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);
	__u8 macs[12];

	if (!ep || !(ep->flags & EP_LIVE))
		return LONG_WAY;
	if (place == PLACE_TO_POD)
		return TCX_NEXT;
	__builtin_memcpy(macs, ep->mac, 12);	/* and host_mac */
	if (bpf_skb_store_bytes(skb, 0, macs, 12, 0))
		return LONG_WAY;
	return bpf_redirect_peer(IFINDEX_BASE + slot, 0);
}

/* Out by a hop; see leave(). MACs, TTL and its checksum lie within the first
 * bytes of the frame: one store. */
static __always_inline int leave_plain(struct __sk_buff *skb, __u32 epoch, __u32 index, __u8 ttl)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct hop_view *hop = hop_of(epoch, index);
	bool v4 = skb->protocol == bpf_htons(ETH_P_IP);
	__u32 head = v4 ? sizeof(struct ipv4) : sizeof(struct ipv6);
	__u8 front[ETH_HLEN + 12];

	if (!hop || !hop->ifindex || (hop->flags & (HOP_MAC | HOP_DROP)) != HOP_MAC || ttl <= 1)
		return LONG_WAY;
	if ((hop->mtu && !fits(skb, head, hop->mtu)) || data + sizeof(front) > end)
		return LONG_WAY;
	if (config_tunnel && hop->flags & HOP_TUNNEL && enter_tunnel(skb, hop))
		return LONG_WAY;
	__builtin_memcpy(front, hop->dmac, 12);	/* and smac */
	__builtin_memcpy(front + 12, data + 12, sizeof(front) - 12);
	if (v4) {
		struct ipv4 *ip = (void *)(front + ETH_HLEN);

		ip->csum = less_ttl_csum(ip->csum, ttl);
		ip->ttl = ttl - 1;
		if (bpf_skb_store_bytes(skb, 0, front, ETH_HLEN + 12, 0))
			return LONG_WAY;
	} else {
		front[ETH_HLEN + 7] = ttl - 1;
		if (bpf_skb_store_bytes(skb, 0, front, ETH_HLEN + 8, 0))
			return LONG_WAY;
	}
	return bpf_redirect(hop->ifindex, 0);
}

/* The program's answer for a plain packet of a known connection, or LONG_WAY. */
static __always_inline int fast(struct __sk_buff *skb, const __u32 place)
{
	struct plain plain;
	struct ct_key key;

	if (!config_fast || skb->mark == DRY_MARK || skb->vlan_present || !read_plain(skb, &plain))
		return LONG_WAY;
	__u32 epoch = node_epoch(), now = now_seconds();

	if (!epoch)
		return LONG_WAY;
	if (place == PLACE_FROM_POD && !speaks_for_itself(skb, &plain.ends))
		return LONG_WAY;
	bool high = ct_key_of(&key, &plain.ends);
	struct ct *ct = bpf_map_lookup_elem(&connections, &key);

	if (!ct || ct->epoch != epoch || ct->flags & (CT_NAT_ORIGIN | CT_NAT_REPLY) ||
	    is_later(now, ct->seen, ct_timeout(ct, plain.ends.proto)))
		return LONG_WAY;
	bool reply = high != !!(ct->flags & CT_ORIGIN_HI);
	__u32 target = ct->target[reply], index = target_index(target);
	int verdict = LONG_WAY;

	if (place == PLACE_FROM_NET && !comes_from(skb, epoch, ct->target[!reply]))
		return LONG_WAY;
	if (target_kind(target) == TO_LOCAL)
		verdict = deliver_plain(skb, place, index);
	else if (target_kind(target) == TO_HOP && place == PLACE_FROM_POD)
		verdict = leave_plain(skb, epoch, index, plain.ttl);
	else if (target_kind(target) == TO_HOST && place == PLACE_FROM_POD)
		verdict = TCX_NEXT;
	if (verdict != LONG_WAY)
		ct_follow(ct, plain.tcp_flags, reply, now);
	return verdict;
}

#endif
