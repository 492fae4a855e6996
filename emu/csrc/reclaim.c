/* SPDX-License-Identifier: MIT */
/*
 * reclaim.c - every way by which memory leaves the guest.
 *
 *   discard     MADV_DONTNEED   the page is gone when the call returns        -> ZERO
 *   lazy_free   MADV_FREE       the kernel takes it when it needs memory      -> LAZY
 *   lazy_drop   MADV_PAGEOUT    pressure on demand: takes the lazy ones now   LAZY -> ZERO, where it did
 *   poison      MADV_DONTNEED   and every access fails from then on           -> LOST
 *   unpoison                    the only way out of LOST: never a side effect -> ZERO
 *   drop        MADV_DONTNEED   of what was set aside and not asked for       ASIDE -> ZERO, or DISCARDED
 *   steal       MADV_DONTNEED   of what its guest calls unused, or volatile   -> ZERO, or DISCARDED
 *
 * One engine under all: walk the ranges, claim frames into BUSY, gather neighbours into runs and runs into a batch,
 * make one system call for the batch, publish.  A batch holds at most BATCH frames, which bounds how long a fault may
 * find its frame BUSY, and at most RUNS ranges, which is what process_madvise(2) takes (UIO_MAXIOV).  BATCH is a
 * compromise: with another thread of the process running each madvise costs an interrupt to its core (17 us), which is
 * 17 % of what taking 4 MiB costs and 1 % of 64 MiB; and a fault that falls into it waits as long as the kernel takes
 * to free 16,384 pages (1.6 ms at 100 ns each, and there is no bound on what a kernel takes).  Where ranges can't share
 * a system call, or a page needs more than freeing, batches are smaller.  Frames that hold nothing cost no system call; a
 * block whose summary word is 0 isn't even walked, and a batch that has waited for WALK frames to be looked at goes as it
 * is.
 *
 * Races, thought through once for all:
 *  - against a fault: BUSY spans the madvise, so no install can fall between the page's end and the byte's.
 *  - against a guest's access that doesn't fault: the page goes before or after the access, as with two CPUs and one
 *    real page.  Who gives a frame back while a vCPU still uses it has lost what that vCPU wrote; that is the caller's
 *    protocol (the guest waits for the acknowledgement), not ours to repair.
 *  - against another reclaimer on the same frames: each frame is claimed by one.  A holder flushes its batch *before* it
 *    waits for somebody else's BUSY: holding while waiting would let two calls wait for each other.
 *  - MADV_FREE and a write: a write to a lazily freed page cancels the free silently (mm/madvise.c, madvise_free).
 *    The frame stays LAZY in our books, meaning "may be dropped without an event": marking it RESIDENT after the write
 *    would race with a second lazy_free, and a drop of a frame marked RESIDENT could not be told from a loss.
 *    What lazy_drop can't reach: MADV_FREE parks up to 31 pages in a batch of its CPU (mm/swap.c, lru_lazyfree), and
 *    MADV_PAGEOUT drains only the CPU it runs on.  Such frames stay LAZY, as they would under real pressure.
 *  - against a refusal in the middle.  madvise goes on through a range until a part of it refuses (a locked page), so
 *    when a batch fails, the runs before the failing one are done, those after it aren't, and of that one pagemap is
 *    asked: a frame marked RESIDENT whose page is gone could never be served again.
 *  - against the end of the thread service (dead): what a reclaim under way empties after service.c has poisoned
 *    everything missing would leave a later access asleep, so it is poisoned here.
 *  - a frame that is ASIDE has its page in the side region (aside.c), and one that is PRESERVED has it in the store: giving
 *    such a frame back drops it there.  A drop takes only what was set aside at a given time (its stamp): what came back
 *    meanwhile and was set aside anew has another one, and the stamp can't change while the frame is BUSY.
 *  - lazy_drop asks pagemap, under BUSY, what the kernel did: neither present nor swapped means dropped.  mincore
 *    can't tell a swapped page from a dropped one, and a swapped page holds data.
 */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>
#include <sys/mman.h>

#define BATCH 16384 /* frames of a discard */
#define FEW 1024    /* frames, where taking one may need more than freeing it: pageout, poison, MADV_FREE */
#define RUNS 1024
#define SINGLE 64 /* runs, where each is a system call of its own */
#define WALK 16384

#define IN(s) (1u << EMU_##s)

#define OF(u) (1u << EMU_##u)

enum verb { DISCARD, LAZY_FREE, LAZY_DROP, POISON, UNPOISON, ASIDE_DROP, ASIDE_EVICT, STEAL_UNUSED, STEAL_VOLATILE };

