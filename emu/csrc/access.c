/* SPDX-License-Identifier: MIT */
/*
 * access.c - which frames the guest uses: accessed and dirty bits, idle ages, and whom to take first.
 *
 * A page-table entry has these bits, and hardware sets them.  Here the calls that touch guest memory do (guestaccess.h), if
 * somebody wants to know: a region that isn't tracked pays one load a call.
 *
 * Plain bits lose a race.  Set before the store: a harvest may clear it between the two, and what is stored then is missed,
 * which for a dirty bit is lost data.  Set after it: a harvest that takes the page in the gap finds it clean.  So each call
 * has a line of its own, in which it publishes the frames that it is about to touch, before it sets their bits; and who
 * harvests clears bits first, then makes every running thread's stores visible (membarrier(2), PRIVATE_EXPEDITED, 4.14),
 * then reads the lines and gives the frames found there their bits back.  For any access, then:
 *
 *   its line was visible to the harvest     the bits are set again: the next harvest tells
 *   it wasn't: the membarrier came before   the bits are set after they were cleared: the next harvest tells
 *   the line was written
 *   it was cleared already                  the store is done, and who harvests reads what it left
 *
 * The publisher needs no fence of its own, so it costs a store.  Without membarrier (or with it switched off) it does.
 *
 * Idle age, as the kernel's idle page tracking and g-swap's kstaled have it: a scan ages every frame in memory by one
 * that wasn't accessed since the last scan, up to 255.  Victims are the oldest, and among equals those that a hand that
 * goes round the RAM meets first.
 */
#define _GNU_SOURCE
#include "core.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LINES 128 /* calls under way at once */
#define AGES 256

struct line {
	_Atomic uint64_t range; /* gfn << 16 | count; 0: none */
	_Atomic uint32_t used;
} __attribute__((aligned(128)));

struct emu_access {
	struct emu_table table;
	_Atomic uint8_t *bits;
	uint8_t *age;
	bool membarrier;
	pthread_mutex_t lock; /* one harvest, scan, or choice of victims at a time */
	struct line line[LINES];
};

static struct emu_access *access_of(const struct emu_region *r)
{
	return atomic_load_explicit(&r->access, memory_order_acquire);
}

