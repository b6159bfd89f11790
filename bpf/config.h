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

/* Ticks of a second (lockgate/bpf/clock.py), 0 = ask the kernel's clock, by a call with
 * every packet: where returns are dear (Safe RET), 20 ns. */
const volatile __u32 config_hz = 0;

/* 0 removes the code that tunnels packets to other nodes. */
const volatile __u32 config_tunnel = 1;

/* Ports that masquerade may take, host order, both included: below what the
 * kernel gives to the node's own sockets (ip_local_port_range) and below NodePorts. */
const volatile __u16 masquerade_port_min = 10000;
const volatile __u16 masquerade_port_max = 29999;

#endif
