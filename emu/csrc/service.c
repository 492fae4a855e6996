/* SPDX-License-Identifier: MIT */
/*
 * service.c - the thread fault service: for kernels without UFFD_FEATURE_SIGBUS, and for faults that a signal can't
 * serve.
 *
 * One thread polls the uffd and a stop descriptor.  It reads up to BATCH messages at once, sorts them by address,
 * drops duplicates (N vCPUs on one page are N messages), merges neighbours of one kind into runs, resolves each run with
 * one ioctl, does the books, and then wakes the sleepers with another.  What one message alone needs (BUSY, LAZY, LOST) goes through the
 * same resolver as the inline service.
 *
 * A fault on a frame that is present by our books is either late (another thread's install came first: wake the
 * sleeper) or tells that the page was taken behind our back; the kernel is asked which, since waking alone would bring
 * the same message for ever.
 *
 * A fault that can't be served (no memory) poisons its frame: the access raises SIGBUS and the guarded copy returns
 * an error.  If the thread itself can't go on, it poisons all that is missing, wakes everybody, and every later call
 * fails: a sleeper must never be left asleep, nor handed zeros by a closed descriptor.
 *
 * Where the thread runs decides its speed by a factor of six (10 us a fault on the faulting thread's core, 60 us on
 * another one that must be woken), so it can be pinned, once, at its start; there is no affinity call per fault.
 */
#define _GNU_SOURCE
#include "core.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define PARKED_MS 2 /* between two tries to have memory for who waits for it */

struct fault {
	uint64_t gfn;
	bool write;
};

static int by_gfn(const void *a, const void *b)
{
	const struct fault *x = a, *y = b;

	return x->gfn < y->gfn ? -1 : x->gfn > y->gfn;
}

/* A frame without a page: an access fails, but what it holds, or will, isn't lost. */
static void mark_missing(struct emu_region *r, uint64_t gfn)
{
	const uint8_t state = emu_state_load(r, gfn);

	if (!emu_state_missing(state) || !emu_state_try(r, gfn, state, EMU_BUSY)) {
		emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, gfn), EMU_FRAME_SIZE); /* it has changed: the access tells */
		return;
	}
	emu_lose(r, gfn, 1);
	emu_state_publish(r, gfn, state);
	emu_state_wake(r, gfn, 1);
}

/* What is missing in [gfn, gfn + count) and can't be had: from now on accesses to it fail. */
void emu_service_refuse(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	const uint64_t end = gfn + count;

	while (gfn < end) {
		uint8_t state = emu_state_load(r, gfn);
		uint64_t n = 0;

		if (state == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (state == EMU_ASIDE || state == EMU_PRESERVED) {
			/* its content exists: a marker makes the access a signal, and the handler tries again, then tells */
			mark_missing(r, gfn++);
			continue;
		}
		if (state != EMU_ZERO && state != EMU_LAZY) {
			gfn++;
			continue;
		}
		while (gfn + n < end && n < EMU_BLOCK_FRAMES && emu_state_load(r, gfn + n) == state &&
		       emu_state_try(r, gfn + n, state, EMU_BUSY))
			n++;
		if (!n)
			continue;
		if (state == EMU_LAZY) /* given back already; present or not, it must not be dropped unseen later */
			madvise(emu_frame(r, gfn), n << EMU_FRAME_SHIFT, MADV_DONTNEED);
		emu_lose(r, gfn, n);
		for (uint64_t k = 0; k < n; k++)
			emu_state_publish(r, gfn + k, EMU_LOST);
		emu_state_moved(r, state, EMU_LOST, (int64_t)n);
		emu_state_wake(r, gfn, n);
		gfn += n;
	}
}

/* Nobody may touch the side region where nothing is: a SIGBUS for the thread that did, as with the other service. */
static void stray(struct emu_region *r, uint64_t addr)
{
	unsigned eagain = 0;
	uint64_t done;

	addr &= ~(uint64_t)(EMU_FRAME_SIZE - 1);
	if (!r->have_poison || emu_uffd_fill(r->uffd, EMU_FILL_POISON, addr, NULL, EMU_FRAME_SIZE, true, &done, &eagain))
		mprotect((void *)(uintptr_t)addr, EMU_FRAME_SIZE, PROT_NONE);
	emu_uffd_wake(r->uffd, addr, EMU_FRAME_SIZE);
}

/* Returns false if there is no room for the page within the budget now: then its sleeper sleeps on. */
static bool serve_one(struct emu_region *r, uint64_t gfn, bool write)
{
	uint8_t state = emu_state_load(r, gfn);

	if (state == EMU_RESIDENT || state == EMU_ZEROMAP) {
		emu_stat_add(r, EMU_STAT_pgfault_spurious, 1);
		emu_fault_vanished(r, gfn, false);
	} else if (state == EMU_LOST || state == EMU_DISCARDED) { /* somebody's madvise has dropped its marker */
		if (emu_state_try(r, gfn, state, EMU_BUSY)) {
			emu_lose(r, gfn, 1);
			emu_state_publish(r, gfn, state);
			emu_state_wake(r, gfn, 1);
		}
	}
	else {
		int err = emu_fault_resolve(r, gfn, write, EMU_GATE_TRY);

		if (err == -EAGAIN)
			return false;
		if (err)
			emu_service_refuse(r, gfn, 1);
	}
	emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, gfn), EMU_FRAME_SIZE);
	return true;
}