static const struct {
	uint32_t claims; /* states that the verb takes */
	uint32_t usages; /* and what a guest that says something must say of them: the others aren't the caller's to take */
	int advice;
	int event;
	enum emu_stat frames, calls;
} verbs[] = {
	[DISCARD] = { IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY) | IN(ASIDE) | IN(DISCARDED), OF(STABLE) | OF(UNUSED), MADV_DONTNEED, EMU_EV_DISCARD,
	              EMU_STAT_discard_frames, EMU_STAT_discard_calls },
	/* a volatile page that goes without an event would read as zeros */
	[LAZY_FREE] = { IN(RESIDENT) | IN(LAZY), OF(STABLE) | OF(UNUSED), MADV_FREE, EMU_EV_LAZY_FREE,
	                EMU_STAT_lazyfree_frames, EMU_STAT_lazyfree_calls },
	[LAZY_DROP] = { IN(LAZY), OF(STABLE) | OF(UNUSED), MADV_PAGEOUT, EMU_EV_LAZY_DROP,
	                EMU_STAT_lazydrop_frames, EMU_STAT_lazydrop_calls },
	[POISON] = { IN(ZERO) | IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY) | IN(ASIDE) | IN(DISCARDED), EMU_ANY_USAGE, MADV_DONTNEED,
	             EMU_EV_POISON,
	             EMU_STAT_poison_frames, EMU_STAT_discard_calls },
	[UNPOISON] = { IN(LOST), EMU_ANY_USAGE, MADV_DONTNEED, 0, EMU_STAT_unpoison_frames, EMU_STAT_discard_calls },
	[ASIDE_DROP] = { IN(ASIDE), OF(STABLE) | OF(UNUSED), MADV_DONTNEED, EMU_EV_ASIDE_DROP, EMU_STAT_aside_dropped,
	                 EMU_STAT_discard_calls },
	[ASIDE_EVICT] = { IN(ASIDE), OF(UNUSED) | OF(VOLATILE), MADV_DONTNEED, EMU_EV_ASIDE_DROP, EMU_STAT_aside_dropped,
	                  EMU_STAT_discard_calls },
	[STEAL_UNUSED] = { IN(RESIDENT) | IN(LAZY) | IN(ASIDE), OF(UNUSED), MADV_DONTNEED, EMU_EV_STEAL, EMU_STAT_steal_unused,
	                   EMU_STAT_discard_calls },
	[STEAL_VOLATILE] = { IN(RESIDENT) | IN(LAZY) | IN(ASIDE), OF(VOLATILE), MADV_DONTNEED, EMU_EV_STEAL,
	                     EMU_STAT_steal_volatile, EMU_STAT_discard_calls },
};

struct batch {
	struct emu_region *r;
	enum verb verb;
	int stamp;      /* of ASIDE_DROP and ASIDE_EVICT: -1 = any but the swapper's */
	int64_t taken;  /* frames that held memory, over all batches */
	size_t runs;
	uint64_t frames;
	uint64_t walked; /* frames looked at since the batch was begun */
	int64_t moved[EMU_NR_STATES][EMU_NR_STATES]; /* frames, from state to state: the gauges learn of it in flush */
	struct iovec run[RUNS];
	uint8_t prior[BATCH]; /* by frame, in the runs' order */
};

/* What a frame becomes when the verb was done to it. */
static uint8_t outcome(enum verb verb, uint8_t prior, bool absent)
{
	switch (verb) {
	case DISCARD:
	case UNPOISON:
	case ASIDE_DROP:
	case STEAL_UNUSED:
		return EMU_ZERO;
	case ASIDE_EVICT:
	case STEAL_VOLATILE:
		return EMU_DISCARDED;
	case LAZY_FREE:
		return EMU_LAZY;
	case LAZY_DROP:
		return absent ? EMU_ZERO : prior;
	default:
		return EMU_LOST;
	}
}

/* Whether that counts as a frame that the verb took. */
static bool counts(enum verb verb, uint8_t prior, uint8_t now)
{
	switch (verb) {
	case DISCARD:
		return prior != EMU_ZEROMAP && prior != EMU_DISCARDED && now == EMU_ZERO;
	case LAZY_DROP:
		return now == EMU_ZERO;
	default:
		return now != prior || verb == LAZY_FREE;
	}
}

enum how { DONE, FAILED, UNTOUCHED };

