/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * tunnel.h: VXLAN (RFC 7348) by the kernel's device in external mode: the
 * outer addresses travel beside the packet, and the device makes or takes off
 * the outer headers.
 */
#ifndef LOCKGATE_TUNNEL_H
#define LOCKGATE_TUNNEL_H

#include "packet.h"

/* Give the packet the outer addresses of its hop. 0 on success. */
static __always_inline int enter_tunnel(struct __sk_buff *skb, const struct hop_view *hop)
{
	struct bpf_tunnel_key key = { .tunnel_id = TUNNEL_ID };

	if (is_v4(&hop->remote)) {
		key.remote_ipv4 = bpf_ntohl(*(__be32 *)&hop->remote.b[12]);
		key.local_ipv4 = bpf_ntohl(*(__be32 *)&hop->local.b[12]);
		/* RFC 7348 4: "SHOULD be transmitted as zero". */
		return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX);
	}
	__builtin_memcpy(key.remote_ipv6, &hop->remote, 16);
	__builtin_memcpy(key.local_ipv6, &hop->local, 16);
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6);
}

/* The UDP port of our VXLAN device in host order, or 0. */
static __always_inline __u32 tunnel_port(void)
{
	__u32 zero = 0;
	struct node_state *node = bpf_map_lookup_elem(&state, &zero);

	return node ? node->tunnel_port : 0;
}

/* The outer addresses of what came through the tunnel: the node that sent it,
 * and the address it sent it to. False: by no tunnel, or by one that is not ours. */
static __always_inline bool tunnel_ends(struct __sk_buff *skb, struct addr *sender, struct addr *receiver)
{
	struct bpf_tunnel_key key;

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0)) {
		map_v4(sender, bpf_htonl(key.remote_ipv4));
		map_v4(receiver, bpf_htonl(key.local_ipv4));
	} else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6)) {
		__builtin_memcpy(sender, key.remote_ipv6, 16);
		__builtin_memcpy(receiver, key.local_ipv6, 16);
	} else {
		return false;
	}
	return key.tunnel_id == TUNNEL_ID;
}

/* Back to the node that sent the packet in hand into the tunnel. 0 on success. */
static __noinline int back_into_tunnel(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key;	/* as the receiver has it: what is ours is `local` */

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX);
	if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		return -1;
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6);
}

/* Did the node at the end of this hop send it, to this end? A call of its own: inlined, the
 * verifier would walk what follows once for each way through here. */
static __noinline int sent_by(struct __sk_buff *skb, const struct hop_view *hop)
{
	struct addr sender __attribute__((aligned(8))), receiver __attribute__((aligned(8)));

	return hop && tunnel_ends(skb, &sender, &receiver) && same_addr(&sender, &hop->remote) &&
	       same_addr(&receiver, &hop->local);
}

#endif