int emu_access_track(struct emu_region *r, int on)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	if (on && !access_of(r)) {
		struct emu_access *a = aligned_alloc(128, sizeof(*a));

		err = a ? 0 : -ENOMEM;
		if (a) {
			*a = (struct emu_access){ 0 };
			pthread_mutex_init(&a->lock, NULL);
			err = emu_table_map(&a->table, r->frames * 2);
		}
		if (!err) {
			a->bits = (_Atomic uint8_t *)a->table.p;
			a->age = a->table.p + r->frames;
			a->membarrier = !(r->disable & EMU_NO_MEMBARRIER) &&
			                !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
			atomic_store_explicit(&r->access, a, memory_order_release);
		} else {
			free(a);
		}
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

void emu_access_free(struct emu_region *r)
{
	struct emu_access *a = atomic_exchange(&r->access, NULL);

	if (!a)
		return;
	emu_table_unmap(&a->table);
	free(a);
}

int64_t emu_access_table_bytes(struct emu_region *r)
{
	return access_of(r) ? emu_table_bytes(&access_of(r)->table) + (int64_t)sizeof(struct emu_access) : 0;
}

/* ---- the vCPU's side */

void emu_access_enter_slow(struct emu_region *r)
{
	struct emu_access *a = access_of(r);

	for (unsigned i = (unsigned)((uintptr_t)&emu_thread >> 12);; i++) {
		uint32_t unused = 0;

		if (atomic_compare_exchange_strong(&a->line[i % LINES].used, &unused, 1)) {
			emu_thread.access_slot = i % LINES + 1;
			return;
		}
		if (i % LINES == LINES - 1)
			sched_yield();
	}
}

void emu_access_leave_slow(struct emu_region *r)
{
	struct line *line = &access_of(r)->line[emu_thread.access_slot - 1];

	emu_thread.access_slot = 0;
	atomic_store_explicit(&line->range, 0, memory_order_release);
	atomic_store_explicit(&line->used, 0, memory_order_release);
}

void emu_access_note_slow(struct emu_region *r, uint64_t gfn, uint64_t count, bool write)
{
	struct emu_access *a = access_of(r);
	const uint8_t want = EMU_SEEN | EMU_ACCESSED | (write ? EMU_DIRTIED : 0);

	if (!emu_thread.access_slot)
		emu_access_enter_slow(r);
	/* release: what the range before it was about has been done */
	atomic_store_explicit(&a->line[emu_thread.access_slot - 1].range, gfn << 16 | count, memory_order_release);
	if (!a->membarrier)
		atomic_thread_fence(memory_order_seq_cst);
	atomic_signal_fence(memory_order_seq_cst);
	for (uint64_t i = 0; i < count; i++)
		if ((atomic_load_explicit(&a->bits[gfn + i], memory_order_relaxed) & want) != want)
			atomic_fetch_or_explicit(&a->bits[gfn + i], want, memory_order_relaxed);
	atomic_signal_fence(memory_order_seq_cst);
}

/* ---- the harvester's side */

static void see_all_lines(const struct emu_access *a)
{
	if (!a->membarrier || syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
		atomic_thread_fence(memory_order_seq_cst);
}

/* The frames that calls are at: of line i, or none. */
static uint64_t line_range(const struct emu_access *a, int i, uint64_t *gfn)
{
	uint64_t range = atomic_load_explicit(&a->line[i].range, memory_order_acquire);

	*gfn = range >> 16;
	return range & 0xffff;
}

/* A call that needs the bits: *ret, or -errno. Then emu_region_leave(). */
static int enter_tracked(struct emu_region *r, struct emu_access **ret)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	*ret = access_of(r);
	if (*ret)
		return 0;
	emu_region_leave(r);
	return -EOPNOTSUPP;
}

int emu_access_harvest(struct emu_region *r, uint64_t gfn, uint64_t count, int bits, uint8_t *ret)
{
	struct emu_access *a;
	int err = emu_range_ok(r, gfn, count) ? enter_tracked(r, &a) : -ERANGE;

	if (err)
		return err;
	pthread_mutex_lock(&a->lock);
	for (uint64_t i = 0; i < count; i++) {
		ret[i] = atomic_load_explicit(&a->bits[gfn + i], memory_order_relaxed) & bits;
		if (ret[i])
			ret[i] = atomic_fetch_and(&a->bits[gfn + i], (uint8_t)~bits) & bits;
	}
	see_all_lines(a);
	for (int i = 0; i < LINES; i++) {
		uint64_t at, end = line_range(a, i, &at);

		end += at;
		for (at = at > gfn ? at : gfn; at < end && at < gfn + count; at++)
			atomic_fetch_or(&a->bits[at], ret[at - gfn]);
	}
	pthread_mutex_unlock(&a->lock);
	emu_region_leave(r);
	return 0;
}

/* A call under way counts as a write: its line doesn't say. For frames that can't be touched now (BUSY). */
void emu_access_peek(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret)
{
	const struct emu_access *a = access_of(r);

	see_all_lines(a);
	for (uint64_t i = 0; i < count; i++)
		ret[i] = atomic_load_explicit(&a->bits[gfn + i], memory_order_relaxed);
	for (int i = 0; i < LINES; i++) {
		uint64_t at, end = line_range(a, i, &at);

		end += at;
		for (at = at > gfn ? at : gfn; at < end && at < gfn + count; at++)
			ret[at - gfn] |= EMU_ACCESSED | EMU_DIRTIED;
	}
}

/* Blocks that hold something, one after another. */
static uint64_t next_block(const struct emu_region *r, uint64_t block, uint64_t blocks)
{
	while (block < blocks && !atomic_load_explicit(&r->summary[block], memory_order_relaxed))
		block++;
	return block;
}

static uint64_t block_end(const struct emu_region *r, uint64_t block)
{
	const uint64_t end = (block + 1) * EMU_BLOCK_FRAMES;

	return end < r->frames ? end : r->frames;
}

int emu_access_scan(struct emu_region *r, uint64_t *ret)
{
	const uint64_t blocks = (r->frames + EMU_BLOCK_FRAMES - 1) / EMU_BLOCK_FRAMES;
	struct emu_access *a;
	int err = enter_tracked(r, &a);

	if (err)
		return err;
	for (int i = 0; i < AGES; i++)
		ret[i] = 0;
	pthread_mutex_lock(&a->lock);
	for (uint64_t block = next_block(r, 0, blocks); block < blocks; block = next_block(r, block + 1, blocks))
		for (uint64_t gfn = block * EMU_BLOCK_FRAMES; gfn < block_end(r, block); gfn++) {
			const uint8_t state = emu_state_load(r, gfn);

			if (atomic_load_explicit(&a->bits[gfn], memory_order_relaxed) & EMU_ACCESSED) {
				atomic_fetch_and(&a->bits[gfn], (uint8_t)~EMU_ACCESSED);
				a->age[gfn] = 0;
			} else if (a->age[gfn] < AGES - 1) {
				a->age[gfn]++;
			}
			if (state == EMU_RESIDENT || state == EMU_LAZY)
				ret[a->age[gfn]]++;
		}
	see_all_lines(a);
	for (int i = 0; i < LINES; i++) {
		uint64_t gfn, count = line_range(a, i, &gfn);

		for (uint64_t k = 0; k < count; k++)
			atomic_fetch_or(&a->bits[gfn + k], EMU_ACCESSED); /* it is being accessed now */
	}
	pthread_mutex_unlock(&a->lock);
	emu_region_leave(r);
	return 0;
}

static int age_of(const struct emu_access *a, uint64_t gfn)
{
	if (!a)
		return 0;
	return atomic_load_explicit(&a->bits[gfn], memory_order_relaxed) & EMU_ACCESSED ? 0 : a->age[gfn];
}

/*
 * Whether a frame may be taken by who asks for these usages.  What nobody needs may be lazily freed, or aside, too; what may be
 * dirty is looked at only while it is clean or can be stored: else the same ones would come first each time, in vain.
 */
static bool may_go(const struct emu_region *r, const struct emu_access *a, uint64_t gfn, unsigned usages)
{
	const uint8_t byte = emu_byte_load(r, gfn), state = emu_byte_state(byte), usage = emu_byte_usage(byte);

	if (!(usages >> usage & 1))
		return false;
	if (usage == EMU_POTENTIAL && a && !atomic_load(&r->swap) &&
	    atomic_load_explicit(&a->bits[gfn], memory_order_relaxed) & EMU_DIRTIED)
		return false;
	return state == EMU_RESIDENT || ((state == EMU_LAZY || state == EMU_ASIDE) && !(usages >> EMU_STABLE & 1) &&
	                                 (usage == EMU_UNUSED || usage == EMU_VOLATILE));
}

/* Frames from `from` to `end` that are RESIDENT, of these usages, and old enough; of age `cutoff` only *quota of them. */
static bool pick(const struct emu_region *r, const struct emu_access *a, uint64_t from, uint64_t end, unsigned usages,
                 int cutoff, uint64_t *quota, uint64_t *want, struct emu_range *ret, size_t cap, size_t *n)
{
	for (uint64_t gfn = from; gfn < end && *want; gfn++) {
		int age;

		if (gfn % EMU_BLOCK_FRAMES == 0 &&
		    !atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_relaxed)) {
			gfn += EMU_BLOCK_FRAMES - 1;
			continue;
		}
		if (!may_go(r, a, gfn, usages) || (age = age_of(a, gfn)) < cutoff || (age == cutoff && !*quota))
			continue;
		if (*n && ret[*n - 1].gfn + ret[*n - 1].count == gfn)
			ret[*n - 1].count++;
		else if (*n < cap)
			ret[(*n)++] = (struct emu_range){ gfn, 1, gfn };
		else
			return false;
		*quota -= age == cutoff;
		--*want;
	}
	return true;
}

