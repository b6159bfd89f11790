/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sock.h: services at the socket, for every process in the node's cgroup.
 *
 * connect() and sendmsg() to a service become calls to one of its backends, so
 * no packet of such a socket ever carries the service's address. recvmsg() and
 * getpeername() turn the backend back into the service the program asked for.
 * What is left untouched here of pods (SCTP, unknown ports of a service's address, what a
 * service serves some sources only) reaches from_pod, which translates, rejects or drops
 * it per packet.
 *
 * IPv4, IPv6 and IPv4-mapped addresses of IPv6 sockets are all 16 bytes here.
 */
#ifndef LOCKGATE_SOCK_H
#define LOCKGATE_SOCK_H

#include <linux/errno.h>
#include <linux/in.h>

#include "backend.h"

enum sock_answer {
	SOCK_REFUSE  = 0,
	SOCK_PROCEED = 1,
};

/* A socket's address as the hooks see it. */
struct sock_name {
	struct addr addr;
	__be16 port;
};

/* A backend as the image holds it: BACKEND_WORDS words. */
struct image_backend {
	struct addr addr;
	__be16 port;
	__u16 flags;
	__u32 endpoint;
};

static __always_inline struct sock_name sock_name4(struct bpf_sock_addr *ctx)
{
	struct sock_name name = { .addr.b = { [10] = 0xff, [11] = 0xff } };
	__u32 ip = ctx->user_ip4;

	__builtin_memcpy(&name.addr.b[12], &ip, 4);
	name.port = (__be16)ctx->user_port;
	return name;
}

static __always_inline struct sock_name sock_name6(struct bpf_sock_addr *ctx)
{
	__u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1],
			ctx->user_ip6[2], ctx->user_ip6[3] };
	struct sock_name name;

	__builtin_memcpy(&name.addr, ip, sizeof(ip));
	name.port = (__be16)ctx->user_port;
	return name;
}

static __always_inline void set_sock_name4(struct bpf_sock_addr *ctx,
					   const struct sock_name *name)
{
	__u32 ip;

	__builtin_memcpy(&ip, &name->addr.b[12], 4);
	ctx->user_ip4 = ip;
	ctx->user_port = name->port;
}

static __always_inline void set_sock_name6(struct bpf_sock_addr *ctx,
					   const struct sock_name *name)
{
	__u32 ip[4];

	__builtin_memcpy(ip, &name->addr, sizeof(ip));
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	ctx->user_port = name->port;
}

static __always_inline struct socket_key socket_key(struct bpf_sock_addr *ctx,
						    const struct sock_name *name)
{
	struct socket_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.addr = name->addr,
		.port = name->port,
		.proto = (__u8)ctx->protocol,
	};

	return key;
}

/* One of the service's backends in the family of `asked`: the one that the client keeps
 * there, or one at random. False when the image has none. */
static __always_inline bool choose_backend(struct bpf_sock_addr *ctx, const struct service_view *service,
					   __u32 epoch, const struct addr *asked, struct sock_name *chosen)
{
	struct affinity_key client = { .service = service->id };
	struct image_backend backend;
	void *image = image_of(epoch);
	__u64 *words[BACKEND_WORDS];
	struct affinity kept;
	__u32 first;

	if (!image || !service->count)
		return false;
	if (service->affinity) {
		client.client[0] = bpf_get_netns_cookie(ctx);
		client.client[1] = is_v4(asked) ? 4 : 6;
		if (affinity_find(&client, service, epoch, (__u8)ctx->protocol, live_inside(service), now_seconds(),
				  false, &kept)) {
			chosen->addr = kept.addr;
			chosen->port = kept.port;
			return true;
		}
	}
	first = service->backends +
		bpf_get_prandom_u32() % service->count * BACKEND_WORDS;
	words[0] = image_word(image, first);
	words[1] = image_word(image, first + 1);
	words[2] = image_word(image, first + 2);
	if (!words[0] || !words[1] || !words[2])
		return false;
	__builtin_memcpy((char *)&backend, words[0], 8);
	__builtin_memcpy((char *)&backend + 8, words[1], 8);
	__builtin_memcpy((char *)&backend + 16, words[2], 8);
	chosen->addr = backend.addr;
	chosen->port = backend.port;
	if (service->affinity)
		affinity_keep(&client, &chosen->addr, chosen->port, now_seconds());
	return true;
}

/* Writes only what is new: of two services with one backend the last asked
 * counts, and the LRU may have evicted one direction without the other. */
static __always_inline void remember(const struct socket_key *key, const struct sock_name *peer,
				     __u32 service)
{
	struct socket_peer *known = bpf_map_lookup_elem(&sockets, key);
	struct socket_peer value = {
		.addr = peer->addr,
		.port = peer->port,
		.service = service,
	};

	if (!known || __builtin_memcmp(known, &value, sizeof(value)))
		bpf_map_update_elem(&sockets, key, &value, BPF_ANY);
}

/* Is it a socket of the node itself, not of a pod with a network of its own? */
static __always_inline bool is_hosts(struct bpf_sock_addr *ctx)
{
	return config_netns_cookie && bpf_get_netns_cookie(ctx) == config_netns_cookie;
}

