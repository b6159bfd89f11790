/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The object that joins the hooks: they share the maps. One file per hook. */
#include "from_pod.h"
#include "to_pod.h"
#include "from_net.h"
#include "to_net.h"
#include "sock.h"

/* Names the enumerations of types.h in the object's BTF, where Python finds
 * them, and the record of events_raw: clang leaves out what only constants and
 * pointers use. */
const volatile struct {
	enum format format;
	enum peer_kind peer_kind;
	enum endpoint_flag endpoint_flag;
	enum isolation isolation;
	enum service_flag service_flag;
	enum owner_flag owner_flag;
	struct owner owner;
	enum hop_flag hop_flag;
	enum link_role link_role;
	enum ct_state ct_state;
	enum ct_flag ct_flag;
	enum target_kind target_kind;
	enum timeout timeout;
	enum event_type event_type;
	enum verdict verdict;
	enum direction direction;
	enum place place;
	enum cause cause;
	enum counter counter;
	enum dry_answer dry_answer;
	struct event_raw event_raw;
} schema;

char LICENSE[] SEC("license") = "Dual BSD/GPL";