/*
 * Faults that wait for memory within the budget (gate.c), while others are served: a page that comes back from aside needs
 * none.  After the deadline a marker is put there, and the frame stays ZERO: the access becomes a signal, the handler tries
 * once more, and it fails with ENOMEM.
 */
struct parked {
	struct fault fault;
	uint64_t since;
};
enum { PARKED = 1024 }; /* more threads than that don't fault at once; if they do, they go first come, first served */
struct parking {
	size_t n;
	struct parked slot[PARKED];
};

/* Tries them again, in the order in which they came; whether one has gone. */
static bool unpark(struct emu_region *r, struct parking *p)
{
	size_t kept = 0, before = p->n;

	for (size_t i = 0; i < p->n; i++) {
		const struct parked parked = p->slot[i];
		const uint64_t waited = emu_now_ns() - parked.since;
		bool late = waited > (uint64_t)r->gate_deadline_ms * 1000000 || atomic_load(&r->closed);

		if (serve_one(r, parked.fault.gfn, parked.fault.write)) {
			emu_gate_parked(r, waited, false);
		} else if (late) {
			emu_gate_parked(r, waited, true); /* before its sleeper is woken, and may look */
			mark_missing(r, parked.fault.gfn);
		} else {
			p->slot[kept++] = parked;
			emu_swapd_kick(r, 64);
		}
	}
	p->n = kept;
	return kept < before;
}

static void park(struct emu_region *r, struct parking *p, struct fault fault)
{
	while (p->n == PARKED && !unpark(r, p))
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	p->slot[p->n++] = (struct parked){ fault, emu_now_ns() };
	emu_swapd_kick(r, 64);
}

static void serve(struct emu_region *r, struct parking *parking, struct fault *faults, size_t n)
{
	size_t kept = 0;

	qsort(faults, n, sizeof(*faults), by_gfn);
	for (size_t i = 0; i < n; i++) {
		if (kept && faults[kept - 1].gfn == faults[i].gfn)
			faults[kept - 1].write |= faults[i].write; /* the page of a writer serves a reader too */
		else
			faults[kept++] = faults[i];
	}
	for (size_t i = 0; i < kept;) {
		size_t run = 0;
		uint64_t done;

		/* fault_around has its own window: one at a time then */
		while (r->fault_around == 1 && i + run < kept && faults[i + run].gfn == faults[i].gfn + run &&
		       faults[i + run].write == faults[i].write &&
		       emu_state_load(r, faults[i + run].gfn) == EMU_ZERO && !emu_gate_charge(r, 1, EMU_GATE_TRY)) {
			if (!emu_state_try(r, faults[i + run].gfn, EMU_ZERO, EMU_BUSY)) {
				emu_gate_uncharge(r, 1);
				break;
			}
			run++;
		}
		if (!run) {
			if (!serve_one(r, faults[i].gfn, faults[i].write))
				park(r, parking, faults[i]);
			i++;
			continue;
		}
		emu_fault_fill(r, faults[i].gfn, run, EMU_ZERO, faults[i].write, NULL, &done);
		emu_gate_uncharge(r, (int64_t)(run - done));
		emu_stat_add(r, faults[i].write ? EMU_STAT_pgfault_write : EMU_STAT_pgfault_read, (int64_t)done);
		if (done && emu_ring_traces_faults(r))
			emu_ring_push(r, EMU_EV_FAULT, faults[i].gfn, done, faults[i].write);
		if (done)
			emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, faults[i].gfn), done << EMU_FRAME_SHIFT);
		/* what failed is ZERO again: once more, each for itself, and refuse what can't be had */
		for (i += done, run -= done; run; i++, run--)
			if (!serve_one(r, faults[i].gfn, faults[i].write))
				park(r, parking, faults[i]);
	}
}