/* Publish one run: what was done to it, what may have been, or that nothing was. */
static int publish(struct batch *b, const struct iovec *run, const uint8_t *prior, enum how how)
{
	struct emu_region *r = b->r;
	const bool aside = emu_in_side(r, run->iov_base); /* then all of the run is */
	const uint8_t *base = aside ? atomic_load(&r->side) : r->base;
	const uint64_t gfn = (uint64_t)((uint8_t *)run->iov_base - base) >> EMU_FRAME_SHIFT;
	const uint64_t n = run->iov_len >> EMU_FRAME_SHIFT;
	const bool ask = how == FAILED || (how == DONE && b->verb == LAZY_DROP);
	uint8_t there[BATCH];
	int64_t frames = 0;
	int err = 0;

	if (ask)
		emu_pages_there(r, run->iov_base, n, there);
	if (how == DONE && (b->verb == POISON || b->verb == ASIDE_EVICT || b->verb == STEAL_VOLATILE))
		err = emu_lose(r, gfn, n); /* LOST in any case: the byte is the truth, and guarded accesses obey it */
	if (how == DONE && b->verb == UNPOISON && (err = emu_find(r, gfn, n)))
		how = UNTOUCHED;
	for (uint64_t i = 0, end; i < n; i = end) {
		const bool gone = ask && !there[i];
		uint8_t to = prior[i];

		/* the frames from here on that share a fate */
		for (end = i + 1; end < n && prior[end] == prior[i] && (!ask || !there[end] == !there[i]); end++)
			;
		if (how == DONE)
			to = outcome(b->verb, prior[i], gone);
		else if (how == FAILED && b->verb == LAZY_FREE)
			to = EMU_LAZY; /* may have been freed: the weaker claim is true either way */
		else if (how == FAILED && gone && prior[i] != EMU_LOST)
			to = outcome(b->verb, prior[i], true);
		/* gone in a run that failed, or still lost though the MADV_DONTNEED has dropped its marker */
		if (to == EMU_LOST && (how != DONE || b->verb == UNPOISON))
			emu_lose(r, gfn + i, end - i);
		if (how == DONE && b->verb == DISCARD && prior[i] == EMU_DISCARDED && emu_find(r, gfn + i, end - i))
			to = EMU_DISCARDED;
		if (counts(b->verb, prior[i], to))
			frames += (int64_t)(end - i);
		if (b->verb == DISCARD && prior[i] == EMU_ZEROMAP && to == EMU_ZERO)
			emu_stat_add(r, EMU_STAT_discard_zeromap, (int64_t)(end - i));
		b->moved[prior[i]][to] += (int64_t)(end - i);
		emu_state_publish_run(r, gfn + i, end - i, to);
	}
	emu_state_wake(r, gfn, n);
	b->taken += how == UNTOUCHED ? 0 : frames;
	return err;
}

static int flush(struct batch *b)
{
	const uint8_t *prior = b->prior;
	const int64_t before = b->taken;
	int64_t taken;
	size_t done;
	int err;

	if (!b->runs)
		return 0;
	memset(b->moved, 0, sizeof(b->moved));
	err = emu_advise(b->r, b->run, b->runs, verbs[b->verb].advice, verbs[b->verb].calls, &done);
	for (size_t i = 0; i < b->runs; i++) {
		int failed = publish(b, &b->run[i], prior, i < done ? DONE : i == done ? FAILED : UNTOUCHED);

		err = err ? err : failed;
		prior += b->run[i].iov_len >> EMU_FRAME_SHIFT;
	}
	for (uint8_t from = 0; from < EMU_NR_STATES; from++)
		for (uint8_t to = 0; to < EMU_NR_STATES; to++)
			emu_state_moved(b->r, from, to, b->moved[from][to]);
	taken = b->taken - before;
	if (b->verb != ASIDE_DROP && b->verb != ASIDE_EVICT) {
		const int64_t aside = b->moved[EMU_ASIDE][EMU_ZERO] + b->moved[EMU_ASIDE][EMU_LOST] +
		                      b->moved[EMU_ASIDE][EMU_DISCARDED];

		emu_stat_add(b->r, EMU_STAT_aside_dropped, aside);
		taken -= b->verb == DISCARD ? aside : 0; /* discard_frames are those of the guest's RAM */
	}
	emu_stat_add(b->r, verbs[b->verb].frames, taken);
	b->runs = 0;
	b->frames = 0;
	return err;
}

/* What the swapper has set aside (swapout.c) isn't anybody else's to drop: the guest has never given it up. */
static bool stamp_fits(const struct batch *b, uint64_t gfn)
{
	const int stamp = emu_aside_stamp(b->r, gfn);

	return b->stamp < 0 ? stamp != EMU_STAMP_SWAP : stamp == b->stamp;
}

