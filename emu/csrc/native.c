/* SPDX-License-Identifier: MIT */
/*
 * native.c - what a page costs a process of this machine, without a guest: the baseline that a guest's extra work is held
 * against.
 *
 * A fault of an anonymous page, giving it back, mapping and reading a page that the kernel has cached: the things of which a
 * guest's kernel does some more if it tells its host what each page is worth.  Bare system calls in a loop, timed here, so
 * that nothing of the caller's language is in them.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Write to each of `pages` new pages, then unmap them. The ns of either, of all pages. */
int emu_native_fault(uint64_t pages, uint64_t *fault_ns, uint64_t *free_ns)
{
	const size_t len = pages << EMU_FRAME_SHIFT;
	volatile uint8_t *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t t0, t1;

	if (p == MAP_FAILED)
		return -errno;
	madvise((void *)(uintptr_t)p, len, MADV_NOHUGEPAGE);
	t0 = emu_now_ns();
	for (uint64_t i = 0; i < pages; i++)
		p[i << EMU_FRAME_SHIFT] = 1;
	t1 = emu_now_ns();
	munmap((void *)(uintptr_t)p, len);
	*free_ns = emu_now_ns() - t1;
	*fault_ns = t1 - t0;
	return 0;
}

/* Map the first `pages` of a file, and read a byte of each, the kernel mapping those around it; the ns of all. */
int emu_native_map(int fd, uint64_t pages, uint64_t *ns)
{
	const size_t len = pages << EMU_FRAME_SHIFT;
	const uint64_t t0 = emu_now_ns();
	const volatile uint8_t *p = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);

	if (p == MAP_FAILED)
		return -errno;
	for (uint64_t i = 0; i < pages; i++)
		(void)p[i << EMU_FRAME_SHIFT];
	*ns = emu_now_ns() - t0;
	munmap((void *)(uintptr_t)p, len);
	return 0;
}

/* Read `bytes` of a file from its start, `chunk` a call, into one buffer; the ns of all. -ENODATA: it has fewer. */
int emu_native_read(int fd, uint64_t bytes, size_t chunk, uint64_t *ns)
{
	uint8_t *buffer = malloc(chunk);
	uint64_t t0;
	int err = buffer ? 0 : -ENOMEM;

	t0 = emu_now_ns();
	for (uint64_t at = 0; at < bytes && !err;) {
		const size_t want = bytes - at < chunk ? bytes - at : chunk;
		const ssize_t n = pread(fd, buffer, want, (off_t)at);

		if (n <= 0)
			err = n ? -errno : -ENODATA;
		else
			at += (uint64_t)n;
	}
	*ns = emu_now_ns() - t0;
	free(buffer);
	return err;
}
