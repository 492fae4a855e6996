/* SPDX-License-Identifier: MIT */
/* memory.c - madvise over resident pages, and UFFDIO_COPY of many. */
#define _GNU_SOURCE
#include "reference.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static uint8_t *resident(uint64_t pages)
{
	uint8_t *p = map(pages);

	for (uint64_t i = 0; i < pages; i++)
		p[i * PAGE] = 1;
	return p;
}

/* One madvise over all of it. */
uint64_t discard(const struct args *a)
{
	uint8_t *p = resident(a->pages);
	uint64_t t0 = now_ns();

	if (madvise(p, a->pages * PAGE, MADV_DONTNEED))
		die("MADV_DONTNEED");
	t0 = now_ns() - t0;
	unmap(p, a->pages);
	return t0;
}

/* A madvise a range: `run` pages of every `stride`. */
uint64_t discard_scattered(const struct args *a)
{
	uint8_t *p = resident(a->pages);
	uint64_t t0 = now_ns();

	for (uint64_t i = 0; i + a->run <= a->pages; i += a->stride)
		if (madvise(p + i * PAGE, a->run * PAGE, MADV_DONTNEED))
			die("MADV_DONTNEED");
	t0 = now_ns() - t0;
	unmap(p, a->pages);
	return t0;
}

/* One UFFDIO_COPY of `run` pages a time, until `pages` are there. */
uint64_t install(const struct args *a)
{
	uint8_t *p = map(a->pages), *src = resident(a->run);
	int fd = uffd_open(UFFD_FEATURE_SIGBUS);
	uint64_t t0;

	uffd_register(fd, p, a->pages);
	t0 = now_ns();
	for (uint64_t i = 0; i < a->pages; i += a->run) {
		struct uffdio_copy c = { .dst = (uintptr_t)(p + i * PAGE), .src = (uintptr_t)src, .len = a->run * PAGE };

		if (ioctl(fd, UFFDIO_COPY, &c))
			die("UFFDIO_COPY");
	}
	t0 = now_ns() - t0;
	unmap(p, a->pages);
	unmap(src, a->run);
	close(fd);
	return t0;
}