/* Frames of these usages that might be taken, by age. */
static void count_ages(const struct emu_region *r, const struct emu_access *a, unsigned usages, uint64_t *by_age)
{
	const uint64_t blocks = (r->frames + EMU_BLOCK_FRAMES - 1) / EMU_BLOCK_FRAMES;

	for (uint64_t block = next_block(r, 0, blocks); block < blocks; block = next_block(r, block + 1, blocks))
		for (uint64_t gfn = block * EMU_BLOCK_FRAMES; gfn < block_end(r, block); gfn++)
			if (may_go(r, a, gfn, usages))
				by_age[a ? age_of(a, gfn) : 0]++;
}

bool emu_access_may_go(struct emu_region *r, uint64_t gfn, unsigned usages)
{
	return may_go(r, access_of(r), gfn, usages);
}

int emu_access_ages(struct emu_region *r, unsigned usages, uint64_t *ret)
{
	struct emu_access *a;
	int err = emu_region_enter(r);

	if (err)
		return err;
	memset(ret, 0, AGES * sizeof(*ret));
	a = access_of(r);
	if (a)
		pthread_mutex_lock(&a->lock);
	count_ages(r, a, usages, ret);
	if (a)
		pthread_mutex_unlock(&a->lock);
	emu_region_leave(r);
	return 0;
}