static int gather(struct batch *b, uint64_t gfn, uint64_t end)
{
	struct emu_region *r = b->r;
	const uint32_t claims = verbs[b->verb].claims;
	const uint32_t usages = atomic_load(&r->telling) ? verbs[b->verb].usages : EMU_ANY_USAGE;
	const uint64_t most_frames = b->verb == DISCARD || b->verb == STEAL_UNUSED ||
	                                     (b->verb == STEAL_VOLATILE && b->r->service == EMU_SERVICE_INLINE) ? BATCH : FEW;
	const size_t most_runs = r->vectored ? RUNS : SINGLE;

	while (gfn < end) {
		uint8_t byte, state, *at;
		bool joins;
		uint64_t n;
		int err;

		if (!b->frames)
			b->walked = 0;
		else if (++b->walked > WALK && (err = flush(b)))
			return err;
		if (gfn % EMU_BLOCK_FRAMES == 0 && !(claims & IN(ZERO)) &&
		    !atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_acquire)) {
			gfn += EMU_BLOCK_FRAMES;
			continue;
		}
		byte = emu_byte_load(r, gfn);
		state = emu_byte_state(byte);
		if (state == EMU_BUSY) {
			err = flush(b);
			if (err)
				return err;
			emu_state_wait(r, gfn);
			continue;
		}
		if (state == EMU_PRESERVED && (b->verb == DISCARD || b->verb == POISON)) {
			n = emu_swap_forget(r, gfn, end - gfn);
			b->taken += b->verb == DISCARD ? (int64_t)n : 0;
			continue; /* ZERO now, or somebody else's: read the byte again */
		}
		if (!(claims >> state & 1) || !(usages >> emu_byte_usage(byte) & 1)) {
			gfn++;
			continue;
		}
		at = state == EMU_ASIDE ? emu_side(r, gfn) : emu_frame(r, gfn);
		joins = b->runs && emu_in_side(r, b->run[b->runs - 1].iov_base) == (state == EMU_ASIDE) &&
		        (uint8_t *)b->run[b->runs - 1].iov_base + b->run[b->runs - 1].iov_len == at;
		if (b->frames >= most_frames || (b->runs >= most_runs && !joins)) {
			err = flush(b);
			if (err)
				return err;
			continue; /* time has passed: read the byte again */
		}
		n = most_frames - b->frames;
		n = emu_state_claim_used(r, gfn, end - gfn < n ? end - gfn : n, state, usages);
		if (!n)
			continue;
		if (b->verb == ASIDE_DROP || b->verb == ASIDE_EVICT) {
			const uint64_t claimed = n;

			for (n = 0; n < claimed && stamp_fits(b, gfn + n); n++)
				;
			if (n < claimed) {
				emu_state_publish_run(r, gfn + n, claimed - n, EMU_ASIDE);
				emu_state_wake(r, gfn + n, claimed - n);
			}
			if (!n) {
				gfn++;
				continue;
			}
		}
		memset(b->prior + b->frames, state, n);
		b->frames += n;
		if (joins)
			b->run[b->runs - 1].iov_len += n << EMU_FRAME_SHIFT;
		else
			b->run[b->runs++] = (struct iovec){ at, n << EMU_FRAME_SHIFT };
		gfn += n;
	}
	return 0;
}

static int64_t reclaim(struct emu_region *r, const struct emu_range *ranges, size_t n, enum verb verb, int stamp)
{
	struct batch b; /* 33 KiB of stack, and only the head of it is set */
	int err = emu_region_enter_at(r, ranges, n);

	if (err)
		return err;
	b.r = r;
	b.verb = verb;
	b.stamp = stamp;
	b.taken = 0;
	b.runs = 0;
	b.frames = 0;
	for (size_t i = 0; i < n && !err; i++)
		err = gather(&b, ranges[i].gfn, ranges[i].gfn + ranges[i].count);
	if (!err)
		err = flush(&b);
	else
		flush(&b); /* never leave a frame BUSY */
	if (verbs[verb].event && b.taken)
		emu_ring_push(r, verbs[verb].event, n ? ranges[0].gfn : 0, (uint64_t)b.taken, 0);
	for (size_t i = 0; i < n && atomic_load(&r->dead); i++)
		emu_service_refuse(r, ranges[i].gfn, ranges[i].count);
	emu_region_leave(r);
	return err ? err : b.taken;
}

int64_t emu_discard(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, DISCARD, -1);
}

int64_t emu_lazy_free(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, LAZY_FREE, -1);
}

int64_t emu_lazy_drop(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, LAZY_DROP, -1);
}

int64_t emu_poison(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, POISON, -1);
}

int64_t emu_unpoison(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, UNPOISON, -1);
}

/* What its guest says that it doesn't need (EMU_UNUSED), or can have again (EMU_VOLATILE). Others stay. */
int64_t emu_reclaim_steal(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage)
{
	if (usage != EMU_UNUSED && usage != EMU_VOLATILE)
		return -EINVAL;
	return reclaim(r, ranges, n, usage == EMU_UNUSED ? STEAL_UNUSED : STEAL_VOLATILE, -1);
}

int64_t emu_aside_drop(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp, int evict)
{
	if (stamp > EMU_STAMP_MAX)
		return -EINVAL;
	if (evict && !emu_can_lose(r))
		return -EOPNOTSUPP;
	return reclaim(r, ranges, n, evict ? ASIDE_EVICT : ASIDE_DROP, stamp);
}
