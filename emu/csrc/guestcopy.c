/* SPDX-License-Identifier: MIT */
/*
 * guestcopy.c - the only file whose code touches guest memory.
 *
 * Any such touch may fault.  With the inline service the handler runs right here, in the middle of a load or a store;
 * with the thread service the thread sleeps; and the frame may turn out LOST.  So each section that touches is armed: a
 * guard on the stack, which the handler finds through a thread-local pointer, says where to go when a frame can't be
 * served (arming costs 4 ns; savemask 0 makes it free of system calls).  Calls return what they had finished and the
 * frame that stopped them, and can be resumed there.  A section holds nothing that would outlive the jump: no BUSY
 * frame, no lock, no reference.
 *
 * The compiler knows nothing of the jump.  So progress lives in the caller's struct, not in locals of the function
 * that called sigsetjmp, and a compiler barrier follows each frame; what is not in that struct is dead after a jump.
 *
 * The books.  Two things happen without a fault that our books must learn of, and the access itself tells them:
 *
 *   - a write to a frame that has the shared zero page mapped becomes resident by copy-on-write: ZEROMAP -> RESIDENT
 *     *before* the store.  If a discard comes between, it changes the byte, and the store then faults like any other.
 *   - without userfaultfd (EMU_SERVICE_OFF) nothing faults to us at all: ZERO -> RESIDENT or ZEROMAP before the
 *     access.
 *
 * After the access the byte is read once more: if a discard came between note and access, the frame may be present and
 * marked ZERO, so the access is made again (a touch, a fill, a read or a copy of the same bytes can be).  With that the
 * books are exact under any interleaving with reclaim.
 */
#define _GNU_SOURCE
#include "core.h"

#include <stdlib.h>
#include <string.h>

#define barrier() atomic_signal_fence(memory_order_seq_cst)

#define TOUCH_RUN 32 /* frames, a multiple of 8 */
#define AHEAD 8       /* frames; past the end of the RAM there is a guard, and a prefetch doesn't fault */

#define WORDS (EMU_FRAME_SIZE / sizeof(uint64_t))

static uint64_t mix(uint64_t x) /* splitmix64's finaliser (S. Vigna) */
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* Word i of a filled frame is first + i * STEP: no two frames agree, and a torn one differs from both. */
#define STEP 0x9e3779b97f4a7c15u
static uint64_t first_word(uint64_t seed, uint64_t key)
{
	return mix(mix(seed + STEP) ^ (key * 0xd1342543de82ef95u + 1));
}

void emu_content_words(uint64_t seed, uint64_t key, uint64_t *ret)
{
	uint64_t word = first_word(seed, key);

	for (size_t i = 0; i < WORDS; i++, word += STEP)
		ret[i] = word;
}

static bool writes(int op)
{
	return op == EMU_TOUCH_WRITE || op == EMU_SET || op == EMU_FILL || op == EMU_COPY;
}

/* Before an access: returns 0, 1 if the books were changed by it, or an error if the frame is known to be lost. */
static int note(struct emu_region *r, uint64_t gfn, bool write)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);
		uint8_t to;

		switch (state) {
		case EMU_LOST:
			emu_stat_add(r, EMU_STAT_pgfault_lost, 1);
			return -EHWPOISON;
		case EMU_ZEROMAP:
			if (!write)
				return 0;
			to = EMU_RESIDENT;
			break;
		case EMU_ZERO:
			if (r->uffd >= 0)
				return 0;
			to = write ? EMU_RESIDENT : EMU_ZEROMAP;
			emu_stat_add(r, write ? EMU_STAT_pgfault_write : EMU_STAT_pgfault_read, 1);
			break;
		case EMU_BUSY:
			if (r->uffd >= 0)
				return 0; /* if it matters, the access faults and waits */
			emu_state_wait(r, gfn);
			continue;
		default:
			return 0;
		}
		if (emu_state_try(r, gfn, state, to)) {
			emu_state_moved(r, state, to, 1);
			return 1;
		}
	}
}

/* After an access whose note changed the books: a page has come without a fault, and rss.c must learn of it. */
static void mark(struct emu_region *r, uint64_t gfn)
{
	atomic_thread_fence(memory_order_seq_cst);
	emu_rss_mark(r, gfn / EMU_BLOCK_FRAMES);
}

/* After an access: true if the books still tell what the access did. */
static bool noted(struct emu_region *r, uint64_t gfn, bool write)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);

		/*
		 * BUSY matters to a write: a reader's fault may have mapped the zero page and not published it yet when
		 * our store replaced it; then ZEROMAP comes out, and the note has to be made again.
		 */
		if (state == EMU_BUSY && (write || r->uffd < 0)) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (write && state == EMU_ZEROMAP)
			return false;
		return r->uffd >= 0 || (state != EMU_ZERO && state != EMU_LOST);
	}
}

