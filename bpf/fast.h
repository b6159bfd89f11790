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
 *                 this epoch, in time, without translation but of a TCP answer of a
 *                 service's pod, and no packet that may begin another: known() then judges nothing and tells
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

/* Both addresses of the frame. Written where they are: a helper's call costs more than all
 * that a packet of a known connection is asked here. */
static __always_inline void set_macs(void *frame, const __u8 *macs)
{
	__u32 *to = frame;
	const __u32 *from = __builtin_assume_aligned(macs, 4);

	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
}

/* Into a pod of this node; see deliver(). */
static __always_inline int deliver_plain(struct __sk_buff *skb, __u32 place, __u32 slot)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &slot);

	if (!ep || !(ep->flags & EP_LIVE) || data + ETH_HLEN > end)
		return LONG_WAY;
	if (place == PLACE_TO_POD)
		return TCX_NEXT;
	set_macs(data, ep->mac);	/* and host_mac */
	return bpf_redirect_peer(IFINDEX_BASE + slot, 0);
}

/* Out by a hop; see leave(). */
static __always_inline int leave_plain(struct __sk_buff *skb, __u32 epoch, __u32 index, __u8 ttl)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct hop_view *hop = hop_of(epoch, index);
	bool v4 = skb->protocol == bpf_htons(ETH_P_IP);
	__u32 head = v4 ? sizeof(struct ipv4) : sizeof(struct ipv6);

	if (!hop || !hop->ifindex || (hop->flags & (HOP_MAC | HOP_DROP)) != HOP_MAC || ttl <= 1)
		return LONG_WAY;
	if ((hop->mtu && !fits(skb, head, hop->mtu)) || data + ETH_HLEN + sizeof(struct ipv4) > end)
		return LONG_WAY;
	if (config_tunnel && hop->flags & HOP_TUNNEL && enter_tunnel(skb, hop))
		return LONG_WAY;
	set_macs(data, hop->dmac);	/* and smac */
	if (v4) {
		struct ipv4 *ip = data + ETH_HLEN;

		ip->csum = less_ttl_csum(ip->csum, ttl);
		ip->ttl = ttl - 1;
	} else {
		((struct ipv6 *)(data + ETH_HLEN))->ttl = ttl - 1;
	}
	return bpf_redirect(hop->ifindex, 0);
}

/* What becomes of a pod's answer to a service's client. False: nothing, or not to be done here.
 * Once a second the long way sees it, and says that the translation lives. */
static __always_inline bool answer_of(const struct tuple *t, __u32 now, struct tuple *to)
{
	struct nat *known = t->proto == IPPROTO_TCP ? bpf_map_lookup_elem(&nat, t) : NULL;

	if (!known || known->seen != now)
		return false;
	*to = known->to;
	/* A twin's has the client's other port; and the element may be another's by now. */
	return same_addr(&to->daddr, &t->daddr) && to->dport == t->dport;
}

/* Give the packet the source that the service has; see rewrite(). 0 on success. */
static __always_inline int answer_as(struct __sk_buff *skb, const struct tuple *t, const struct tuple *to)
{
	bool v4 = skb->protocol == bpf_htons(ETH_P_IP);
	__u32 l4 = ETH_HLEN + (v4 ? sizeof(struct ipv4) : sizeof(struct ipv6));
	__s64 diff = bpf_csum_diff((__be32 *)&t->saddr, 16, (__be32 *)&to->saddr, 16, 0);

	if (v4 && bpf_l3_csum_replace(skb, ETH_HLEN + 10, 0, diff, 0))
		return -1;
	if (bpf_l4_csum_replace(skb, l4 + csum_offset(IPPROTO_TCP), 0, diff, BPF_F_PSEUDO_HDR))
		return -1;
	if (store_port(skb, l4, l4 + csum_offset(IPPROTO_TCP), t->sport, to->sport, 0))
		return -1;
	return v4 ? bpf_skb_store_bytes(skb, ETH_HLEN + 12, &to->saddr.b[12], 4, 0)
		  : bpf_skb_store_bytes(skb, ETH_HLEN + 8, &to->saddr, 16, 0);
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

	if (!ct || ct->epoch != epoch || ct->flags & CT_NAT_ORIGIN ||
	    is_later(now, ct->seen, ct_timeout(ct, plain.ends.proto)))
		return LONG_WAY;
	bool reply = high != !!(ct->flags & CT_ORIGIN_HI);
	__u32 target = ct->target[reply], index = target_index(target);
	bool answers = ct->flags & CT_NAT_REPLY;
	struct tuple answer;
	int verdict = LONG_WAY;

	if (answers && !(place == PLACE_FROM_POD && reply && answer_of(&plain.ends, now, &answer)))
		return LONG_WAY;

	if (place == PLACE_FROM_NET && !comes_from(skb, epoch, ct->target[!reply]))
		return LONG_WAY;
	if (target_kind(target) == TO_LOCAL)
		verdict = deliver_plain(skb, place, index);
	else if (target_kind(target) == TO_HOP && place == PLACE_FROM_POD)
		verdict = leave_plain(skb, epoch, index, plain.ttl);
	else if (target_kind(target) == TO_HOST && place == PLACE_FROM_POD && !answers)
		verdict = TCX_NEXT;	/* else see go_up() */
	if (verdict == LONG_WAY)
		return verdict;
	if (answers && answer_as(skb, &plain.ends, &answer))
		return TCX_DROP;	/* memory ran out */
	ct_follow(ct, plain.tcp_flags, reply, now);
	return verdict;
}

#endif
