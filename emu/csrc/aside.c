/* SPDX-License-Identifier: MIT */
/*
 * aside.c - frames taken out of the guest and kept: any touch, read or write, brings them back.
 *
 * This is the inactive state that the linux-mm thread on free page reporting asked for (January 2020), and that
 * MADV_FREE can't give: a lazily freed page comes back by a write only, a read may find zeros a moment later, and RSS
 * shows neither.  Here the page is moved to the same place in a second region of the process, the side region; the guest's
 * next access finds a hole and faults, and gets it back.  Untouched for long enough it is dropped there (reclaim.c).
 *
 * Two ways out of the guest, chosen when the uffd is opened:
 *
 *   move  UFFDIO_MOVE (6.8): page-table entries change places, atomically against a running vCPU; nothing is copied.
 *   wp    UFFDIO_WRITEPROTECT, UFFDIO_COPY into the side region, MADV_DONTNEED (5.7): a vCPU that writes meanwhile faults on
 *         the protection, finds the frame BUSY, waits, and reads the byte again.  The uffd must not have WP_ASYNC: then a
 *         protected page raises no fault, and writes between the copy and the DONTNEED are lost.
 *
 * The side region must be registered with the same uffd (UFFDIO_MOVE wants its target so), mapped with the same flags, and
 * its places must be empty when a frame moves in.
 *
 * The way back is a copy, and the page aside is left there, *stale*, to be dropped with others: moving it back would
 * cost each other running vCPU's core an interrupt (a shootdown; 17 us against 6 measured), and so would dropping it at
 * once.  Moved back are whole runs (emu_bring_back), and a page for which no memory can be had.  Stale pages are few (a
 * ring of 256, swept by 32), and count in the footprint as what they are.
 *
 * Races
 *  - set aside against an access: the page goes before or after it.  After: the access faults, on BUSY waits, on ASIDE
 *    brings the frame back.  An access that noted RESIDENT over the shared zero page and hasn't stored yet: the zero
 *    page moves, the store faults, and finds zeros aside.
 *  - the way back against the drop: both claim ASIDE; one of them gets it.  Who was dropped reads zeros if its owner gave
 *    it up (ZERO), or is told (DISCARDED).
 *  - the sweep against another stay aside: a stale page is dropped by whoever holds its frame BUSY and finds the mark
 *    set; set_aside clears the place, and the mark, before it moves a page there.  So a sweep that comes late finds no
 *    mark and drops nothing.
 *  - fork: a page shared with a child can't be moved (EBUSY), also after the child's end, until somebody writes it.  It is
 *    touched (an atomic OR of 0) after its frame was let go, and tried again; then it is skipped, and counted.
 */
#define _GNU_SOURCE
#include "core.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#define RUN 2048   /* frames that one ioctl moves, and BUSY spans: some 0.2 ms */
#define RUN_COPY 64 /* where they are copied: the copies are over what the guest is charged for */
#define SWEEP 32
#define UNSHARE_TRIES 2

int emu_region_aside_how(struct emu_region *r)
{
	return r->uffd < 0 ? 0 : r->have_move ? 2 : r->have_wp ? 1 : 0;
}