EMU_GUEST_BYTES static void copy_bytes(uint8_t *to, const uint8_t *from, size_t n)
{
#if defined(__SANITIZE_THREAD__)
	for (size_t i = 0; i < n; i++) /* memcpy's interceptor would check guest bytes */
		((volatile uint8_t *)to)[i] = ((const volatile uint8_t *)from)[i];
#else
	if (to == from) /* a copy onto itself stores nothing, and the books say that it did */
		__atomic_fetch_or(to, 0, __ATOMIC_RELAXED);
	memmove(to, from, n); /* the buffer may be guest memory, too */
#endif
}

/* source: of EMU_COPY, else NULL. False: a frame that was to be verified differs. */
EMU_GUEST_BYTES static bool access_frame(uint8_t *frame, int op, uint64_t arg, uint64_t key, const uint8_t *source)
{
	uint64_t *words = (uint64_t *)frame;
	uint64_t word, differ = 0;

	switch (op) {
	case EMU_TOUCH_READ:
		(void)*(volatile uint8_t *)frame;
		break;
	case EMU_TOUCH_WRITE:
		__atomic_fetch_or(frame, 0, __ATOMIC_RELAXED);
		break;
	case EMU_SET:
		memset(frame, (int)arg, EMU_FRAME_SIZE);
		break;
	case EMU_FILL:
		word = first_word(arg, key);
		for (size_t i = 0; i < WORDS; i++)
			words[i] = word + i * STEP;
		break;
	case EMU_VERIFY:
		word = first_word(arg, key);
		for (size_t i = 0; i < WORDS; i++)
			differ |= words[i] ^ (word + i * STEP);
		break;
	case EMU_COPY:
		copy_bytes(frame, source, EMU_FRAME_SIZE);
		break;
	default:
		break;
	}
	return !differ;
}

/*
 * One access to a frame, noted before and after; returns 0, or an error with the frame in guard.  `first` says that the
 * frame was missing a moment ago: then one byte is touched by itself, and some of the times timed, so that what a fault
 * costs is known and the rest of the access isn't part of it.
 */
static int touch_frame(struct emu_guard *guard, struct emu_region *r, uint64_t gfn, bool write, bool first)
{
	const bool timed = first && emu_thread.faults++ % EMU_LATENCY_EVERY == 0;
	uint64_t t0 = timed ? emu_now_ns() : 0;
	int changed;

	do {
		changed = note(r, gfn, write);
		if (changed < 0) {
			guard->err = changed;
			guard->gfn = gfn;
			return changed;
		}
		barrier();
		access_frame(emu_frame(r, gfn), write ? EMU_TOUCH_WRITE : EMU_TOUCH_READ, 0, 0, NULL);
		barrier();
		if (changed)
			mark(r, gfn);
	} while (!noted(r, gfn, write));
	if (timed)
		emu_latency_add(r, write ? EMU_LAT_FAULT_WRITE : EMU_LAT_FAULT_READ, emu_now_ns() - t0);
	return 0;
}

static uint64_t resident_run(const struct emu_region *r, uint64_t gfn, uint64_t count)
{
	uint64_t n = 0;

	while (count - n >= 8 && emu_state_load8(r, gfn + n) == EMU_RESIDENT)
		n += 8;
	return n;
}

/*
 * A run of frames from gfn on that are all RESIDENT before and after being touched: nothing to note, and nothing that
 * the books must learn.  Returns how many; the caller goes on one by one.
 *
 * One load or store in a loop, and not eight unrolled: the prefetcher goes by the instruction's address and stride.  An
 * atomic OR waits for its line before the next one starts, so lines are asked for ahead of it.
 */
EMU_GUEST_BYTES static uint64_t touch_resident(const struct emu_region *r, uint64_t gfn, uint64_t count, bool write)
{
	const uint64_t n = gfn % 8 ? 0 : resident_run(r, gfn, count < TOUCH_RUN ? count : TOUCH_RUN);
	const uint8_t *end = emu_frame(r, gfn + n);

	if (write)
		for (uint8_t *frame = emu_frame(r, gfn); frame < end; frame += EMU_FRAME_SIZE) {
			__builtin_prefetch(frame + AHEAD * EMU_FRAME_SIZE, 1);
			__atomic_fetch_or(frame, 0, __ATOMIC_RELAXED);
		}
	else
		for (const uint8_t *frame = emu_frame(r, gfn); frame < end; frame += EMU_FRAME_SIZE)
			(void)*(const volatile uint8_t *)frame;
	barrier();
	return n ? resident_run(r, gfn, n) : 0;
}

