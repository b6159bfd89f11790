/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * types.h: every record that crosses the border between the kernel and
 * user space. This file is the only schema: Python derives its numpy dtypes
 * and its names for enumerators from the BTF that clang makes of it.
 *
 * Addresses are 16 bytes in network order; IPv4 is ::ffff:a.b.c.d.
 * Ports are big-endian where the field says __be16, else host order.
 */
#ifndef LOCKGATE_TYPES_H
#define LOCKGATE_TYPES_H

#include <linux/bpf.h>		/* struct bpf_spin_lock */

/* A pod's host veth is created with interface index IFINDEX_BASE + slot, so
 * that finding the endpoint behind a packet is arithmetic, not a look-up. */
#define IFINDEX_BASE  65536
#define MAX_ENDPOINTS 4096
#define MAX_HOPS      4096
#define NO_SLOT       0xffffffffu

/* Aligned so that copies are by words; no layout below depends on it. */
struct addr {
	__u8 b[16];
} __attribute__((aligned(4)));

/* Maps outlive the agent that made them, and the next one knows them by their
 * layout (lockgate/bpf/pins.py). What no layout tells: raise the number when the
 * same words mean something else in what the agent publishes, the verdict image
 * above all. Of what the programs remember, numbers never change their meaning. */
enum format {
	FORMAT_PUBLISHED = 1,
};

/* ---- The node's state: one element, mapped into the agent ---------------- */

/* Everything that a verdict reads exists in two views. A packet reads `epoch`
 * once and uses view [epoch & 1] throughout; the agent writes the other view
 * and then moves the epoch. */
struct node_state {
	__u32 epoch;
	__u32 capture;		/* bytes of the packet that ride on an event; 0 = none */
	__u32 tunnel_port;	/* UDP port of our VXLAN device, host order; 0 = there is none */
	__u32 host_backends;	/* processes of the node serve frontends: see to_net.h */
	struct addr node4, node6;	/* its InternalIPs, where its node ports are; or all zero */
};

/* The last id of each kind that was given out: no program reads it. It lasts as
 * long as ids can be in other maps and in the ring, whatever becomes of the
 * journal on disk. */
struct last_ids {
	__u32 endpoint, reason, service;
	__u32 pad;
};

/* ---- Peers: what an address is ------------------------------------------- */

enum peer_kind {
	PEER_NONE   = 0,	/* absent in this view: ask the CIDR trie */
	PEER_LOCAL  = 1,	/* pod on this node; target = endpoint slot */
	PEER_REMOTE = 2,	/* pod on another node; target = hop */
	PEER_NODE   = 3,	/* another node's own address; target = hop */
	PEER_HOST   = 4,	/* this node's own address */
};

struct peer_view {
	__u32 class;		/* equivalence class, index into policy rows */
	__u32 endpoint;		/* endpoint id, 0 when not a pod */
	__u32 kind;		/* enum peer_kind */
	__u32 target;		/* slot or hop, by kind */
};

/* The lock of a hash's value is for the agent: under it the kernel writes the
 * value where it is (BPF_F_LOCK). Otherwise it would put another element in the
 * place of this one, whose memory is the next key's at once, and a packet that
 * found this one would read that. Programs never take it: the view that they
 * read is written with what it has. */
struct peer {
	struct peer_view view[2];
	struct bpf_spin_lock lock;
};

/* ---- Endpoints: pods of this node, array by slot ------------------------- */

enum endpoint_flag {
	EP_LIVE     = 1,	/* the slot is in use */
};

enum isolation {
	ISOLATED_INGRESS = 1,
	ISOLATED_EGRESS  = 2,
};

#define NO_CLASS 0xffffffffu

/* class4 and class6 are what `peers` says of addr4 and addr6, so that the pod
 * at a hook need not be looked up; NO_CLASS where the address is not its own in
 * this view (not published, another pod's, a node's) or there is none. */