int emu_region_lend_side(struct emu_region *r, void *base)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	if (!emu_region_aside_how(r)) {
		err = -EOPNOTSUPP;
	} else if (r->aside) {
		err = -EBUSY;
	} else {
		struct emu_aside *a = calloc(1, sizeof(*a));

		err = a ? emu_table_map(&a->table, r->frames * 3) : -ENOMEM;
		if (err) {
			free(a);
		} else {
			a->stamp = (_Atomic uint16_t *)a->table.p;
			a->stale = (_Atomic uint8_t *)(a->table.p + r->frames * 2);
			r->aside = a;
			atomic_store_explicit(&r->side, base, memory_order_release);
		}
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

void emu_aside_free(struct emu_region *r)
{
	if (r->aside)
		emu_table_unmap(&r->aside->table);
	free(r->aside);
	r->aside = NULL;
}

/* ---- stale pages */

/* Side pages of frames [gfn, gfn + count), all BUSY and ours, are copies: drop those that are there. */
static void clear_places(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	struct emu_aside *a = r->aside;
	uint64_t first = count, last = 0;
	int64_t n = 0;

	if (!atomic_load_explicit(&a->nr_stale, memory_order_relaxed))
		return;
	for (uint64_t i = 0; i < count; i++)
		if (atomic_load_explicit(&a->stale[gfn + i], memory_order_relaxed)) {
			first = first < i ? first : i;
			last = i;
			n++;
		}
	/* in between are places of frames that aren't aside: empty */
	if (!n || madvise(emu_side(r, gfn + first), (last - first + 1) << EMU_FRAME_SHIFT, MADV_DONTNEED))
		return;
	for (uint64_t i = first; i <= last; i++)
		atomic_store_explicit(&a->stale[gfn + i], 0, memory_order_relaxed);
	atomic_fetch_sub(&a->nr_stale, n);
	emu_stat_add(r, EMU_STAT_aside_stale, -n);
	emu_gate_uncharge(r, n);
}

/* Into the ring; returns whom that has driven out (gfn + 1), or 0. Async-signal-safe. */
static uint64_t push(struct emu_region *r, uint64_t gfn)
{
	struct emu_aside *a = r->aside;

	return atomic_exchange(&a->stale_ring[atomic_fetch_add(&a->stale_head, 1) % EMU_STALE_RING], gfn + 1);
}

/* Those of up to SWEEP frames, in any state, whose side page is stale: without it. */
static void drop_stale(struct emu_region *r, const uint64_t *gfns, size_t n)
{
	struct iovec run[SWEEP];
	uint8_t prior[SWEEP];
	uint64_t held[SWEEP];
	size_t kept = 0, done = 0;

	for (size_t i = 0; i < n; i++) {
		const uint64_t gfn = gfns[i];
		uint8_t state = emu_state_load(r, gfn);

		if (!atomic_load(&r->aside->stale[gfn]) || state == EMU_ASIDE)
			continue; /* its place was cleared, and is perhaps in use */
		if (state == EMU_BUSY || !emu_state_try(r, gfn, state, EMU_BUSY)) {
			push(r, gfn); /* another time */
			continue;
		}
		prior[kept] = state;
		held[kept] = gfn;
		run[kept++] = (struct iovec){ emu_side(r, gfn), EMU_FRAME_SIZE };
	}
	if (kept)
		emu_advise(r, run, kept, MADV_DONTNEED, EMU_STAT_discard_calls, &done);
	for (size_t i = 0; i < kept; i++) {
		/* the mark is looked at again: between the first look and the claim somebody else may have cleared it */
		if (i < done && atomic_exchange(&r->aside->stale[held[i]], 0)) {
			atomic_fetch_sub(&r->aside->nr_stale, 1);
			emu_stat_add(r, EMU_STAT_aside_stale, -1);
			emu_gate_uncharge(r, 1);
		}
		emu_state_publish(r, held[i], prior[i]);
		emu_state_wake(r, held[i], 1);
	}
}

static void sweep(struct emu_region *r)
{
	struct emu_aside *a = r->aside;
	uint64_t gfns[SWEEP];
	uint32_t idle = 0;
	size_t n = 0;

	if (!atomic_compare_exchange_strong(&a->sweeping, &idle, 1))
		return; /* who sweeps now gets them, or the next one */
	for (size_t i = 0; i < EMU_STALE_RING; i++) {
		uint64_t entry = atomic_exchange(&a->stale_ring[i], 0);

		if (entry)
			gfns[n++] = entry - 1;
		if (n == SWEEP) {
			drop_stale(r, gfns, n);
			n = 0;
		}
	}
	drop_stale(r, gfns, n);
	atomic_store(&a->sweeping, 0);
}

/*
 * A frame that we hold BUSY has its page elsewhere, and a copy of it is left aside. Async-signal-safe.  The caller publishes
 * the frame and then calls emu_aside_settle().
 */
void emu_aside_left(struct emu_region *r, uint64_t gfn)
{
	atomic_store_explicit(&r->aside->stale[gfn], 1, memory_order_relaxed);
	atomic_fetch_add(&r->aside->nr_stale, 1);
	emu_stat_add(r, EMU_STAT_aside_stale, 1);
}

void emu_aside_settle(struct emu_region *r, uint64_t gfn)
{
	uint64_t former = push(r, gfn);

	if (former--)
		drop_stale(r, &former, 1);
	if (atomic_load(&r->aside->nr_stale) >= SWEEP)
		sweep(r);
}

/* All of them, also those that the ring has lost: for when nothing hurries. */
static void sweep_table(struct emu_region *r)
{
	uint64_t gfns[SWEEP];
	size_t n = 0;

	for (uint64_t gfn = 0; gfn < r->frames && atomic_load(&r->aside->nr_stale); gfn++) {
		if (!atomic_load_explicit(&r->aside->stale[gfn], memory_order_relaxed))
			continue;
		gfns[n++] = gfn;
		if (n == SWEEP) {
			drop_stale(r, gfns, n);
			n = 0;
		}
	}
	drop_stale(r, gfns, n);
}

int64_t emu_aside_sweep(struct emu_region *r)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	if (r->aside)
		sweep(r);
	if (r->aside && atomic_load(&r->aside->nr_stale))
		sweep_table(r);
	emu_region_leave(r);
	return 0;
}

