/* SPDX-License-Identifier: MIT */
/* common.c - mapping, userfaultfd, time: what several measures need. */
#define _GNU_SOURCE
#include "reference.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void die(const char *what)
{
	fprintf(stderr, "reference: %s: %s\n", what, strerror(errno));
	exit(1);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* As emu maps guest RAM: private, anonymous, no reserve, 2 MiB aligned, small pages. */
uint8_t *map(uint64_t pages)
{
	const uint64_t align = 1ul << 21, len = pages * PAGE;
	uint8_t *p = mmap(NULL, len + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t head;

	if (p == MAP_FAILED)
		die("mmap");
	head = -(uintptr_t)p & (align - 1);
	if (head)
		munmap(p, head);
	munmap(p + head + len, align - head);
	p += head;
	if (madvise(p, len, MADV_NOHUGEPAGE))
		die("MADV_NOHUGEPAGE");
	return p;
}

void unmap(uint8_t *p, uint64_t pages)
{
	if (munmap(p, pages * PAGE))
		die("munmap");
}

int uffd_open(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
	if (fd < 0)
		die("userfaultfd");
	if (ioctl(fd, UFFDIO_API, &api))
		die("UFFDIO_API");
	return fd;
}

void uffd_register(int fd, uint8_t *p, uint64_t pages)
{
	struct uffdio_register reg = { .range = { (uintptr_t)p, pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (ioctl(fd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
}

void pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

void pin_list(const char *cpus)
{
	cpu_set_t set;
	char *end;

	CPU_ZERO(&set);
	for (;; cpus = end + 1) {
		CPU_SET((size_t)strtoul(cpus, &end, 10), &set);
		if (*end != ',')
			break;
	}
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}