/* Traffic policy Local, and no backend is here. A pod's packet goes on, to be dropped and told
 * of by from_pod; a process of the node would hear the stack's "no route to host", so it
 * hears what it would in the end where such packets are dropped on their way out. */
static __always_inline enum sock_answer nobody_here(struct bpf_sock_addr *ctx)
{
	if (!is_hosts(ctx))
		return SOCK_PROCEED;
	bpf_set_retval(ctx->protocol == IPPROTO_TCP ? -ETIMEDOUT : -EPERM);
	return SOCK_REFUSE;
}

/* A process of the node asks at a cluster IP, and no service has the port: its packets would
 * leave by a card, and nobody would answer. A pod's are refused by from_pod. */
static __always_inline enum sock_answer nobody_there(struct bpf_sock_addr *ctx, __u32 epoch,
						     const struct sock_name *name)
{
	struct service_key wanted = { .addr = name->addr };
	struct service *address = is_hosts(ctx) ? bpf_map_lookup_elem(&services, &wanted) : NULL;

	if (!address || !is_cluster_ip(address->view[epoch & 1].flags))
		return SOCK_PROCEED;
	bpf_set_retval(-ECONNREFUSED);
	return SOCK_REFUSE;
}

/*
 * Where a socket that wants to talk to `name` shall go: `name` becomes a
 * backend when it is a service, and stays as it is when it is not.
 *
 * A UDP socket keeps its backend of a service while that backend lives, as one
 * exchange may take several datagrams. TCP chooses anew with every connect().
 */
static __always_inline enum sock_answer translate(struct bpf_sock_addr *ctx,
						  struct sock_name *name)
{
	struct service_key wanted = {
		.addr = name->addr,
		.port = name->port,
		.proto = (__u8)ctx->protocol,
	};
	struct socket_key by_service, by_backend;
	struct socket_peer *kept = NULL;
	struct service_view *view;
	struct service *service;
	struct sock_name chosen;
	__u32 epoch;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return SOCK_PROCEED;
	epoch = node_epoch();
	if (!epoch)
		return SOCK_PROCEED;
	service = bpf_map_lookup_elem(&services, &wanted);
	view = service ? &service->view[epoch & 1] : NULL;
	if (!view || !(view->flags & SVC_PRESENT))
		return nobody_there(ctx, epoch, name);
	if (view->flags & (SVC_RANGES | SVC_HOST_ONLY) && !is_hosts(ctx))
		return SOCK_PROCEED;
	if (view->flags & SVC_INTERNAL_LOCAL && !view->count)
		return nobody_here(ctx);

	by_service = socket_key(ctx, name);
	if (ctx->protocol == IPPROTO_UDP)
		kept = bpf_map_lookup_elem(&sockets, &by_service);
	if (kept && kept->service == view->id &&
	    backend_live(epoch, view->id, &kept->addr, kept->port, IPPROTO_UDP)) {
		chosen.addr = kept->addr;
		chosen.port = kept->port;
	} else if (choose_backend(ctx, view, epoch, &name->addr, &chosen)) {
		remember(&by_service, &chosen, view->id);
	} else {
		bpf_set_retval(-ECONNREFUSED);
		return SOCK_REFUSE;
	}
	if (ctx->sk)
		bpf_sk_storage_get(&askers, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	by_backend = socket_key(ctx, &chosen);
	remember(&by_backend, name, view->id);
	*name = chosen;
	return SOCK_PROCEED;
}

/* The service through which this socket reached `name`. False: it did not. */
static __always_inline bool translate_back(struct bpf_sock_addr *ctx, struct sock_name *name)
{
	struct socket_key key = socket_key(ctx, name);
	struct socket_peer *frontend = bpf_map_lookup_elem(&sockets, &key);

	if (!frontend)
		return false;
	name->addr = frontend->addr;
	name->port = frontend->port;
	return true;
}

static __always_inline int sock_towards4(struct bpf_sock_addr *ctx)
{
	struct sock_name name = sock_name4(ctx);
	enum sock_answer answer = translate(ctx, &name);

	set_sock_name4(ctx, &name);
	return answer;
}

static __always_inline int sock_towards6(struct bpf_sock_addr *ctx)
{
	struct sock_name name = sock_name6(ctx);
	enum sock_answer answer = translate(ctx, &name);

	set_sock_name6(ctx, &name);
	return answer;
}

static __always_inline int sock_from4(struct bpf_sock_addr *ctx)
{
	struct sock_name name = sock_name4(ctx);

	if (translate_back(ctx, &name))
		set_sock_name4(ctx, &name);
	return SOCK_PROCEED;
}

static __always_inline int sock_from6(struct bpf_sock_addr *ctx)
{
	struct sock_name name = sock_name6(ctx);

	if (translate_back(ctx, &name))
		set_sock_name6(ctx, &name);
	return SOCK_PROCEED;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	return sock_towards4(ctx);
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	return sock_towards6(ctx);
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sock_towards4(ctx);
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sock_towards6(ctx);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	return sock_from4(ctx);
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	return sock_from6(ctx);
}

SEC("cgroup/getpeername4")
int sock_getpeername4(struct bpf_sock_addr *ctx)
{
	return sock_from4(ctx);
}

SEC("cgroup/getpeername6")
int sock_getpeername6(struct bpf_sock_addr *ctx)
{
	return sock_from6(ctx);
}

#endif