/* Of n frames that are BUSY from ASIDE: how many, from the first on, have that stamp; the others are let go. */
uint64_t emu_aside_stamped(struct emu_region *r, uint64_t gfn, uint64_t n, int stamp)
{
	uint64_t own = 0;

	while (own < n && emu_aside_stamp(r, gfn + own) == stamp)
		own++;
	if (own < n) {
		emu_state_publish_run(r, gfn + own, n - own, EMU_ASIDE);
		emu_state_wake(r, gfn + own, n - own);
	}
	return own;
}

/* ---- the way back */

/* A fault's frame, BUSY from ASIDE; publishes it. Async-signal-safe. */
int emu_aside_return(struct emu_region *r, uint64_t gfn)
{
	const uint64_t dst = (uintptr_t)emu_frame(r, gfn);
	uint8_t *side = emu_side(r, gfn);
	unsigned eagain = 0;
	uint64_t done;
	bool left = false;
	int err;

	emu_gate_charge(r, 1, EMU_GATE_FORCE); /* the copy's; bounded by what may be stale */
	err = emu_uffd_fill(r->uffd, EMU_FILL_COPY, dst, side, EMU_FRAME_SIZE, false, &done, &eagain);
	if (!err)
		left = true;
	else if (r->have_move) /* no memory for a copy, perhaps */
		err = emu_move(r, gfn, 1, true, &done);
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	if (left)
		emu_aside_left(r, gfn);
	else
		emu_gate_uncharge(r, 1);
	emu_state_publish(r, gfn, err ? EMU_ASIDE : EMU_RESIDENT);
	if (!err) {
		emu_state_moved(r, EMU_ASIDE, EMU_RESIDENT, 1);
		emu_stat_add(r, EMU_STAT_aside_return, 1);
	}
	emu_state_wake(r, gfn, 1);
	if (left)
		emu_aside_settle(r, gfn);
	return err;
}

/* Frames [gfn, gfn + n) that we hold BUSY from ASIDE, into the guest again. Returns how many, from the first on. */
static uint64_t replace(struct emu_region *r, uint64_t gfn, uint64_t n, int *err)
{
	unsigned eagain = 0;
	uint64_t done, bytes;

	if (r->have_move) {
		*err = emu_move(r, gfn, n, true, &done);
	} else {
		*err = emu_uffd_fill(r->uffd, EMU_FILL_COPY, (uintptr_t)emu_frame(r, gfn), emu_side(r, gfn), n << EMU_FRAME_SHIFT,
		                     false, &done, &eagain);
		done >>= EMU_FRAME_SHIFT;
	}
	if (*err == -EEXIST && r->have_move && r->service == EMU_SERVICE_THREAD) {
		/* a marker (service.c, refuse), over which nothing can be moved, but copied */
		*err = emu_uffd_fill(r->uffd, EMU_FILL_COPY, (uintptr_t)emu_frame(r, gfn + done), emu_side(r, gfn + done),
		                     EMU_FRAME_SIZE, false, &bytes, &eagain);
		if (!*err) {
			madvise(emu_side(r, gfn + done), EMU_FRAME_SIZE, MADV_DONTNEED);
			done++;
		}
	}
	if (done && !r->have_move && madvise(emu_side(r, gfn), done << EMU_FRAME_SHIFT, MADV_DONTNEED))
		for (uint64_t i = 0; i < done; i++) {
			emu_gate_charge(r, 1, EMU_GATE_FORCE);
			emu_aside_left(r, gfn + i);
		}
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	return done;
}

