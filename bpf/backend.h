/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* backend.h: what the socket and the packet ask of a service's backends. */
#ifndef LOCKGATE_BACKEND_H
#define LOCKGATE_BACKEND_H

#include "maps.h"

/* Is this address a backend of this service, in the epoch's view? */
static __always_inline bool backend_live(__u32 epoch, __u32 service, const struct addr *addr,
					 __be16 port, __u8 proto)
{
	struct backend_key key = {
		.addr = *addr,
		.service = service,
		.port = port,
		.proto = proto,
	};
	struct backend_state *backend = bpf_map_lookup_elem(&service_backends, &key);

	return backend && backend->live[epoch & 1];
}

#endif
