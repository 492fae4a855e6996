/* SPDX-License-Identifier: MIT */
/* install.c - UFFDIO_COPY of many pages a call. */
#define _GNU_SOURCE
#include "reference.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

static uint8_t *resident(uint64_t pages)
{
	uint8_t *p = map(pages);

	for (uint64_t i = 0; i < pages; i++)
		p[i * PAGE] = 1;
	return p;
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
