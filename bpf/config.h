/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * config.h: what every program includes first: kernel headers, helpers, the
 * schema, and the settings that are fixed when the object is loaded.
 *
 * Settings are read-only to the programs, so the verifier prunes what they
 * switch off. The loader writes them into .rodata before loading.
 */
#ifndef LOCKGATE_CONFIG_H
#define LOCKGATE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "types.h"

/* 0 removes the code that copies packets into events_raw. */
const volatile __u32 config_capture = 1;

/* 0 removes the short way of established connections (fast.h): tests compare. */
const volatile __u32 config_fast = 1;

/* Nanoseconds until what one takes of a pod's budget is back (limit.h), 0 = no
 * limit: an ICMP error or reset that we send it, a connection that it begins, an
 * event about it, a packet in fragments that it sends or gets. */
const volatile __u64 config_answer_ns = 0;
const volatile __u64 config_connection_ns = 0;
const volatile __u64 config_event_ns = 0;
const volatile __u64 config_fragment_ns = 0;

/* 0 removes the table of flows (balance.h): TCP needs none. Nanoseconds until it
 * may learn one more, 0 = always. */
const volatile __u32 config_flows = 1;
const volatile __u64 config_flow_ns = 0;

/* Elements of `flows`, a power of two, less one. */
const volatile __u32 config_flow_mask = 4095;

/* Outer source of encapsulated packets, whose low bits are the flow's hash: a /16
 * of IPv4 in network order, a /96 of IPv6. */
const volatile __u8 config_outer4[4] = { 198, 18, 0, 0 };
const volatile __u8 config_outer6[16] = { 0x01, 0x00 };

/* Cookie of the node's network namespace (SO_NETNS_COOKIE): SVC_HOST_ONLY; 0 = not known. */
const volatile __u64 config_netns_cookie = 0;

/* 0 removes the code that tunnels packets to other nodes. */
const volatile __u32 config_tunnel = 1;

/* Ports that masquerade may take, host order, both included: below what the
 * kernel gives to the node's own sockets (ip_local_port_range) and below NodePorts. */
const volatile __u16 masquerade_port_min = 10000;
const volatile __u16 masquerade_port_max = 29999;

#endif
