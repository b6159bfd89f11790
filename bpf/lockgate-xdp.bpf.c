/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The object of XDP. It has the maps of lockgate.bpf.c, which is loaded first. */
#include "xdp_net.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
