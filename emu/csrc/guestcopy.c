/* SPDX-License-Identifier: MIT */
/*
 * guestcopy.c - bytes between guest memory and a buffer: read, write, install.
 *
 * A missing frame that is wholly overwritten is installed from the buffer (UFFDIO_COPY), not faulted first.  How the rest
 * is touched is guestaccess.h's.
 */
#define _GNU_SOURCE
#include "guestaccess.h"

#include <stdlib.h>

/* One copy between guest bytes and a buffer, armed; lies inside one frame or follows frames in a row. */
struct copy {
	struct emu_guard guard;
	struct emu_region *r;
	uint64_t gpa;
	uint8_t *buf;
	uint64_t left;
	bool write;
	bool install; /* missing whole frames may be installed from the buffer */
	uint64_t done;
};

static void copy(struct copy *c)
{
	struct emu_region *r = c->r;

	while (c->left) {
		uint64_t gfn = c->gpa >> EMU_FRAME_SHIFT, off = c->gpa % EMU_FRAME_SIZE;
		uint64_t n = EMU_FRAME_SIZE - off < c->left ? EMU_FRAME_SIZE - off : c->left;
		uint8_t *at = emu_frame(r, gfn) + off;
		int64_t installed = 0;
		uint8_t state = emu_state_load(r, gfn);
		int changed;

		if ((state == EMU_DISCARDED || state == EMU_BUSY) && c->write && n == EMU_FRAME_SIZE) {
			emu_fault_forget(r, gfn, EMU_STABLE);
			state = emu_state_load(r, gfn);
		}

		if (c->install && n == EMU_FRAME_SIZE && state == EMU_ZERO) {
			const uint64_t most = c->left >> EMU_FRAME_SHIFT;

			emu_access_note(r, gfn, most < EMU_BLOCK_FRAMES ? most : EMU_BLOCK_FRAMES, true);
			installed = emu_fault_install(r, gfn, most, c->buf);
		}
		if (installed > 0) {
			n = (uint64_t)installed << EMU_FRAME_SHIFT;
		} else if (installed < 0) {
			c->guard.err = (int)installed;
			c->guard.gfn = gfn;
			return;
		} else {
			if (emu_state_missing(state) && touch_frame(&c->guard, r, gfn, c->write, state))
				return;
			do {
				changed = promise(&c->guard, r, gfn, c->write);
				if (changed < 0)
					return;
				if (c->write)
					copy_bytes(at, c->buf, n);
				else
					copy_bytes(c->buf, at, n);
				promise_kept(&c->guard, r, gfn, changed);
			} while (!noted(r, gfn, c->write));
		}
		c->gpa += n;
		c->buf += n;
		c->left -= n;
		c->done += n;
		barrier();
	}
}

