/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* backend.h: what the socket and the packet ask of a service's backends. */
#ifndef LOCKGATE_BACKEND_H
#define LOCKGATE_BACKEND_H

#include "packet.h"

/* Is this address a backend of this service, in the epoch's view? enum liveness bits, or 0. */
static __always_inline __u8 backend_live(__u32 epoch, __u32 service, const struct addr *addr,
					 __be16 port, __u8 proto)
{
	struct backend_key key = {
		.addr = *addr,
		.service = service,
		.port = port,
		.proto = proto,
	};
	struct backend_state *backend = bpf_map_lookup_elem(&service_backends, &key);

	return backend ? backend->live[epoch & 1] : 0;
}

/* Flags of an address: is it a cluster IP, where nothing is but services' ports? Of an address
 * outside that a service asked for it has the ports that it names; others are whosever they are. */
static __always_inline bool is_cluster_ip(__u16 flags)
{
	return (flags & (SVC_PRESENT | SVC_FRONTEND | SVC_OPEN | SVC_HOST_ONLY)) == SVC_PRESENT;
}

/* Which of a service's backends take the new connections of a client in the cluster? */
static __always_inline __u8 live_inside(const struct service_view *view)
{
	return view->flags & SVC_INTERNAL_LOCAL ? LIVE_LOCAL : LIVE_INSIDE;
}

/* The backend that a client keeps, while it is `live` (enum liveness bits, one of which it must
 * have) and the client comes back in time. False: it keeps none. A service has one such client
 * wherever it is asked, but not the same backends there. */
static __always_inline bool affinity_find(const struct affinity_key *key, const struct service_view *view,
					  __u32 epoch, __u8 proto, __u8 live, __u32 now, bool dry,
					  struct affinity *found)
{
	struct affinity *kept = bpf_map_lookup_elem(&affinities, key);

	if (!kept)
		return false;
	*found = *kept;
	if (is_later(now, found->seen, view->affinity))
		return false;
	if (!(backend_live(epoch, view->id, &found->addr, found->port, proto) & live))
		return false;
	if (!dry && found->seen != now)
		kept->seen = now;
	return true;
}

static __always_inline void affinity_keep(const struct affinity_key *key, const struct addr *addr,
					  __be16 port, __u32 now)
{
	struct affinity value = { .addr = *addr, .port = port, .seen = now };

	bpf_map_update_elem(&affinities, key, &value, BPF_ANY);
}

#endif
