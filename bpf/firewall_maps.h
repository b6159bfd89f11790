/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * firewall_maps.h: the firewall's records and tables (docs/firewall.md, How it
 * works). All but the buckets are written by the agent alone, with the counters
 * as the exception. They have one element until a node has a firewall: the loader
 * sets the sizes that it needs.
 */
#ifndef LOCKGATE_FIREWALL_MAPS_H
#define LOCKGATE_FIREWALL_MAPS_H

#include "maps.h"

enum fw_action {
	FW_NONE        = 0,	/* the number is free */
	FW_ALLOW       = 1,
	FW_DENY        = 2,
	FW_MEMBER      = 3,	/* nodes and pods: by cards that lead to them, else spoofed */
	FW_NOBODY      = 4,	/* nobody can send from there */
	FW_UNSPECIFIED = 5,	/* 0.0.0.0 and ::, to broadcast and multicast only */
};

enum fw_protocol {		/* bits of fw_ports.protocols */
	FW_TCP  = 1,		/* the first three have a table of ports, in this order */
	FW_UDP  = 2,
	FW_SCTP = 4,
	FW_ICMP = 8,		/* of both families */
};

enum fw_size {
	FW_SLOTS       = 1 << 24,
	FW_FILTER_BITS = 18,
	FW_SETS        = 64,		/* port sets, 0 included */
	FW_RULES       = 1 << 16,
	FW_NUMBERS     = 1 << 24,	/* of entries: a slot has 24 bits for one */
	FW_STEPS       = 128,		/* entries of one source that are looked at */
};

/* A slot of IPv4, a /24: the number of the best entry that is no longer, and for
 * each longer length whether it exists inside: bit 24 + n for /(32 - n). */
#define FW_NUMBER  0x00ffffffu
#define FW_LENGTHS 24

/* Lengths that exist inside a /32 of IPv6, or rather inside all that have its
 * hash. Bit n of the first word: /(128 - n), of the second: /(64 - n). */
struct fw_filter {
	__u64 length[2];
};

struct fw_key {			/* a prefix; IPv4's are 96 bits longer */
	struct addr addr;
	__u32 length;
};

/* In place, under its lock: see struct peer. */
struct fw_prefix {
	__u32 number;
	struct bpf_spin_lock lock;
};

struct fw_rule {
	__u8  action;		/* enum fw_action */
	__u8  pad;
	__u16 ports;		/* port set, 0 = any packet */
	__u32 every_ns;		/* that a packet of one source takes of its second; 0 = no limit */
	__u32 reason;		/* id of the journal */
	__u32 spare;
};

/* One cache line. Number 0 ends each chain: it stands for the default, whose rule is 0. */
struct fw_entry {
	__u32 next;		/* less specific, or later in the same prefix */
	__u32 rule;
	__u32 expires;		/* seconds, monotonic; 0 = never */
	__u16 length;		/* of the prefix, of 128 bits */
	__u16 own_rule;		/* for the agent: another than `rule` inside what is built in */
	struct addr addr;
	__u64 packets, bytes;	/* that matched */
	__u64 packets_before, bytes_before;	/* the agent's: of an entry in whose place it came */
};

struct fw_ports {
	__u64 bits[3][1024];	/* by enum fw_protocol */
	__u64 protocols;	/* that have any */
};

struct fw_state {
	__u64 short6;		/* lengths below 32 in use for IPv6, as the second word of a filter */
	__u32 root6;		/* number of the entry of ::/0 */
	__u32 bloom_mask;	/* words of fw_bloom - 1 */
	/* What the programs write has a cache line of its own. */
	__u64 told __attribute__((aligned(64)));	/* bucket of flow records */
};

struct fw_source {		/* an IPv4 address, or a /64 */
	struct addr addr;
	__u32 rule;
	__u32 pad;
};

#define FW_ARRAY(name, record)						\
	struct {							\
		__uint(type, BPF_MAP_TYPE_ARRAY);			\
		__uint(max_entries, 1);					\
		__uint(map_flags, BPF_F_MMAPABLE);			\
		__type(key, __u32);					\
		__type(value, record);					\
	} name SEC(".maps")

/* Filters before what is large: a bit for each slot that is not 0, and two bits in one word for
 * each prefix of the hash (Putze, Sanders and Singler 2007). What they have too many costs a
 * look-up, and nothing else. */
FW_ARRAY(fw_slots_used, __u64);
FW_ARRAY(fw_bloom, __u64);
FW_ARRAY(fw_slots, __u32);
FW_ARRAY(fw_filter6, struct fw_filter);
FW_ARRAY(fw_entries, struct fw_entry);
FW_ARRAY(fw_rules, struct fw_rule);
FW_ARRAY(fw_ports, struct fw_ports);
FW_ARRAY(fw_state, struct fw_state);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fw_key);
	__type(value, struct fw_prefix);
} fw_prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct fw_source);
	__type(value, __u64);
} fw_sources SEC(".maps");

/* As `schema` in lockgate.bpf.c. */
const volatile struct {
	enum fw_action fw_action;
	enum fw_protocol fw_protocol;
	enum fw_size fw_size;
	enum link_role link_role;
	enum cause cause;
	enum counter counter;
} fw_schema;

#endif
