/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* cidr.h: which of an image's CIDR blocks an address is in. */
#ifndef LOCKGATE_CIDR_H
#define LOCKGATE_CIDR_H

#include "packet.h"

/* Class of an address by the trie whose roots are at image word `root`; slots lead to words
 * from IMAGE_CIDRS on. Without a block of its family that is one read. Not static, so that the verifier walks its
 * loop once and not for each caller. */
__noinline __u32 cidr_class(__u32 epoch, __u32 root, const struct addr *addr)
{
	void *image = image_of(epoch);
	__u64 *word, bits, more = 0;	/* of the address, those not yet used on top */
	__u32 slot;

	if (!image || !addr)
		return 0;
	word = image_word(image, root);
	if (!word)
		return 0;
	if (is_v4(addr)) {
		slot = *word;
		bits = (__u64)bpf_ntohl(((const __be32 *)addr)[3]) << 32;
	} else {
		slot = *word >> 32;
		bits = bpf_be64_to_cpu(((const __be64 *)addr)[0]);
		more = bpf_be64_to_cpu(((const __be64 *)addr)[1]);
	}
	for (int level = 0; level < CIDR_LEVELS; level++) {
		if (!(slot & CIDR_NEXT))
			return slot;
		__u32 at = IMAGE_CIDRS + (slot & CIDR_WORD);
		__u32 stride = (slot & CIDR_STRIDE) >> CIDR_STRIDE_SHIFT;

		if (stride) {
			__u32 index = bits >> (64 - stride);

			word = image_word(image, at + (index >> 1));
			if (!word)
				return 0;
			slot = index & 1 ? *word >> 32 : *word;
		} else {
			__u64 *match = image_word(image, at);

			word = image_word(image, at + 1);
			if (!match || !word)
				return 0;
			stride = *match & CIDR_SKIP;
			slot = (bits ^ *match) >> (64 - stride) ? *word >> 32 : *word;
		}
		bits = bits << stride | more >> (64 - stride);
		more <<= stride;
	}
	return 0;
}

#endif
