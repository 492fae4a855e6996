/* SPDX-License-Identifier: MIT */
/*
 * anatomy.c - what the parts of a fault and of a discard cost, each measured alone: ns, median of rounds.
 *
 * A part that can't be had alone is the difference of two that can.  x86-64 only, for the handler that steps over the
 * faulting instruction.  Usage: anatomy CPU OTHER_CPU; docs/cost-of-a-fault.md reads its output.
 */
#define _GNU_SOURCE
#include "reference.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#define ROUNDS 11
#define N 4096ul /* pages of a round */

static int uffd;
static uint8_t *src;

/* movb $1,(%rdi): three bytes, which the handler steps over */
static inline void poke(uint8_t *p)
{
	__asm__ volatile("movb $1,(%0)" ::"D"(p) : "memory");
}

static void step_over(int sig, siginfo_t *si, void *context)
{
	ucontext_t *uc = context;

	(void)sig;
	(void)si;
#if defined(__x86_64__)
	uc->uc_mcontext.gregs[REG_RIP] += 3;
#else
	(void)uc;
#endif
}

static void copy_one(uint8_t *p)
{
	struct uffdio_copy c = { .dst = (uintptr_t)p, .src = (uintptr_t)src, .len = PAGE };

	ioctl(uffd, UFFDIO_COPY, &c);
}

static void zeropage_one(uint8_t *p)
{
	struct uffdio_zeropage z = { .range = { (uintptr_t)p, PAGE } };

	ioctl(uffd, UFFDIO_ZEROPAGE, &z);
}

static void on_sigbus(int sig, siginfo_t *si, void *context)
{
	(void)sig;
	(void)context;
	copy_one((uint8_t *)((uintptr_t)si->si_addr & ~(PAGE - 1)));
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *ns)
{
	qsort(ns, ROUNDS, sizeof(ns[0]), compare);
	return ns[ROUNDS / 2];
}

/* ns a call of `one` over N fresh pages; `registered`: with the uffd */
static double each(void (*one)(uint8_t *), bool registered, bool resident)
{
	double ns[ROUNDS];

	for (int r = 0; r < ROUNDS; r++) {
		uint8_t *p = map(N);
		uint64_t t0;

		if (registered) {
			uffd = uffd_open(UFFD_FEATURE_SIGBUS);
			uffd_register(uffd, p, N);
		}
		for (uint64_t i = 0; resident && i < N; i++)
			poke(p + i * PAGE);
		t0 = now_ns();
		for (uint64_t i = 0; i < N; i++)
			one(p + i * PAGE);
		ns[r] = (double)(now_ns() - t0) / (double)N;
		unmap(p, N);
		if (registered)
			close(uffd);
	}
	return median(ns);
}

static void handle(int sig, void (*handler)(int, siginfo_t *, void *))
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER };

	if (sigaction(sig, &action, NULL))
		die("sigaction");
}


static void drop_one(uint8_t *p)
{
	madvise(p, PAGE, MADV_DONTNEED);
}

static double drop_run(uint64_t run)
{
	double ns[ROUNDS];
	const uint64_t pages = 16384;

	for (int r = 0; r < ROUNDS; r++) {
		uint8_t *p = map(pages);
		uint64_t t0;

		for (uint64_t i = 0; i < pages; i++)
			poke(p + i * PAGE);
		t0 = now_ns();
		for (uint64_t i = 0; i < pages; i += run)
			madvise(p + i * PAGE, run * PAGE, MADV_DONTNEED);
		ns[r] = (double)(now_ns() - t0) / (double)pages;
		unmap(p, pages);
	}
	return median(ns);
}

static double drop_vectored(void)
{
	double ns[ROUNDS];
	const uint64_t pages = 8192;
	struct iovec iov[1024];

	for (int r = 0; r < ROUNDS; r++) {
		uint8_t *p = map(pages);
		uint64_t t0;

		for (uint64_t i = 0; i < pages; i++)
			poke(p + i * PAGE);
		t0 = now_ns();
		for (uint64_t i = 0; i < pages / 2; i += 1024) {
			for (uint64_t k = 0; k < 1024; k++)
				iov[k] = (struct iovec){ p + 2 * (i + k) * PAGE, PAGE };
			if (syscall(440 /* process_madvise */, -10001 /* PIDFD_SELF_THREAD_GROUP */, iov, 1024, MADV_DONTNEED, 0) < 0)
				return 0;
		}
		ns[r] = (double)(now_ns() - t0) / (double)(pages / 2);
		unmap(p, pages);
	}
	return median(ns);
}

