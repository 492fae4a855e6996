/* SPDX-License-Identifier: MIT */
/*
 * region.c - a guest RAM as the core holds it, and the registry by which a fault finds its region.
 *
 * The memory is mapped by the caller (Python's mmap) and lent to us until emu_region_close().  Our tables (a state
 * byte a frame, a summary word a block, the event ring, latencies) lie in one lazily populated mapping: a 1 TiB guest has
 * 257 MiB of them and pays for the pages that its faults touch.
 *
 * The registry is read by the SIGBUS handler, so it takes no lock: a slot is claimed and cleared by storing one
 * pointer, and a reader holds the slot by a reference count while it uses the region.
 *
 * Close against a fault under way.  emu_region_close() clears the slot and then waits for its references.  The
 * reader raises the count and then *re-reads* the pointer, both sequentially consistent: either it sees NULL and lets
 * go, or close sees the count.  A thread that goes on touching lent memory after close gets the former handler's
 * SIGBUS, or a fault on an unmapped page; both are loud.
 *
 * Close against calls.  Every entry point counts itself in `calls` and then looks at `closed`; close sets `closed` and
 * then waits for `calls` to be 0 (both sequentially consistent: one of the two sees the other).  This is done here and
 * not in Python, where an interrupt can come between any two steps.  A second closer waits until the first is done.
 *
 * Fork.  The child has neither the memory nor the tables (MADV_DONTFORK), and the uffd that it inherits is its
 * parent's: a fault served through it would land in the parent.  So the child forgets all regions at once, and puts an
 * inaccessible mapping where each RAM was: whatever the child maps later can't come to lie there, where a close() of
 * the parent's object, run in the child, would unmap it.
 */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_REGIONS 1024

static struct registry_slot {
	_Atomic(struct emu_region *) region;
	_Atomic uint64_t start, end;
	_Atomic int refs;
} registry[MAX_REGIONS];
static _Atomic int registry_high;                               /* slots ever used */
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER; /* guards claiming; never taken by a handler */
static int regions_open;                                        /* under registry_lock */

struct emu_region *emu_registry_get(uint64_t addr, uint64_t *gfn_ret)
{
	int high = atomic_load_explicit(&registry_high, memory_order_acquire);

	for (int i = 0; i < high; i++) {
		struct registry_slot *slot = &registry[i];
		struct emu_region *r;

		if (addr < atomic_load_explicit(&slot->start, memory_order_relaxed) ||
		    addr >= atomic_load_explicit(&slot->end, memory_order_relaxed))
			continue;
		atomic_fetch_add(&slot->refs, 1);
		r = atomic_load(&slot->region);
		if (r && addr >= (uintptr_t)r->base && addr - (uintptr_t)r->base < r->frames << EMU_FRAME_SHIFT) {
			*gfn_ret = (addr - (uintptr_t)r->base) >> EMU_FRAME_SHIFT;
			return r;
		}
		atomic_fetch_sub(&slot->refs, 1);
	}
	return NULL;
}

/* Whether any byte of [start, start + len) is guest memory. */
bool emu_registry_overlaps(uint64_t start, uint64_t len)
{
	int high = atomic_load_explicit(&registry_high, memory_order_acquire);

	for (int i = 0; i < high; i++)
		if (start < atomic_load(&registry[i].end) && atomic_load(&registry[i].start) < start + len)
			return true;
	return false;
}

void emu_registry_put(struct emu_region *r)
{
	atomic_fetch_sub(&registry[r->slot].refs, 1);
}

static int registry_add(struct emu_region *r)
{
	int err = -ENOSPC;

	pthread_mutex_lock(&registry_lock);
	for (int i = 0; i < MAX_REGIONS; i++) {
		if (atomic_load(&registry[i].region) || atomic_load(&registry[i].refs))
			continue;
		r->slot = i;
		atomic_store(&registry[i].start, (uintptr_t)r->base);
		atomic_store(&registry[i].end, (uintptr_t)r->base + (r->frames << EMU_FRAME_SHIFT));
		atomic_store(&registry[i].region, r);
		if (i >= atomic_load(&registry_high))
			atomic_store_explicit(&registry_high, i + 1, memory_order_release);
		if (!regions_open++)
			emu_sigbus_watch(true);
		err = 0;
		break;
	}
	pthread_mutex_unlock(&registry_lock);
	return err;
}

static void registry_remove(struct emu_region *r)
{
	struct registry_slot *slot = &registry[r->slot];

	pthread_mutex_lock(&registry_lock);
	atomic_store(&slot->region, NULL);
	while (atomic_load(&slot->refs))
		sched_yield();
	atomic_store(&slot->start, 0);
	atomic_store(&slot->end, 0);
	if (!--regions_open) {
		emu_sigbus_watch(false);
		emu_sigbus_release(); /* leave the process's SIGBUS as it was found */
	}
	pthread_mutex_unlock(&registry_lock);
}