struct endpoint_view {
	__u32 rows;		/* image word of the policy's rows, by class */
	__u32 cols;		/* image word of the policy's columns, by port class */
	__u32 isolated;		/* enum isolation bits */
	__u32 endpoint;		/* id of the pod that all this is about */
	__u32 class4;		/* its class as a peer, by family */
	__u32 class6;
};

struct endpoint {
	__u32 id;		/* never reused on this node; 0 = slot free */
	__u32 flags;		/* enum endpoint_flag bits */
	__u8  mac[6];		/* of eth0 in the pod */
	__u8  host_mac[6];	/* of the host veth */
	__u32 mtu;
	struct addr addr4;	/* all zero = the pod has none of this family */
	struct addr addr6;
	struct endpoint_view view[2];
};

/* ---- The verdict image ---------------------------------------------------- */

/* An array of 64-bit words per view, built by the compiler, replaced whole:
 *
 *   IMAGE_PORTS  3 x 65536 port classes, __u16 each, 4 to a word;
 *                index = (TCP 0, UDP 1, SCTP 2) * 65536 + port
 *   IMAGE_CIDRS  a trie per family, of slots, __u32 each. Slot 0 stands for all
 *                of IPv4, slot 1 for all of IPv6. A slot is a class, or with
 *                CIDR_NEXT set says how to go on, at word CIDR_WORD from here:
 *                  CIDR_STRIDE n > 0: a slot for each value of the next n bits;
 *                  0: 2 words, for many bits at once. The low CIDR_SKIP bits of
 *                     the first say how many; where its highest are those of
 *                     the address, the low slot of the second word follows,
 *                     else the high one.
 *   then         rows, columns, cells, backends, wherever the views point:
 *     row word    [rows + class]      low half: first cell word for ingress,
 *                                     high half: for egress
 *     column word [cols + port class] low half: column for ingress,
 *                                     high half: for egress
 *     cell word   [cell + column]     low half: enforced, high half: pending
 *     backend     3 words: address (2), then {__be16 port, __u16 flags,
 *                                     __u32 endpoint id}
 *     owner       struct owner: as a backend, and where it is
 *     slot        the numbers of OWNERS owners, number_bits each, the first in the
 *                 lowest bits; all ones, no owner's number, from where there are
 *                 no more. As many slots as fit are a word, from its lowest bits on
 *     range       one word: the roots of a CIDR trie, as IMAGE_CIDRS; class 1 is
 *                 in one of the ranges
 * Port class 0 is "a protocol without ports". Class 0 is "no rule names it".
 */
#define IMAGE_PORTS       0
#define IMAGE_PORT_WORDS  49152
#define IMAGE_CIDRS       IMAGE_PORT_WORDS
#define CIDR_NEXT         0x80000000u
#define CIDR_STRIDE       0x7c000000u
#define CIDR_STRIDE_SHIFT 26
#define CIDR_WORD         0x03ffffffu
#define CIDR_SKIP         63
#define CIDR_LEVELS       17	/* 16 that use 8 bits or more, and a class */
#define BACKEND_WORDS     3
#define OWNERS            4

#define CELL_ALLOW        0x80000000u	/* clear = deny */
#define CELL_LOG          0x40000000u
#define CELL_REASON       0x3fffffffu	/* interned reason id; 0 = no policy */

/* ---- Services -------------------------------------------------------------- */

struct service_key {
	struct addr addr;
	__be16 port;		/* with proto 0 and port 0: the address is a service's */
	__u8   proto;
	__u8   pad;
};

enum service_flag {
	SVC_PRESENT   = 1,	/* exists in this view */
	SVC_FRONTEND  = 2,	/* for clients outside the cluster too: `table` */
	SVC_SNAT      = 4,	/* they reach other nodes' backends as this node; else DSR */
	SVC_LOCAL     = 8,	/* only this node's backends serve them: drop if none does */
	SVC_RANGES    = 16,	/* serves only sources in `ranges`, pods included */
	SVC_OPEN      = 32,	/* without port: a host's address too, other ports are the host's */
	SVC_HOST_ONLY = 64,	/* loopback: for the node's own sockets only */
	SVC_INTERNAL_LOCAL = 128,	/* the same as SVC_LOCAL, for clients in the cluster */
};