/* Returns 0 when there is nothing more to read, else -errno. */
static int drain(struct emu_region *r, struct parking *parking)
{
	struct uffd_msg msgs[BATCH];
	struct fault faults[BATCH];

	for (;;) {
		int bytes = emu_uffd_read(r->uffd, msgs, sizeof(msgs));
		size_t n = 0;

		if (bytes == -EAGAIN || bytes == -EINTR)
			return 0;
		if (bytes <= 0)
			return bytes ? bytes : -EIO;
		for (size_t i = 0; i < (size_t)bytes / sizeof(msgs[0]); i++) {
			const uint64_t base = (uintptr_t)r->base;

			if (msgs[i].event != UFFD_EVENT_PAGEFAULT)
				continue; /* no event was asked for */
			if (emu_in_side(r, (void *)(uintptr_t)msgs[i].arg.pagefault.address)) {
				stray(r, msgs[i].arg.pagefault.address);
				continue;
			}
			if (msgs[i].arg.pagefault.address < base)
				continue;
			faults[n].gfn = (msgs[i].arg.pagefault.address - base) >> EMU_FRAME_SHIFT;
			faults[n].write = msgs[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE;
			if (faults[n].gfn < r->frames)
				n++;
		}
		emu_stat_add(r, EMU_STAT_service_batches, 1);
		emu_stat_add(r, EMU_STAT_service_messages, (int64_t)n);
		serve(r, parking, faults, n);
	}
}

/* The service can't go on: whatever is missing fails from now on, loudly. */
void emu_service_die(struct emu_region *r, int err)
{
	atomic_store(&r->dead, err);
	emu_ring_push(r, EMU_EV_SERVICE_DIED, 0, 0, err);
	emu_service_refuse(r, 0, r->frames);
	emu_uffd_wake(r->uffd, (uintptr_t)r->base, r->frames << EMU_FRAME_SHIFT);
}

static void *service(void *arg)
{
	struct emu_region *r = arg;
	struct pollfd fds[2] = { { .fd = r->uffd, .events = POLLIN }, { .fd = r->stop_fd, .events = POLLIN } };
	struct parking parking;
	int err = 0;

	parking.n = 0;
	while (!err) {
		if (poll(fds, 2, parking.n ? PARKED_MS : -1) < 0) {
			err = errno == EINTR ? 0 : errno;
			continue;
		}
		if (fds[0].revents & (POLLERR | POLLHUP | POLLNVAL))
			err = EBADF;
		else if (fds[0].revents & POLLIN)
			err = -drain(r, &parking);
		else if (fds[1].revents && !parking.n) /* stop only when no fault is waiting */
			return NULL;
		if (parking.n)
			unpark(r, &parking);
	}
	emu_service_die(r, err);
	return NULL;
}

/* A thread of the core's own, with every signal blocked: the program's are for its own threads. */
int emu_thread_start(pthread_t *ret, void *(*body)(void *), void *arg, const char *name)
{
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(ret, NULL, body, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (!err)
		pthread_setname_np(*ret, name);
	return -err;
}

int emu_service_start(struct emu_region *r, int cpu)
{
	int err;

	r->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (r->stop_fd < 0)
		return -errno;
	err = emu_thread_start(&r->thread, service, r, "emu-fault");
	if (err) {
		close(r->stop_fd);
		r->stop_fd = -1;
		return err;
	}
	r->have_thread = true;
	if (cpu >= 0) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((size_t)cpu, &set);
		err = pthread_setaffinity_np(r->thread, sizeof(set), &set);
		if (err) {
			emu_service_stop(r);
			return -err;
		}
	}
	return 0;
}

void emu_service_stop(struct emu_region *r)
{
	uint64_t one = 1;

	if (!r->have_thread)
		return;
	while (write(r->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(r->thread, NULL);
	close(r->stop_fd);
	r->have_thread = false;
	r->stop_fd = -1;
}