struct echo {
	int ask, answer, cpu;
};

static void *echo(void *arg)
{
	struct echo *e = arg;
	uint64_t v;

	pin(e->cpu);
	while (read(e->ask, &v, sizeof(v)) == sizeof(v) && v != 2)
		if (write(e->answer, &v, sizeof(v)) != sizeof(v))
			die("eventfd");
	return NULL;
}

/* To another thread and back, by eventfd: two wake-ups, four system calls. */
static double ping_pong(int cpu)
{
	struct echo e = { eventfd(0, 0), eventfd(0, 0), cpu };
	pthread_t thread;
	uint64_t one = 1, two = 2, v, t0;
	double ns;

	pthread_create(&thread, NULL, echo, &e);
	usleep(1000);
	t0 = now_ns();
	for (int i = 0; i < 20000; i++)
		if (write(e.ask, &one, 8) != 8 || read(e.answer, &v, 8) != 8)
			die("eventfd");
	ns = (double)(now_ns() - t0) / 20000;
	if (write(e.ask, &two, 8) != 8)
		die("eventfd");
	pthread_join(thread, NULL);
	close(e.ask);
	close(e.answer);
	return ns;
}

static atomic_bool spinning;

static void *spin(void *arg)
{
	pin(*(int *)arg);
	while (atomic_load_explicit(&spinning, memory_order_relaxed))
		;
	return NULL;
}

static void row(const char *what, double ns)
{
	printf("%-72s %9.0f\n", what, ns);
	fflush(stdout);
}

static double syscall_floor(void)
{
	uint64_t t0 = now_ns();

	for (int i = 0; i < 1000000; i++)
		syscall(SYS_getppid);
	return (double)(now_ns() - t0) / 1e6;
}

static double protected(void)
{
	double ns[ROUNDS];

	for (int r = 0; r < ROUNDS; r++) {
		uint8_t *p = map(1);
		uint64_t t0;

		mprotect(p, PAGE, PROT_NONE);
		t0 = now_ns();
		for (uint64_t i = 0; i < N; i++)
			poke(p);
		ns[r] = (double)(now_ns() - t0) / (double)N;
		unmap(p, 1);
	}
	return median(ns);
}

int main(int argc, char **argv)
{
	int cpu = argc > 1 ? atoi(argv[1]) : 0, other = argc > 2 ? atoi(argv[2]) : 1;
	struct args a = { .pages = 16384, .threads = 1, .cpu = cpu };
	pthread_t spinner;

	pin(cpu);
	src = map(1);
	src[0] = 1;
	row("system call that does nothing (getppid)", syscall_floor());
	row("write fault, zero-filled by the kernel", each(poke, false, false));
	row("write to a page that is there", each(poke, false, true));
	handle(SIGSEGV, step_over);
	row("fault that the kernel refuses + signal + sigreturn (PROT_NONE)", protected());
	handle(SIGBUS, step_over);
	row("fault that userfaultfd refuses + signal + sigreturn (SIGBUS feature)", each(poke, true, false));
	row("UFFDIO_COPY of one page, no fault", each(copy_one, true, false));
	row("UFFDIO_ZEROPAGE of one page, no fault", each(zeropage_one, true, false));
	handle(SIGBUS, on_sigbus);
	row("inline fault, all of it (SIGBUS + UFFDIO_COPY + access again)", each(poke, true, false));
	row("thread to thread and back, same core (eventfd)", ping_pong(cpu));
	row("thread to thread and back, another core (eventfd)", ping_pong(other));
	row("thread fault, all of it, service on the same core", (double)fault_thread(&a) / 16384);
	a.pages = 2048;
	a.cpu = other;
	row("thread fault, all of it, service on another core", (double)fault_thread(&a) / 2048);
	row("madvise(MADV_DONTNEED) of one page", each(drop_one, false, true));
	row("  of 512 pages, a page", drop_run(512));
	row("  of 16384 pages, a page", drop_run(16384));
	row("process_madvise of 1024 single pages, a page", drop_vectored());
	atomic_store(&spinning, true);
	pthread_create(&spinner, NULL, spin, &other);
	usleep(1000);
	row("another thread running: madvise of one page", each(drop_one, false, true));
	row("another thread running: of 512 pages, a page", drop_run(512));
	row("another thread running: process_madvise of 1024 single pages, a page", drop_vectored());
	atomic_store(&spinning, false);
	pthread_join(spinner, NULL);
	return 0;
}