struct service_view {
	__u32 id;		/* service id, resolves through the journal */
	__u32 backends;		/* image word of the first backend, for clients in the cluster */
	__u16 count;		/* of backends; 0 = refuse */
	__u16 flags;		/* enum service_flag bits */
	__u32 affinity;		/* seconds that a client keeps its backend; 0 = none */
	/* SVC_FRONTEND: */
	__u32 table;		/* image word of the first slot */
	__u32 owners;		/* image word of the first owner */
	__u8  slot_bits;	/* the table has 1 << slot_bits slots */
	__u8  number_bits;	/* of an owner's number in them: 2, 4, 8 or 16 */
	__u16 owner_count;	/* 0 = there is no table. All end, or none: refuse, or drop (SVC_LOCAL) */
	__u32 ranges;		/* SVC_RANGES: image word of the roots */
};

/* A backend as a table's owner, BACKEND_WORDS words of the image. */
struct owner {
	struct addr addr;
	__be16 port;
	__u16 flags;		/* enum owner_flag bits */
	__u32 target;		/* target_kind << 28 | slot or hop; TO_HOST: this node's process;
				 * TO_NOWHERE: outside the cluster, by this node's routes */
} __attribute__((aligned(8)));

enum owner_flag {
	OWNER_ENDS = 1,		/* takes no new connections: none does, where such a one is first */
};

#define FLOW_STRANGER 0x80000000u	/* of a target: the client is no peer in that epoch */
#define FLOW_WAYS     2
#define FLOW_TAG_SETS 4	/* whose tags are one word */

/* What was chosen lately for a flow from outside: client → frontend, which the hash stands for
 * (another with the same would be of the same client, and is no harm to others). One cache line. */
struct flow {
	struct addr client;
	struct addr addr;	/* the backend */
	__be16 sport;		/* the client's */
	__be16 port;		/* the backend's */
	__u32 hash;		/* flow_hash() of client and frontend */
	__u32 service;		/* service id */
	__u32 seen;		/* seconds, monotonic */
	/* Read and written as one word: target of the backend, as its owner's, with FLOW_STRANGER;
	 * epoch in which it was known to serve, 0 = nothing is here. */
	__u32 target, epoch;
	__u64 spare;
} __attribute__((aligned(8)));

/* Where a flow can be, by its hash. */
struct flow_set {
	struct flow way[FLOW_WAYS];
};

struct service {
	struct service_view view[2];
	struct bpf_spin_lock lock;
};

/* Is this address a backend of this service? Asked when a UDP connection is
 * judged again, so that it can move away from a backend that went. */
struct backend_key {
	struct addr addr;
	__u32 service;
	__be16 port;
	__u8   proto;
	__u8   pad;
};

enum liveness {			/* bits: whose new connections it takes, by the lists that have it */
	LIVE_INSIDE  = 1,	/* of clients in the cluster */
	LIVE_LOCAL   = 2,	/* of those who ask where SVC_INTERNAL_LOCAL is */
	LIVE_OUTSIDE = 4,	/* of clients outside */
	LIVE_KEEPS   = 8,	/* nobody's: it has what it had. An owner that ends; of UDP any that serves */
};

struct backend_state {
	__u8 live[2];		/* per view: enum liveness bits; 0: no backend */
	__u8 pad[2];
	struct bpf_spin_lock lock;
};

/* What a socket asked and what it got, both ways round:
 * (cookie, backend) -> service address, (cookie, service address) -> backend. */
struct socket_key {
	__u64 cookie;
	struct addr addr;
	__be16 port;
	__u8   proto;
	__u8   pad[5];
};

struct socket_peer {
	struct addr addr;
	__u32 service;		/* service id */
	__be16 port;
	__u16 pad;
};

/* A client of a service with affinity and the backend that it keeps. Who asks
 * by a socket is known by its network namespace, for its address may not be
 * chosen yet; else by address. Either has one for each family. */
struct affinity_key {
	__u64 client[2];	/* cookie of the namespace, and 4 or 6; or the address */
	__u32 service;
	__u32 by_address;
};