static int walk_frame(struct emu_walk *w, uint64_t gfn, uint64_t key)
{
	struct emu_region *r = w->r;
	const bool write = writes(w->op), copies = w->op == EMU_COPY;
	const bool first = emu_state_load(r, gfn) == EMU_ZERO;
	int err = 0;
	bool good;

	if (copies)
		err = touch_frame(&w->guard, r, key, false, emu_state_load(r, key) == EMU_ZERO);
	if (err)
		return err;
	if (first || w->op == EMU_TOUCH_WRITE || w->op == EMU_TOUCH_READ) {
		err = touch_frame(&w->guard, r, gfn, write, first);
		if (err || w->op == EMU_TOUCH_WRITE || w->op == EMU_TOUCH_READ)
			return err;
	}
	do {
		int changed = note(r, gfn, write);

		if (changed < 0) {
			w->guard.err = changed;
			w->guard.gfn = gfn;
			return changed;
		}
		barrier();
		good = access_frame(emu_frame(r, gfn), w->op, w->arg, key, copies ? emu_frame(r, key) : NULL);
		barrier();
		if (changed)
			mark(r, gfn);
	} while (!noted(r, gfn, write) || (copies && !noted(r, key, false)));
	if (!good) {
		if (w->bad_count < w->bad_cap)
			w->bad[w->bad_count] = gfn;
		w->bad_count++;
	}
	return 0;
}

static void walk(struct emu_walk *w)
{
	struct emu_region *r = w->r;
	const bool touches = (w->op == EMU_TOUCH_WRITE || w->op == EMU_TOUCH_READ) && !w->hist;
	uint64_t skip = w->skip;

	for (size_t i = 0; i < w->n && w->left; i++) {
		const struct emu_range *range = &w->ranges[i];
		uint64_t k = skip, end = range->count;

		if (skip >= range->count) {
			skip -= range->count;
			continue;
		}
		skip = 0;
		if (w->left < end - k)
			end = k + w->left;
		while (k < end) {
			uint64_t n = touches ? touch_resident(r, range->gfn + k, end - k, w->op == EMU_TOUCH_WRITE) : 0;

			if (!n) {
				uint64_t t0 = w->hist ? emu_now_ns() : 0;

				if (walk_frame(w, range->gfn + k, range->key + k))
					return;
				if (w->hist)
					emu_hist_add(w->hist, emu_now_ns() - t0);
				n = 1;
			}
			k += n;
			w->done += n;
			w->left -= n;
			barrier();
		}
	}
}

/* Returns 0 or -errno; w->done frames are finished, w->guard.gfn is where it stopped. */
int emu_guest_walk(struct emu_walk *w)
{
	w->guard.region = w->r;
	w->guard.err = 0;
	w->done = 0;
	if (!sigsetjmp(w->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &w->guard, memory_order_relaxed);
		barrier();
		walk(w);
		barrier();
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	return w->guard.err;
}

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
		int changed;

		if (c->install && n == EMU_FRAME_SIZE && emu_state_load(r, gfn) == EMU_ZERO)
			installed = emu_fault_install(r, gfn, c->left >> EMU_FRAME_SHIFT, c->buf);
		if (installed > 0) {
			n = (uint64_t)installed << EMU_FRAME_SHIFT;
		} else if (installed < 0) {
			c->guard.err = (int)installed;
			c->guard.gfn = gfn;
			return;
		} else {
			if (emu_state_load(r, gfn) == EMU_ZERO && touch_frame(&c->guard, r, gfn, c->write, true))
				return;
			do {
				changed = note(r, gfn, c->write);
				if (changed < 0) {
					c->guard.err = changed;
					c->guard.gfn = gfn;
					return;
				}
				barrier();
				if (c->write)
					copy_bytes(at, c->buf, n);
				else
					copy_bytes(c->buf, at, n);
				barrier();
				if (changed)
					mark(r, gfn);
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
	c->guard.err = 0;
	if (!sigsetjmp(c->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &c->guard, memory_order_relaxed);
		barrier();
		copy(c);
		barrier();
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	return c->guard.err;
}

static int copy_range(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, bool write, struct emu_progress *ret)
{
	struct copy c = { .r = r, .gpa = gpa, .buf = buf, .left = n, .write = write };
	int err = atomic_load(&r->dead);
	bool was_blocked;

	/*
	 * UFFDIO_COPY reads its source in the kernel while the destination is BUSY.  A source that is guest memory could
	 * fault there, and with the thread service wait for a fault that waits for that BUSY: such bytes are copied here.
	 */
	c.install = write && r->uffd >= 0 && !emu_registry_overlaps((uintptr_t)buf, n);
	*ret = (struct emu_progress){ 0 };
	if (gpa > r->frames << EMU_FRAME_SHIFT || n > (r->frames << EMU_FRAME_SHIFT) - gpa)
		return -ERANGE;
	if (err)
		return -EOWNERDEAD;
	err = emu_region_enter(r);
	if (err)
		return err;
	emu_sigbus_ensure(r);
	was_blocked = emu_sigbus_unblock();
	err = copy_armed(&c);
	if (was_blocked)
		emu_sigbus_block();
	emu_region_leave(r);
	ret->done = c.done;
	ret->bad_gfn = err ? c.guard.gfn : 0;
	return err;
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
