/* SPDX-License-Identifier: MIT */
/*
 * steal.c - memory that the host takes without a word to the guest (CMM2).
 *
 * In this order: what the guest calls unused, then volatile, then potentially volatile, and of each kind as a policy says.
 * No instruction of the guest runs for it, and it works while the guest stands still.
 *
 * Unused and volatile frames are dropped in place (reclaim.c).  A potentially volatile one may only be dropped while it is
 * clean, and a vCPU may be writing it right now.  So it is captured first, aside, and asked about afterwards:
 *
 *   a store before the capture   its dirty bit was set before it (access.c), and we read the bit after the capture
 *   a store after it             faults, finds the frame BUSY or ASIDE, and brings it back, or waits until we are done
 *
 * Clean, the page aside is dropped: Pr -> Vz.  Dirty, it is stored: Pr -> Sp; if there is no store, or it is full, the page
 * goes back into the guest.  Nobody here clears a dirty bit: that is for who writes the page to the disk.
 */
#include "core.h"

#include <sys/mman.h>

#define VICTIMS 1024 /* ranges of one look */
#define ROUND 16384  /* frames */
#define GROUP 64     /* frames that are BUSY while they are asked about */

/*
 * Frames [gfn, gfn + n) are BUSY from ASIDE.  How many of them, from the first on, share its fate; *goes: that they may be
 * dropped.  `bits`: what emu_access_peek() said of them.
 */
static uint64_t fate(const struct emu_region *r, uint64_t gfn, uint64_t n, const uint8_t *bits, bool *goes)
{
	uint64_t run = 0;

	for (; run < n; run++) {
		const uint8_t usage = emu_byte_usage(emu_byte_load(r, gfn + run));
		const bool may = usage == EMU_UNUSED || usage == EMU_VOLATILE ||
		                 (usage == EMU_POTENTIAL && bits && !(bits[run] & EMU_DIRTIED));

		if (run && may != *goes)
			break;
		*goes = may;
	}
	return run;
}

/* Frames that are BUSY from ASIDE and may be dropped, of one usage or several. Publishes them; whether they went. */
static bool drop(struct emu_region *r, uint64_t gfn, uint64_t n)
{
	if (madvise(emu_side(r, gfn), n << EMU_FRAME_SHIFT, MADV_DONTNEED)) {
		emu_state_publish_run(r, gfn, n, EMU_ASIDE);
		emu_state_wake(r, gfn, n);
		return false;
	}
	for (uint64_t i = 0; i < n; i++) {
		const uint8_t usage = emu_byte_usage(emu_byte_load(r, gfn + i));
		const uint8_t to = usage == EMU_UNUSED ? EMU_ZERO : EMU_DISCARDED;

		if (to == EMU_DISCARDED)
			emu_lose(r, gfn + i, 1);
		emu_stat_add(r, usage == EMU_UNUSED ? EMU_STAT_steal_unused : usage == EMU_VOLATILE ? EMU_STAT_steal_volatile
		                : EMU_STAT_steal_potential, 1);
		emu_state_publish(r, gfn + i, to);
		emu_state_moved(r, EMU_ASIDE, to, 1);
	}
	emu_state_wake(r, gfn, n);
	return true;
}

/*
 * The same frames, for who would store them: the first of them that needn't be stored are dropped (or, if the kernel refuses,
 * left aside), and published.  Returns how many; 0: the first *keep are to be stored.
 */
uint64_t emu_steal_held(struct emu_region *r, uint64_t gfn, uint64_t n, uint64_t *keep)
{
	uint8_t bits[GROUP];
	bool goes = false, looks;

	*keep = n;
	if (!atomic_load_explicit(&r->usages, memory_order_acquire))
		return 0;
	n = n < GROUP ? n : GROUP;
	looks = atomic_load(&r->access) != NULL;
	if (looks)
		emu_access_peek(r, gfn, n, bits);
	*keep = fate(r, gfn, n, looks ? bits : NULL, &goes);
	if (!goes)
		return 0;
	n = *keep;
	*keep = 0;
	drop(r, gfn, n);
	return n;
}

