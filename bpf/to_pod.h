/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* to_pod: clsact egress of a pod's host veth. What the node's own stack sends. */
#ifndef LOCKGATE_TO_POD_H
#define LOCKGATE_TO_POD_H

#include "fast.h"

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	int verdict = fast(skb, PLACE_TO_POD);

	if (verdict != LONG_WAY)
		return verdict;
	struct packet *p = packet_begin(skb, PLACE_TO_POD);
	struct bpf_sock *sk = skb->sk;

	if (!p)
		return TCX_DROP;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TCX_NEXT;
	p->slot = skb->ifindex - IFINDEX_BASE;
	if (parse(skb, p))
		return drop(skb, p);
	if (is_ndp(p) || is_multicast(&p->wire.daddr))
		return TCX_NEXT;
	/* A packet that the stack forwards has no socket; a node's own has one. */
	if (p->dry)
		p->own_socket = skb->cb[0] == 1;
	else
		p->own_socket = sk && (sk->family == AF_INET || sk->family == AF_INET6);
	return connection(skb, p, PLACE_TO_POD);
}

#endif