/* What is aside of [gfn, end), with that stamp (-1: any), into the guest again. Returns how many frames. */
int64_t emu_aside_restore(struct emu_region *r, uint64_t gfn, uint64_t end, int stamp)
{
	int64_t back = 0;

	while (gfn < end) {
		uint8_t state = emu_state_load(r, gfn);
		uint64_t n, done;
		int err;

		if (state == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		n = state == EMU_ASIDE ? emu_state_claim(r, gfn, end - gfn < RUN ? end - gfn : RUN, EMU_ASIDE) : 0;
		if (n && stamp >= 0)
			n = emu_aside_stamped(r, gfn, n, stamp);
		if (!n) {
			gfn += state != EMU_ASIDE || stamp >= 0;
			continue;
		}
		done = replace(r, gfn, n, &err);
		emu_state_publish_run(r, gfn, done, EMU_RESIDENT);
		emu_state_publish_run(r, gfn + done, n - done, EMU_ASIDE);
		emu_state_moved(r, EMU_ASIDE, EMU_RESIDENT, (int64_t)done);
		emu_stat_add(r, EMU_STAT_aside_restored, (int64_t)done);
		emu_state_wake(r, gfn, n);
		back += (int64_t)done;
		gfn += done;
		if (err)
			return back ? back : err;
	}
	return back;
}

static int64_t over(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp, bool out)
{
	int64_t frames = 0;
	int err = emu_region_enter_at(r, ranges, n);

	if (err)
		return err;
	if (!r->aside)
		err = -EOPNOTSUPP;
	for (size_t i = 0; i < n && !err; i++) {
		const uint64_t end = ranges[i].gfn + ranges[i].count;
		int64_t did = out ? emu_aside_take(r, ranges[i].gfn, end, stamp, EMU_ANY_USAGE)
		              : emu_aside_restore(r, ranges[i].gfn, end, stamp);

		err = did < 0 ? (int)did : 0;
		frames += did > 0 ? did : 0;
	}
	if (out && frames)
		emu_ring_push(r, EMU_EV_ASIDE, n ? ranges[0].gfn : 0, (uint64_t)frames, 0);
	emu_region_leave(r);
	return frames ? frames : err;
}

int64_t emu_bring_back(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp)
{
	return stamp > EMU_STAMP_MAX ? -EINVAL : over(r, ranges, n, stamp, false);
}

/* ---- the way out */

/*
 * The second way, for at most RUN_COPY frames.  Two things that the kernel may do here: UFFDIO_COPY reads its source with
 * faults on, and would sleep on a hole in it until somebody serves a frame that we hold BUSY; so holes are looked for
 * first.  And MADV_DONTNEED goes from VMA to VMA: one that refuses (locked) ends it, with the ones before it taken; so
 * they are taken again, up to that one.  Past an unmapped place it goes on; but one that the copy didn't meet was made
 * since, behind our back.
 */
static uint64_t capture_by_copy(struct emu_region *r, uint64_t gfn, uint64_t n, int *err)
{
	uint8_t *src = emu_frame(r, gfn), *dst = emu_side(r, gfn), there[RUN_COPY];
	uint64_t present = 0, copied = 0, done, bytes;
	unsigned eagain = 0;

	emu_gate_charge(r, (int64_t)n, EMU_GATE_FORCE);
	*err = emu_uffd_writeprotect(r->uffd, (uintptr_t)src, n << EMU_FRAME_SHIFT, UFFDIO_WRITEPROTECT_MODE_WP);
	if (!*err) {
		emu_pages_there(r, src, n, there);
		while (present < n && there[present])
			present++;
		if (present)
			*err = emu_uffd_fill(r->uffd, EMU_FILL_COPY, (uintptr_t)dst, src, present << EMU_FRAME_SHIFT, true, &copied,
			                     &eagain);
		copied >>= EMU_FRAME_SHIFT;
		if (!*err && present < n)
			*err = -ENOENT;
	}
	done = copied;
	if (copied && madvise(src, copied << EMU_FRAME_SHIFT, MADV_DONTNEED)) {
		*err = -errno;
		for (done = 0; done < copied && !madvise(src + (done << EMU_FRAME_SHIFT), EMU_FRAME_SIZE, MADV_DONTNEED); done++)
			; /* one by one, up to the one that refuses */
		emu_pages_there(r, src, copied, there);
		for (uint64_t i = done; i < copied; i++)
			if (!there[i]) /* taken behind one that wasn't: back from its copy, or LOST at the next touch */
				emu_uffd_fill(r->uffd, EMU_FILL_COPY, (uintptr_t)src + (i << EMU_FRAME_SHIFT),
				              dst + (i << EMU_FRAME_SHIFT), EMU_FRAME_SIZE, false, &bytes, &eagain);
		madvise(dst + (done << EMU_FRAME_SHIFT), (copied - done) << EMU_FRAME_SHIFT, MADV_DONTNEED);
	}
	if (done < n) /* those stay, writable; who met the protection is woken */
		emu_uffd_writeprotect(r->uffd, (uintptr_t)src + (done << EMU_FRAME_SHIFT), (n - done) << EMU_FRAME_SHIFT, 0);
	emu_gate_uncharge(r, (int64_t)n);
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	return done;
}

/* How many of the frames, BUSY and ours, are aside now, from the first on; *err is why the next one isn't. */
static uint64_t capture(struct emu_region *r, uint64_t gfn, uint64_t n, int *err)
{
	uint64_t done;

	clear_places(r, gfn, n);
	if (!r->have_move)
		return capture_by_copy(r, gfn, n, err);
	*err = emu_move(r, gfn, n, false, &done);
	return done;
}

/* A page shared with a forked child, or formerly: a write makes it this process's own again. */
static void touch_alone(struct emu_region *r, uint64_t gfn)
{
	struct emu_range range = { gfn, 1, 0 };
	struct emu_walk w = { .r = r, .ranges = &range, .n = 1, .op = EMU_TOUCH_WRITE, .left = 1 };
	bool was_blocked;

	if (emu_state_load(r, gfn) != EMU_RESIDENT)
		return;
	emu_sigbus_ensure(r);
	was_blocked = emu_sigbus_unblock();
	emu_thread.impatient = true; /* given back meanwhile, it isn't worth waiting at the gate: least of all for the worker */
	emu_guest_walk(&w);
	emu_thread.impatient = false;
	if (was_blocked)
		emu_sigbus_block();
}

/* Frames that are RESIDENT, and of a usage in the set. */
int64_t emu_aside_take(struct emu_region *r, uint64_t gfn, uint64_t end, int stamp, unsigned usages)
{
	const uint64_t longest = r->have_move ? RUN : RUN_COPY;
	uint64_t shared = UINT64_MAX, most = longest;
	int64_t taken = 0;
	int tries = 0;

	while (gfn < end) {
		uint8_t byte, state;
		uint64_t n, done;
		int err;

		if (gfn % EMU_BLOCK_FRAMES == 0 &&
		    !atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_acquire)) {
			gfn += EMU_BLOCK_FRAMES;
			continue;
		}
		byte = emu_byte_load(r, gfn);
		state = emu_byte_state(byte);
		if (state == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (state != EMU_RESIDENT || !(usages >> emu_byte_usage(byte) & 1)) {
			gfn++;
			continue;
		}
		n = emu_state_claim_used(r, gfn, end - gfn < most ? end - gfn : most, EMU_RESIDENT, usages);
		if (!n)
			continue;
		done = capture(r, gfn, n, &err);
		for (uint64_t i = 0; i < done; i++)
			atomic_store_explicit(&r->aside->stamp[gfn + i], (uint16_t)stamp, memory_order_relaxed);
		emu_state_publish_run(r, gfn, done, EMU_ASIDE);
		emu_state_publish_run(r, gfn + done, n - done, EMU_RESIDENT);
		emu_state_moved(r, EMU_RESIDENT, EMU_ASIDE, (int64_t)done);
		emu_stat_add(r, EMU_STAT_aside_frames, (int64_t)done);
		emu_state_wake(r, gfn, n);
		if (r->service == EMU_SERVICE_THREAD && r->have_wp)
			emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, gfn), n << EMU_FRAME_SHIFT);
		taken += (int64_t)done;
		gfn += done;
		if (!err)
			continue;
		if (err == -EINVAL && n - done > 1) { /* two VMAs, or a locked page: all of the run is refused for it */
			most = (n - done) / 2;
			continue;
		}
		most = longest;
		if (err == -EBUSY && shared != gfn) {
			shared = gfn;
			tries = 0;
		}
		if (err == -EBUSY && tries++ < UNSHARE_TRIES) {
			touch_alone(r, gfn);
		} else if (err == -EBUSY || err == -ENOENT || err == -EEXIST || err == -EINVAL || err == -EFAULT) {
			/* pinned, not there, in the way, or in a VMA of its own (poison without the marker): stays */
			emu_stat_add(r, EMU_STAT_aside_skipped, 1);
			gfn++;
		} else {
			return taken ? taken : err;
		}
	}
	return taken;
}

int64_t emu_set_aside(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp)
{
	return stamp < 0 || stamp > EMU_STAMP_MAX ? -EINVAL : over(r, ranges, n, stamp, true);
}