/* What was captured of [gfn, end): what may go is dropped, the rest left aside. */
static uint64_t drop_captured(struct emu_region *r, uint64_t gfn, uint64_t end)
{
	uint64_t went = 0;

	while (gfn < end) {
		uint8_t bits[GROUP];
		uint64_t n;

		if (emu_state_load(r, gfn) == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		n = emu_state_claim(r, gfn, end - gfn < GROUP ? end - gfn : GROUP, EMU_ASIDE);
		n = n ? emu_aside_stamped(r, gfn, n, EMU_STAMP_SWAP) : 0;
		if (!n) {
			gfn++;
			continue;
		}
		emu_access_peek(r, gfn, n, bits);
		for (uint64_t i = 0, run; i < n; i += run) {
			bool goes = false;

			run = fate(r, gfn + i, n - i, bits + i, &goes);
			if (goes && drop(r, gfn + i, run)) {
				went += run;
			} else if (!goes) {
				emu_state_publish_run(r, gfn + i, run, EMU_ASIDE);
				emu_state_wake(r, gfn + i, run);
			}
		}
		gfn += n;
	}
	return went;
}

static int64_t steal_potential(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int64_t went = 0, err = r->aside && atomic_load(&r->access) ? emu_region_enter_at(r, ranges, n) : -EOPNOTSUPP;

	if (err)
		return err;
	for (size_t i = 0; i < n && !err; i++) {
		const uint64_t gfn = ranges[i].gfn, end = gfn + ranges[i].count;
		int64_t captured = emu_aside_take(r, gfn, end, EMU_STAMP_SWAP, 1u << EMU_POTENTIAL);

		if (captured <= 0) {
			err = captured;
			continue;
		}
		went += (int64_t)drop_captured(r, gfn, end);
		if (atomic_load(&r->swap)) {
			const int64_t stored = emu_swap_store(r, gfn, end);

			emu_stat_add(r, EMU_STAT_steal_preserved, stored);
			went += stored;
		}
		emu_aside_restore(r, gfn, end, EMU_STAMP_SWAP); /* what is dirty and can't be kept elsewhere */
	}
	if (went)
		emu_ring_push(r, EMU_EV_STEAL, n ? ranges[0].gfn : 0, (uint64_t)went, 0);
	emu_region_leave(r);
	return went ? went : err;
}

int64_t emu_steal(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage)
{
	return usage == EMU_POTENTIAL ? steal_potential(r, ranges, n) : emu_reclaim_steal(r, ranges, n, usage);
}

static uint64_t next(uint64_t *rng)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return *rng;
}

/* Up to `want` frames of that usage, from places of no order: a frame here, a frame there. */
static uint64_t at_random(struct emu_region *r, int usage, uint64_t want, uint64_t *rng, struct emu_range *ret, size_t *n)
{
	const uint64_t tries = r->frames * 2;

	*n = 0;
	for (uint64_t i = 0; i < tries && *n < VICTIMS && *n < want; i++) {
		const uint64_t gfn = next(rng) % r->frames;

		if (emu_access_may_go(r, gfn, 1u << usage))
			ret[(*n)++] = (struct emu_range){ gfn, 1, gfn };
	}
	return *n;
}

static uint64_t victims(struct emu_region *r, int usage, int policy, uint64_t want, uint64_t *rng, struct emu_range *ret,
                        size_t *n)
{
	if (policy == EMU_STEAL_AT_RANDOM && at_random(r, usage, want, rng, ret, n))
		return *n;
	return (uint64_t)emu_access_victims(r, policy == EMU_STEAL_BY_AGE ? 0 : -1, want, 1u << usage, ret, VICTIMS, n);
}

int64_t emu_steal_some(struct emu_region *r, uint64_t want, unsigned usages, int policy, uint64_t seed)
{
	uint64_t rng = seed * 2 + 1;
	int64_t went = 0;
	int err = policy < EMU_STEAL_BY_AGE || policy > EMU_STEAL_AT_RANDOM ? -EINVAL : emu_usage_enter(r);

	if (err)
		return err;
	for (int usage = EMU_UNUSED; usage < EMU_NR_USAGES; usage++) {
		int in_vain = 0;

		if (!(usages >> usage & 1))
			continue;
		while ((uint64_t)went < want && in_vain < 2) {
			const uint64_t left = want - (uint64_t)went;
			struct emu_range victim[VICTIMS];
			int64_t took;
			size_t n;

			if (!victims(r, usage, policy, left < ROUND ? left : ROUND, &rng, victim, &n))
				break;
			took = emu_steal(r, victim, n, usage);
			if (took < 0 && took != -EOPNOTSUPP)
				err = (int)took;
			in_vain = took > 0 ? 0 : took < 0 ? 2 : in_vain + 1; /* its guest has said otherwise meanwhile */
			went += took > 0 ? took : 0;
		}
	}
	emu_region_leave(r);
	return went ? went : err;
}