struct affinity {
	struct addr addr;
	__be16 port;
	__u16 pad;
	__u32 seen;		/* seconds, monotonic: when a connection began last */
};

/* ---- Hops: where packets leave the node ----------------------------------- */

/* VXLAN network identifier of all nodes. */
#define TUNNEL_ID 0x6c67

enum hop_flag {
	HOP_MAC  = 1,		/* dmac and smac are known: no neighbour look-up */
	HOP_MASQ = 2,		/* leaves the cluster: masquerade pod sources */
	HOP_DROP = 4,		/* no way there: drop as unroutable */
	HOP_TUNNEL = 8,		/* ifindex is the VXLAN device; with HOP_MAC */
	HOP_XDP  = 16,		/* XDP may send by the link; with HOP_MAC */
};

struct hop_view {
	__u32 ifindex;
	__u32 flags;		/* enum hop_flag bits */
	__u8  dmac[6];
	__u8  smac[6];
	__u32 mtu;
	struct addr via4;	/* next hop; all zero = ask the kernel's routes */
	struct addr via6;
	struct addr masq4;	/* source address after masquerade */
	struct addr masq6;
	struct addr remote;	/* HOP_TUNNEL: outer addresses, both of one family */
	struct addr local;
};

struct hop {			/* all zero = no way there */
	struct hop_view view[2];
};

struct route_key {		/* longest prefix; for what is no peer */
	__u32 prefixlen;	/* in bits of the 16-byte address */
	struct addr addr;
};

/* Role of an interface of the node, by interface index. */
enum link_role {
	LINK_UNDERLAY = 1,	/* other nodes: carries pod addresses */
	LINK_OUTSIDE  = 2,	/* the world: pod addresses from here are spoofed */
	LINK_TUNNEL   = 3,	/* VXLAN device: other nodes, each for its own pods */
};

/* ---- Connections ------------------------------------------------------------ */

struct tuple {
	struct addr saddr, daddr;
	__be16 sport, dport;	/* ICMP echo: identifier towards the echoing side */
	__u8   proto;
	__u8   pad[3];
} __attribute__((aligned(8)));

/* Canonical: the lower (address, port) first, so that both directions of a
 * connection find it with one look-up. */
struct ct_key {
	struct addr lo, hi;
	__be16 lo_port, hi_port;
	__u8   proto;
	__u8   pad[3];
} __attribute__((aligned(8)));

enum ct_state {
	CT_NEW         = 1,	/* no reply seen; in the half-open map, if it is the first of its key */
	CT_ESTABLISHED = 2,
	CT_CLOSING     = 3,	/* one side sent FIN, or SHUTDOWN (SCTP) */
	CT_CLOSED      = 4,	/* both did, or RST, or ABORT */
};

enum ct_flag {
	CT_ORIGIN_HI  = 1,	/* the originator is the higher end of the key */
	CT_EXEMPT     = 2,	/* begun by this node, or a pod talking to itself: no verdicts */
	CT_NAT_ORIGIN = 4,	/* originator's packets: look in nat after this entry */
	CT_NAT_REPLY  = 8,	/* responder's packets: likewise */
	CT_FIN_ORIGIN = 16,
	CT_FIN_REPLY  = 32,
	CT_SERVICE    = 64,	/* reached through a service; see `service` */
	CT_RST_REPLY  = 128,	/* closed by a reset of the responder's, not the originator's */
};

/* Targets tell where packets of one direction go, without another look-up of
 * peers: enum target_kind in the upper 4 bits, slot or hop in the lower 28. */
enum target_kind {
	TO_NOWHERE = 0,
	TO_LOCAL   = 1,		/* endpoint slot */
	TO_HOP     = 2,		/* hop */
	TO_HOST    = 3,		/* this node's stack */
};

/* Seconds without a packet after which an entry no longer counts, and the
 * sweep takes it out. */