static int copy_armed(struct copy *c)
{
	c->guard.region = c->r;
	emu_access_enter(c->r);
	c->guard.err = 0;
	c->guard.elsewhere = false;
	c->guard.promised = EMU_NO_PROMISE;
	if (!sigsetjmp(c->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &c->guard, memory_order_relaxed);
		barrier();
		copy(c);
		barrier();
	} else {
		keep_promise(&c->guard);
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	emu_access_leave(c->r);
	return c->guard.err;
}

/*
 * Bytes [skip, skip + n) of the ranges' frames, and a contiguous buffer.  The region is entered once, a guard is armed for
 * each range.
 */
static int copy_ranges(struct emu_region *r, const struct emu_range *ranges, size_t n_ranges, uint64_t skip, void *buf,
                       uint64_t n, bool write, struct emu_progress *ret)
{
	/*
	 * UFFDIO_COPY reads its source in the kernel while the destination is BUSY.  A source that is guest memory could
	 * fault there, and with the thread service wait for a fault that waits for that BUSY: such bytes are copied here.
	 */
	const bool install = write && r->uffd >= 0 && !emu_registry_overlaps((uintptr_t)buf, n);
	bool was_blocked;
	int err;

	if (atomic_load(&r->dead))
		return -EOWNERDEAD;
	err = emu_region_enter(r);
	if (err)
		return err;
	emu_sigbus_ensure(r);
	was_blocked = emu_sigbus_unblock();
	for (size_t i = 0; i < n_ranges && ret->done < n && !err; i++) {
		const uint64_t bytes = ranges[i].count << EMU_FRAME_SHIFT;
		struct copy c = { .r = r, .buf = (uint8_t *)buf + ret->done, .write = write, .install = install };

		if (skip >= bytes) {
			skip -= bytes;
			continue;
		}
		c.gpa = (ranges[i].gfn << EMU_FRAME_SHIFT) + skip;
		c.left = bytes - skip < n - ret->done ? bytes - skip : n - ret->done;
		skip = 0;
		err = copy_armed(&c);
		ret->done += c.done;
		if (err)
			ret->bad_gfn = c.guard.gfn;
	}
	if (was_blocked)
		emu_sigbus_block();
	emu_region_leave(r);
	return err;
}

static int copy_range(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, bool write, struct emu_progress *ret)
{
	const uint64_t first = gpa >> EMU_FRAME_SHIFT;
	struct emu_range range = { .gfn = first };

	*ret = (struct emu_progress){ 0 };
	if (gpa > r->frames << EMU_FRAME_SHIFT || n > (r->frames << EMU_FRAME_SHIFT) - gpa)
		return -ERANGE;
	range.count = ((gpa + n + EMU_FRAME_SIZE - 1) >> EMU_FRAME_SHIFT) - first;
	return copy_ranges(r, &range, 1, gpa % EMU_FRAME_SIZE, buf, n, write, ret);
}

int emu_guest_copyv(struct emu_region *r, const struct emu_range *ranges, size_t n_ranges, uint64_t skip, void *buf,
                    uint64_t n, int write, struct emu_progress *ret)
{
	uint64_t room = 0;
	int err = emu_ranges_check(r, ranges, n_ranges);

	*ret = (struct emu_progress){ 0 };
	for (size_t i = 0; i < n_ranges && !err; i++)
		room += ranges[i].count << EMU_FRAME_SHIFT;
	if (err || skip > room || n > room - skip)
		return -ERANGE;
	return copy_ranges(r, ranges, n_ranges, skip, buf, n, write, ret);
}

int emu_guest_read(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, struct emu_progress *ret)
{
	return copy_range(r, gpa, buf, n, false, ret);
}

int emu_guest_write(struct emu_region *r, uint64_t gpa, const void *buf, uint64_t n, struct emu_progress *ret)
{
	return copy_range(r, gpa, (void *)(uintptr_t)buf, n, true, ret);
}

static int by_number(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Whether no number comes twice. In ascending order, as mostly, that is seen at once. */
static int distinct(const uint64_t *gfns, size_t n)
{
	uint64_t *sorted;
	size_t i;

	for (i = 1; i < n && gfns[i] > gfns[i - 1]; i++)
		;
	if (i >= n)
		return 0;
	sorted = malloc(n * sizeof(*sorted));
	if (!sorted)
		return -ENOMEM;
	memcpy(sorted, gfns, n * sizeof(*sorted));
	qsort(sorted, n, sizeof(*sorted), by_number);
	for (i = 1; i < n && sorted[i] != sorted[i - 1]; i++)
		;
	free(sorted);
	return i < n ? -EEXIST : 0;
}

int emu_guest_install(struct emu_region *r, const uint64_t *gfns, size_t n, const void *buf,
                      struct emu_progress *ret)
{
	int unfit;

	*ret = (struct emu_progress){ 0 };
	for (size_t i = 0; i < n; i++)
		if (!emu_range_ok(r, gfns[i], 1))
			return -ERANGE;
	unfit = distinct(gfns, n);
	if (unfit)
		return unfit;
	for (size_t i = 0, run; i < n; i += run) {
		struct emu_progress part;
		int err;

		for (run = 1; i + run < n && gfns[i + run] == gfns[i] + run; run++)
			;
		err = copy_range(r, gfns[i] << EMU_FRAME_SHIFT, (uint8_t *)(uintptr_t)buf + (i << EMU_FRAME_SHIFT),
		                 (uint64_t)run << EMU_FRAME_SHIFT, true, &part);
		ret->done += part.done >> EMU_FRAME_SHIFT;
		if (err) {
			ret->bad_gfn = part.bad_gfn;
			return err;
		}
	}
	return 0;
}
