/* SPDX-License-Identifier: MIT */
/*
 * residency.c - what the kernel says is resident, of any range of this process.
 *
 * Three sources, and what each one counts (measured on 6.18):
 *
 *                      own page   shared zero page   swapped   lazily freed   poison marker
 *   smaps Rss             yes            no             no          yes             no        (read in Python)
 *   PAGEMAP_SCAN          yes     yes, and says so   says so        yes         as swapped
 *   mincore               yes           yes             no          yes             no
 *
 * so Rss = PRESENT - PFNZERO, and mincore is an upper bound.  None of them sees that the frames of a partly discarded
 * huge page are still in use.
 */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int emu_residency_scan(uint64_t start, uint64_t len, struct emu_residency *ret)
{
	enum { VEC = 512 };
	struct page_region vec[VEC];
	struct pm_scan_arg arg = {
		.size = sizeof(arg), .start = start, .end = start + len, .vec = (uintptr_t)vec, .vec_len = VEC,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE,
	};
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int err = 0;

	*ret = (struct emu_residency){ 0 };
	if (fd < 0)
		return -errno;
	while (arg.start < arg.end) {
		int n = ioctl(fd, PAGEMAP_SCAN, &arg);

		if (n < 0) {
			err = -errno;
			break;
		}
		for (int i = 0; i < n; i++) {
			int64_t pages = (int64_t)((vec[i].end - vec[i].start) >> EMU_FRAME_SHIFT);

			if (vec[i].categories & PAGE_IS_SWAPPED)
				ret->swapped += pages;
			if (!(vec[i].categories & PAGE_IS_PRESENT))
				continue;
			ret->present += pages;
			if (vec[i].categories & PAGE_IS_PFNZERO)
				ret->zeropage += pages;
			if (vec[i].categories & PAGE_IS_HUGE)
				ret->huge += pages;
		}
		if (arg.walk_end <= arg.start)
			break;
		arg.start = arg.walk_end;
	}
	close(fd);
	return err;
}

int64_t emu_residency_mincore(uint64_t start, uint64_t len)
{
	unsigned char vec[4096];
	int64_t pages = 0;

	while (len) {
		uint64_t part = len < sizeof(vec) << EMU_FRAME_SHIFT ? len : sizeof(vec) << EMU_FRAME_SHIFT;

		if (mincore((void *)(uintptr_t)start, part, vec))
			return -errno;
		for (uint64_t i = 0; i < part >> EMU_FRAME_SHIFT; i++)
			pages += vec[i] & 1;
		start += part;
		len -= part;
	}
	return pages;
}