enum timeout {
	TIMEOUT_HALF_OPEN   = 60,	/* and SCTP after an ABORT */
	TIMEOUT_ESTABLISHED = 5 * 24 * 3600,	/* TCP, SCTP: as Linux itself */
	TIMEOUT_CLOSING     = 3600,	/* the other side may still have much to say */
	TIMEOUT_CLOSED      = 10,
	TIMEOUT_DATAGRAM    = 180,	/* UDP, ICMP and the like */
	TIMEOUT_FRAGMENT    = 30,
};

struct ct {
	__u32 seen;		/* seconds since boot: now_seconds() */
	__u32 epoch;		/* that judged it */
	__u8  state;		/* enum ct_state */
	__u8  flags;		/* enum ct_flag bits */
	__u16 tag;		/* of the key: elements change hands at any time */
	__u32 src_endpoint;	/* originator's endpoint id, 0 = not a pod */
	__u32 dst_endpoint;
	__u32 target[2];	/* [0] originator's packets, [1] replies */
	__u32 service;		/* service id or 0 */
	/* With its key and what the kernel puts before both, an element is two cache
	 * lines, and never part of a third: a connection's first packet waits for each. */
	__u32 spare[2];
} __attribute__((aligned(8)));	/* two words are swapped whole: see ct_reopen() */

/* NAT: a packet with the tuple of the key becomes a packet with tuple `to`.
 * One engine for masquerade, services per packet and hairpin. */
struct nat {
	struct tuple to;
	__u32 seen;
	__u32 pad;
};

struct frag_key {
	struct addr saddr, daddr;
	__u32 id;
	__u8  proto;
	__u8  pad[3];
};

struct frag {
	__be16 sport, dport;
	__u32 seen;
};

/* ---- Events ------------------------------------------------------------------ */

enum event_type {
	EVENT_VERDICT = 1,	/* a policy verdict, allowed or denied */
	EVENT_DROP    = 2,	/* dropped for another cause: see `cause` */
};

enum verdict {
	VERDICT_DENY  = 0,
	VERDICT_ALLOW = 1,
};

enum direction {
	DIR_NONE    = 0,
	DIR_INGRESS = 1,
	DIR_EGRESS  = 2,
};

enum place {
	PLACE_FROM_POD = 1,
	PLACE_TO_POD   = 2,
	PLACE_FROM_NET = 3,
	PLACE_TO_NET   = 4,
	PLACE_XDP      = 5,
};

/* Why a packet was dropped. The names are what users see, lower-cased, with
 * dashes: CAUSE_SPOOFED_SOURCE is "spoofed-source". */
enum cause {
	CAUSE_NONE               = 0,
	CAUSE_POLICY             = 1,
	CAUSE_MALFORMED          = 2,	/* truncated or inconsistent headers */
	CAUSE_SPOOFED_MAC        = 3,
	CAUSE_SPOOFED_SOURCE     = 4,
	CAUSE_SPOOFED_ARP        = 5,
	CAUSE_SPOOFED_NDP        = 6,
	CAUSE_ROUTER_ADVERTISEMENT = 7,
	CAUSE_NDP_REDIRECT       = 8,
	CAUSE_UNKNOWN_ETHERTYPE  = 9,
	CAUSE_MULTICAST          = 10,
	CAUSE_FRAGMENT_UNTRACKED = 11,
	CAUSE_NO_ROUTE           = 12,
	CAUSE_NO_BACKEND         = 13,	/* rejected: RST or ICMP was sent */
	CAUSE_SCTP_PORT_REWRITE  = 14,
	CAUSE_NAT_EXHAUSTED      = 15,
	CAUSE_TTL_EXCEEDED       = 16,
	CAUSE_PACKET_TOO_BIG     = 17,
	CAUSE_NAT_FAILED         = 18,
	CAUSE_ENDPOINT_GONE      = 19,
	CAUSE_UNKNOWN_SERVICE_PORT = 20,
	CAUSE_EXTENSION_HEADER   = 21,	/* IPv6 header chain we do not follow */
	CAUSE_NOT_READY          = 22,	/* no state published yet */
	CAUSE_NEW_CONNECTION_RATE = 23,	/* the pod begins too many a second */
	CAUSE_TUNNEL_STRANGER    = 24,	/* brings tunnel packets, and is no node or comes from outside */
	CAUSE_FRAGMENT_RATE      = 25,	/* first fragments of, or for, one pod: too many a second */
	CAUSE_UNRELATED_ERROR    = 26,	/* a pod's ICMP error about nothing that it was sent */
	CAUSE_SOURCE_RANGE       = 27,	/* not in the service's loadBalancerSourceRanges */
	CAUSE_NO_LOCAL_BACKEND   = 28,	/* traffic policy Local, and no backend here */
	CAUSE_NO_FRONTEND        = 29,	/* encapsulated, but inside is no frontend of the pod */
	CAUSE_FIREWALL           = 30,	/* by an entry of the firewall, or its default */
	CAUSE_FIREWALL_RATE      = 31,	/* over the packets a second of its source */
	CAUSE_MAX
};

