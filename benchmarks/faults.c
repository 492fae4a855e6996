/* SPDX-License-Identifier: MIT */
/*
 * faults.c - write faults of single 4 KiB pages, served in the three ways that a hypervisor's process has.
 *
 *   inline   UFFD_FEATURE_SIGBUS: the faulting thread's own handler does UFFDIO_COPY
 *   thread   poll, read one message, UFFDIO_COPY, in a second thread
 *   kernel   no userfaultfd: the kernel zero-fills
 *
 * With several threads each touches its own stretch of one mapping; the time is that of the whole, start to last join.
 */
#define _GNU_SOURCE
#include "reference.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int uffd;
static const uint8_t *zeros;

static void copy(uint64_t addr)
{
	struct uffdio_copy c = { .dst = addr & ~(PAGE - 1), .src = (uintptr_t)zeros, .len = PAGE };

	ioctl(uffd, UFFDIO_COPY, &c);
}

static void on_sigbus(int sig, siginfo_t *si, void *context)
{
	(void)sig;
	(void)context;
	copy((uintptr_t)si->si_addr);
}

struct share {
	pthread_t thread;
	uint8_t *p;
	uint64_t pages;
};

static void *touch(void *arg)
{
	struct share *s = arg;

	for (uint64_t i = 0; i < s->pages; i++)
		__atomic_fetch_or(s->p + i * PAGE, 0, __ATOMIC_RELAXED);
	return NULL;
}

static uint64_t timed_touch(uint8_t *p, uint64_t pages, int threads)
{
	struct share *s = calloc((size_t)threads, sizeof(*s));
	uint64_t t0 = now_ns();

	for (int t = 0; t < threads; t++) {
		s[t] = (struct share){ .p = p + pages / (uint64_t)threads * (uint64_t)t * PAGE,
			               .pages = pages / (uint64_t)threads };
		if (t && pthread_create(&s[t].thread, NULL, touch, &s[t]))
			die("pthread_create");
	}
	touch(&s[0]);
	for (int t = 1; t < threads; t++)
		pthread_join(s[t].thread, NULL);
	t0 = now_ns() - t0;
	free(s);
	return t0;
}

static const uint8_t *zero_page(void)
{
	static uint8_t page[PAGE] __attribute__((aligned(4096)));

	return page;
}

uint64_t fault_inline(const struct args *a)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER }, former;
	uint8_t *p = map(a->pages);
	uint64_t ns;

	zeros = zero_page();
	uffd = uffd_open(UFFD_FEATURE_SIGBUS);
	uffd_register(uffd, p, a->pages);
	if (sigaction(SIGBUS, &action, &former))
		die("sigaction");
	ns = timed_touch(p, a->pages, a->threads);
	sigaction(SIGBUS, &former, NULL);
	unmap(p, a->pages);
	close(uffd);
	return ns;
}

struct server {
	pthread_t thread;
	int stop, cpu;
};

static void *serve(void *arg)
{
	struct server *s = arg;
	struct pollfd fds[2] = { { .fd = uffd, .events = POLLIN }, { .fd = s->stop, .events = POLLIN } };

	pin(s->cpu);
	for (;;) {
		struct uffd_msg msg;

		if (poll(fds, 2, -1) < 0)
			die("poll");
		if (fds[1].revents)
			return NULL;
		if (read(uffd, &msg, sizeof(msg)) == sizeof(msg))
			copy(msg.arg.pagefault.address);
	}
}

uint64_t fault_thread(const struct args *a)
{
	struct server s = { .stop = eventfd(0, EFD_CLOEXEC), .cpu = a->cpu };
	uint8_t *p = map(a->pages);
	uint64_t ns, one = 1;

	zeros = zero_page();
	uffd = uffd_open(0);
	uffd_register(uffd, p, a->pages);
	if (pthread_create(&s.thread, NULL, serve, &s))
		die("pthread_create");
	copy((uintptr_t)p); /* the server sleeps in poll by the time that the clock starts */
	usleep(1000);
	ns = timed_touch(p + PAGE, a->pages - 1, a->threads);
	if (write(s.stop, &one, sizeof(one)) != sizeof(one))
		die("eventfd");
	pthread_join(s.thread, NULL);
	unmap(p, a->pages);
	close(uffd);
	close(s.stop);
	return ns;
}

uint64_t fault_kernel(const struct args *a)
{
	uint8_t *p = map(a->pages);
	uint64_t ns = timed_touch(p, a->pages, a->threads);

	unmap(p, a->pages);
	return ns;
}