int64_t emu_access_victims(struct emu_region *r, int min_age, uint64_t want, unsigned usages, struct emu_range *ret,
                           size_t cap, size_t *n)
{
	uint64_t by_age[AGES] = { 0 }, quota = want, left = want, hand;
	struct emu_access *a;
	int cutoff = AGES - 1;

	*n = 0;
	a = min_age < 0 ? NULL : access_of(r);
	if (!a) /* nobody looks: all are alike */
		cutoff = 0;
	else
		pthread_mutex_lock(&a->lock);
	if (a)
		count_ages(r, a, usages, by_age);
	for (uint64_t older = 0; a && cutoff > min_age && older + by_age[cutoff] < want; cutoff--) {
		older += by_age[cutoff];
		quota = want - older;
	}
	hand = atomic_load(&r->hand) % r->frames;
	if (pick(r, a, hand, r->frames, usages, cutoff, &quota, &left, ret, cap, n))
		pick(r, a, 0, hand, usages, cutoff, &quota, &left, ret, cap, n);
	if (*n)
		atomic_store(&r->hand, ret[*n - 1].gfn + ret[*n - 1].count);
	if (a)
		pthread_mutex_unlock(&a->lock);
	return (int64_t)(want - left);
}

/* PAGEMAP_SCAN tells what was written, and protects it again, in one call: no write falls in between (6.7). */
int64_t emu_access_written(struct emu_region *r)
{
	enum { VEC = 256 };
	struct page_region vec[VEC];
	struct pm_scan_arg arg = {
		.size = sizeof(arg), .flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, .start = (uintptr_t)r->base,
		.end = (uintptr_t)r->base + (r->frames << EMU_FRAME_SHIFT), .vec = (uintptr_t)vec, .vec_len = VEC,
		/* present ones alone: protecting holes would fill page tables with markers (and UFFDIO_MOVE refuses those) */
		.category_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT, .return_mask = PAGE_IS_WRITTEN,
	};
	int64_t pages = 0;
	int err = emu_region_enter(r);

	if (err)
		return err;
	if (!r->have_wp_async || r->pagemap_fd < 0)
		err = -EOPNOTSUPP;
	while (!err && arg.start < arg.end) {
		int n = ioctl(r->pagemap_fd, PAGEMAP_SCAN, &arg);

		if (n < 0) {
			err = -errno;
			break;
		}
		for (int i = 0; i < n; i++)
			pages += (int64_t)((vec[i].end - vec[i].start) >> EMU_FRAME_SHIFT);
		if (arg.walk_end <= arg.start)
			break;
		arg.start = arg.walk_end;
	}
	emu_region_leave(r);
	return err ? err : pages;
}