#define EVENT_CAPTURE_MAX 128

struct event {
	__u64 time;		/* ns, CLOCK_BOOTTIME */
	struct addr saddr, daddr;
	__be16 sport, dport;	/* ICMP: type and code, as numbers of that order */
	__u8  proto;
	__u8  type;		/* enum event_type */
	__u8  verdict;		/* enum verdict */
	__u8  direction;	/* enum direction */
	__u8  tcp_flags;
	__u8  cause;		/* enum cause */
	__u8  place;		/* enum place */
	__u8  captured;		/* bytes of the packet in `head` of the raw record */
	__u32 src_endpoint;
	__u32 dst_endpoint;
	__u32 class;		/* of the peer that was judged */
	__u32 reason;		/* interned reason id, 0 = no policy applies */
	__u32 service;		/* service that was asked, 0 = none */
	__u32 ifindex;
	__u32 length;		/* of the packet, from the IP header on */
	__u32 epoch;
	__u32 pending;		/* cell of the pending (audit) view */
	__u32 line;		/* source line of a drop */
	/* A connection within the node is judged in both directions, but one record
	 * tells both: this is that of ingress, and these are class, reason and
	 * pending cell of egress, which allowed it. Cell 0: no other verdict. */
	__u32 egress_class;
	__u32 egress_cell;	/* enforced: CELL_ALLOW and the reason */
	__u32 egress_pending;
};

/* Second ring, for records that carry the first bytes of the packet. */
struct event_raw {
	struct event event;
	__u8 head[EVENT_CAPTURE_MAX];
};

/* Exact losses and totals, per CPU, array by enum counter. */
enum counter {
	COUNT_EVENTS       = 0,	/* written to the rings; a record may tell two */
	COUNT_EVENTS_LOST  = 1,	/* no room in the ring */
	COUNT_FORWARDED    = 2,	/* new connections forwarded */
	COUNT_UNANSWERED   = 3,	/* ICMP errors and resets not sent: over the limit */
	COUNT_EVENTS_CUT   = 4,	/* not written: too many a second about one pod */
	COUNT_CROWDED      = 5,	/* connections begun towards a pod over its budget */
	COUNT_BALANCED     = 6,	/* packets that XDP sent on to another node's backend */
	COUNT_CAUSE        = 8,	/* + enum cause: packets dropped */
};
#define COUNTERS 64

/* ---- Dry runs ------------------------------------------------------------------ */

/* A test run whose context carries this mark asks "what would happen": the
 * packet is judged as a new connection and nothing is written. The answer is
 * left in cb[]. No packet from a pod or a network card can carry a mark at the
 * places where we look. */
#define DRY_MARK 0x6c6b6761u

enum dry_answer {		/* index into __sk_buff.cb */
	DRY_RESULT  = 0,	/* enum verdict | cause << 8 | directions judged << 16 */
	DRY_EGRESS  = 1,	/* enforced cell of the egress verdict */
	DRY_INGRESS = 2,	/* enforced cell of the ingress verdict */
	DRY_TARGET  = 3,	/* target_kind << 28 | slot or hop */
	DRY_SERVICE = 4,	/* service id or 0 */
};

#endif