static void forked(void)
{
	for (int i = 0; i < MAX_REGIONS; i++) {
		uint64_t start = atomic_load(&registry[i].start), end = atomic_load(&registry[i].end);

		if (atomic_load(&registry[i].region))
			mmap((void *)(uintptr_t)start, end - start, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
		atomic_store(&registry[i].region, NULL);
		atomic_store(&registry[i].start, 0);
		atomic_store(&registry[i].end, 0);
		atomic_store(&registry[i].refs, 0);
	}
	regions_open = 0;
	pthread_mutex_init(&registry_lock, NULL); /* may have been held by a thread that isn't here */
	emu_sigbus_forked();
	emu_advise_forked();
}

/* One read-only mapping of zero pages for the life of the process: it costs page-table entries and no memory. */
static const uint8_t *zero_source;

static void once_per_process(void)
{
	size_t len = (size_t)EMU_BLOCK_FRAMES << EMU_FRAME_SHIFT;
	uint8_t *p = mmap(NULL, len, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	pthread_atfork(NULL, NULL, forked);
	if (p == MAP_FAILED)
		return;
	madvise(p, len, MADV_NOHUGEPAGE);
	/* Present now: UFFDIO_COPY reads its source with faults off first, and drops its locks to retry. */
	for (size_t i = 0; i < len; i += EMU_FRAME_SIZE)
		(void)*(volatile uint8_t *)(p + i);
	zero_source = p;
}

const uint8_t *emu_zero_source(void)
{
	return zero_source;
}

static size_t pages(size_t bytes)
{
	return (bytes + 4095) & ~(size_t)4095;
}

int emu_region_open(void *base, uint64_t frames, const struct emu_region_options *o, struct emu_region **ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	uint64_t blocks = (frames + EMU_BLOCK_FRAMES - 1) / EMU_BLOCK_FRAMES;
	size_t ring_at, latencies_at, block_rss_at, changed_at, summary_at;
	struct emu_region *r;
	int err;

	if (o->wp_async && !o->move)
		return -EINVAL; /* the other way out would lose writes: aside.c */
	if (!frames || (uintptr_t)base % EMU_FRAME_SIZE || frames > UINT64_MAX >> (EMU_FRAME_SHIFT + 1))
		return -EINVAL;
	if (!o->fault_around || o->fault_around > EMU_BLOCK_FRAMES || (o->fault_around & (o->fault_around - 1)))
		return -EINVAL;
	pthread_once(&once, once_per_process);
	if (!zero_source)
		return -ENOMEM;
	r = aligned_alloc(128, (sizeof(*r) + 127) / 128 * 128);
	if (!r)
		return -ENOMEM;
	memset(r, 0, sizeof(*r));
	r->base = base;
	r->frames = frames;
	r->service = o->service;
	r->uffd = o->service == EMU_SERVICE_OFF ? -1 : o->uffd;
	r->have_poison = o->poison && !(o->disable & EMU_NO_POISON);
	r->vectored = !(o->disable & EMU_NO_PROCESS_MADVISE) && emu_advise_vectored_probe();
	r->fault_around = o->fault_around;
	r->disable = o->disable;
	r->have_wp = o->wp && !o->wp_async && !(o->disable & EMU_NO_WP);
	r->have_wp_async = o->wp_async;
	r->stop_fd = -1;
	pthread_mutex_init(&r->look_lock, NULL);
	pthread_mutex_init(&r->setup, NULL);

	ring_at = 0;
	latencies_at = ring_at + pages(emu_ring_bytes());
	block_rss_at = latencies_at + pages(emu_latencies_bytes());
	changed_at = block_rss_at + pages(blocks * sizeof(*r->block_rss));
	summary_at = changed_at + pages(blocks);
	r->tables_len = summary_at + pages(blocks * sizeof(*r->summary)) + frames;
	r->tables = mmap(NULL, r->tables_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (r->tables == MAP_FAILED) {
		err = -errno;
		goto out_free;
	}
	madvise(r->tables, r->tables_len, MADV_NOHUGEPAGE); /* 2 MiB of states would be a 2 GiB guest's */
	madvise(r->tables, r->tables_len, MADV_DONTFORK);
	r->ring = (struct emu_ring *)(r->tables + ring_at);
	emu_ring_init(r->ring);
	r->latencies = (struct emu_latencies *)(r->tables + latencies_at);
	r->block_rss = (uint16_t *)(r->tables + block_rss_at);
	r->changed = (_Atomic uint8_t *)(r->tables + changed_at);
	r->summary = (_Atomic uint32_t *)(r->tables + summary_at);
	r->state = (_Atomic uint8_t *)(r->tables + r->tables_len - frames);
	r->pagemap_fd = o->disable & EMU_NO_PAGEMAP ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); /* -1: mincore */
	r->have_move = o->move && r->pagemap_fd >= 0 && !(o->disable & EMU_NO_MOVE); /* move.c looks there */

	err = registry_add(r);
	if (err)
		goto out_unmap;
	emu_sigbus_ensure(r);
	if (r->service == EMU_SERVICE_THREAD) {
		err = emu_service_start(r, o->service_cpu);
		if (err)
			goto out_registry;
	}
	*ret = r;
	return 0;

out_registry:
	registry_remove(r);
out_unmap:
	munmap(r->tables, r->tables_len);
	if (r->pagemap_fd >= 0)
		close(r->pagemap_fd);
out_free:
	free(r);
	return err;
}

int emu_region_enter(struct emu_region *r)
{
	atomic_fetch_add(&r->calls, 1);
	if (!atomic_load(&r->closed))
		return 0;
	emu_region_leave(r);
	return -ESHUTDOWN;
}

/* The same, for a call that takes or brings back what is in these ranges: nobody serves what a dead service left. */
int emu_region_enter_at(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int err = emu_ranges_check(r, ranges, n);

	if (!err && atomic_load(&r->dead))
		err = -EOWNERDEAD;
	return err ? err : emu_region_enter(r);
}

void emu_region_forked(struct emu_region *r)
{
	atomic_store(&r->closed, 2);
}

uint8_t *emu_region_bytes(struct emu_region *r)
{
	return (uint8_t *)(uintptr_t)r->state;
}

void emu_region_leave(struct emu_region *r)
{
	if (atomic_fetch_sub(&r->calls, 1) == 1 && atomic_load(&r->closed))
		emu_futex(&r->calls, FUTEX_WAKE, INT32_MAX);
}

/*
 * What may still run when the last call has returned is a handler for a raw access (the registry waits for it) and, with
 * the thread service, sleepers on a missing frame: the service drains what was queued before it stops, since closing a
 * uffd under a sleeping thread hands that thread a page of zeros.
 */
int emu_region_close(struct emu_region *r)
{
	uint32_t open = 0, calls;

	if (!atomic_compare_exchange_strong(&r->closed, &open, 1)) {
		while (atomic_load(&r->closed) == 1)
			emu_futex(&r->closed, FUTEX_WAIT, 1);
		return 0;
	}
	while ((calls = atomic_load(&r->calls)))
		emu_futex(&r->calls, FUTEX_WAIT, calls);
	emu_swapd_stop(r); /* the calls are done, and nobody waits at the gate any more for what it would free */
	emu_service_stop(r);
	registry_remove(r);
	if (r->uffd >= 0)
		emu_uffd_unregister(r->uffd, (uintptr_t)r->base, r->frames << EMU_FRAME_SHIFT);
	emu_swap_free(r);
	emu_access_free(r);
	emu_usage_free(r);
	emu_aside_free(r);
	emu_gate_detach(r);
	munmap(r->tables, r->tables_len);
	if (r->pagemap_fd >= 0)
		close(r->pagemap_fd);
	atomic_store(&r->closed, 2);
	emu_futex(&r->closed, FUTEX_WAKE, INT32_MAX);
	return 0;
}

void emu_region_free(struct emu_region *r)
{
	emu_region_close(r);
	free(r);
}

int emu_region_dead(struct emu_region *r)
{
	return atomic_load(&r->dead);
}

int emu_region_vectored(struct emu_region *r)
{
	return r->vectored;
}

int emu_table_map(struct emu_table *t, size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return -errno;
	madvise(p, len, MADV_NOHUGEPAGE); /* 2 MiB of states would be a 2 GiB guest's */
	madvise(p, len, MADV_DONTFORK);
	*t = (struct emu_table){ p, len };
	return 0;
}

void emu_table_unmap(struct emu_table *t)
{
	if (t->p)
		munmap(t->p, t->len);
	*t = (struct emu_table){ 0 };
}

/* Present pages, less the shared zero page that reading an unpopulated table maps. */
int64_t emu_table_bytes(const struct emu_table *t)
{
	struct emu_residency res;
	int64_t present;

	if (!t->p)
		return 0;
	if (!emu_residency_scan((uintptr_t)t->p, pages(t->len), &res))
		present = res.present - res.zeropage;
	else
		present = emu_residency_mincore((uintptr_t)t->p, pages(t->len));
	return present < 0 ? 0 : present << EMU_FRAME_SHIFT;
}

int64_t emu_region_table_bytes(struct emu_region *r)
{
	const struct emu_table table = { r->tables, r->tables_len };
	int64_t bytes = emu_region_enter(r);

	if (bytes)
		return bytes;
	bytes = (int64_t)sizeof(*r) + emu_table_bytes(&table) + emu_swap_table_bytes(r) + emu_access_table_bytes(r);
	if (r->aside)
		bytes += (int64_t)sizeof(*r->aside) + emu_table_bytes(&r->aside->table);
	emu_region_leave(r);
	return bytes;
}
