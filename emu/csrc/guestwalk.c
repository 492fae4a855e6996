/* SPDX-License-Identifier: MIT */
/*
 * guestwalk.c - what a vCPU does to one frame after another: touch, set, fill, verify, copy.
 *
 * The way to touch, and why the books are right afterwards, is guestaccess.h's.  Here is the speed: frames that are there
 * and only touched go in runs, with one look at their bytes before and one after; everything else goes frame by frame.
 */
#define _GNU_SOURCE
#include "guestaccess.h"

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

/* source: of EMU_COPY, else NULL. False: a frame that was to be verified differs. */
EMU_GUEST_BYTES static bool access_frame(uint8_t *frame, int op, uint64_t arg, uint64_t key, const uint8_t *source)
{
	uint64_t *words = (uint64_t *)frame;
	uint64_t word, differ = 0;

	switch (op) {
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
EMU_GUEST_BYTES static uint64_t touch_resident(struct emu_region *r, uint64_t gfn, uint64_t count, bool write)
{
	const uint64_t n = gfn % 8 ? 0 : resident_run(r, gfn, count < TOUCH_RUN ? count : TOUCH_RUN);
	const uint8_t *end = emu_frame(r, gfn + n);

	emu_access_note(r, gfn, n, write);
	if (write)
		for (uint8_t *frame = emu_frame(r, gfn); frame < end; frame += EMU_FRAME_SIZE) {
			__builtin_prefetch(frame + AHEAD * EMU_FRAME_SIZE, 1);
			touch_byte(frame, true);
		}
	else
		for (uint8_t *frame = emu_frame(r, gfn); frame < end; frame += EMU_FRAME_SIZE)
			touch_byte(frame, false);
	barrier();
	return n ? resident_run(r, gfn, n) : 0;
}

static int walk_frame(struct emu_walk *w, uint64_t gfn, uint64_t key)
{
	struct emu_region *r = w->r;
	const bool write = writes(w->op), copies = w->op == EMU_COPY;
	uint8_t was = emu_state_load(r, gfn);
	bool good;

	if (w->op == EMU_TOUCH_WRITE || w->op == EMU_TOUCH_READ)
		return touch_frame(&w->guard, r, gfn, write, was);
	if (write && (was == EMU_DISCARDED || was == EMU_BUSY)) { /* wholly overwritten */
		emu_fault_forget(r, gfn, EMU_STABLE);
		was = emu_state_load(r, gfn);
	}
	do {
		int changed, err;

		/* each time: a discard may have taken either frame since */
		if (copies && (err = touch_frame(&w->guard, r, key, false, emu_state_load(r, key))))
			return err;
		if (emu_state_missing(was) && (err = touch_frame(&w->guard, r, gfn, write, was)))
			return err;
		was = EMU_RESIDENT;
		changed = promise(&w->guard, r, gfn, write);
		if (changed < 0)
			return changed;
		good = access_frame(emu_frame(r, gfn), w->op, w->arg, key, copies ? emu_frame(r, key) : NULL);
		promise_kept(&w->guard, r, gfn, changed);
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
	emu_access_enter(w->r);
	w->guard.err = 0;
	w->guard.elsewhere = false;
	w->done = 0;
	w->guard.promised = EMU_NO_PROMISE;
	if (!sigsetjmp(w->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &w->guard, memory_order_relaxed);
		barrier();
		walk(w);
		barrier();
	} else {
		keep_promise(&w->guard);
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	emu_access_leave(w->r);
	return w->guard.err;
}
