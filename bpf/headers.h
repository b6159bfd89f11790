/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* headers.h: what is on the wire. */
#ifndef LOCKGATE_HEADERS_H
#define LOCKGATE_HEADERS_H

#include <linux/in.h>
#include <linux/in6.h>

#include "config.h"

#define ETH_HLEN     14
#define ETH_P_IP     0x0800
#define ETH_P_ARP    0x0806
#define ETH_P_IPV6   0x86dd

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* RFC 791, RFC 8200, RFC 768, RFC 9293 header layouts, network order. */
struct ipv4 {
	__u8 version_ihl, tos;
	__be16 length, id, frag;
	__u8 ttl, proto;
	__be16 csum;
	__be32 saddr, daddr;
};

struct ipv6 {
	__be32 version_class_flow;
	__be16 length;
	__u8 next, ttl;
	struct addr saddr, daddr;
};

struct l4_head {		/* what the protocols share at their start */
	__be16 sport, dport;
	__u8 more[10];		/* TCP flags are at more[9] */
};

struct sctp_head {		/* RFC 9260 3: with the first chunk's header */
	__be16 sport, dport;
	__be32 tag, csum;
	__u8 chunk, flags;
	__be16 length;
};

struct icmp_head {
	__u8 type, code;
	__be16 csum, id, seq;
};

#define IPV4_DF   0x4000
#define IPV4_MF   0x2000
#define IPV4_OFF  0x1fff

/* ICMP and ICMPv6 types, RFC 792 and RFC 4443 */
#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACH    3
#define ICMP_ECHO       8
#define ICMP_TIME       11
#define ICMP_PARAM      12
#define ICMP6_UNREACH   1
#define ICMP6_TOO_BIG   2
#define ICMP6_TIME      3
#define ICMP6_PARAM     4
#define ICMP6_ECHO      128
#define ICMP6_REPLY     129
#define MLD_FIRST       130	/* query, report, done: 130..132; report v2: 143 */
#define NDP_RS          133
#define NDP_RA          134
#define NDP_NS          135
#define NDP_NA          136
#define NDP_REDIRECT    137
#define MLD2_REPORT     143

/* Chunk types that begin and end associations, RFC 9260 3.2 */
#define SCTP_INIT              1
#define SCTP_INIT_ACK          2
#define SCTP_ABORT             6
#define SCTP_SHUTDOWN          7
#define SCTP_SHUTDOWN_ACK      8
#define SCTP_SHUTDOWN_COMPLETE 14

static __always_inline bool is_icmp_error(__u8 family, __u8 type)
{
	if (family == 4)
		return type == ICMP_UNREACH || type == ICMP_TIME || type == ICMP_PARAM;
	return type >= ICMP6_UNREACH && type <= ICMP6_PARAM;
}

/* The checksum of an IPv4 header whose TTL becomes one less (RFC 1624): TTL is the high
 * byte of its word. */
static __always_inline __u16 less_ttl_csum(__u16 csum, __u8 ttl)
{
	__u16 sum = ~csum, less = ~bpf_htons(ttl << 8), more = bpf_htons((ttl - 1) << 8);

	sum += less;
	sum += sum < less;
	sum += more;
	sum += sum < more;
	return ~sum;
}

#endif
