/* SPDX-License-Identifier: MIT */
/*
 * state.c - one byte a frame: what the frame holds, and who may change it.
 *
 * The byte changes in two ways only.  A frame at rest is taken by compare-and-swap; whoever takes it into BUSY owns
 * it, does what must be done with the page, and publishes the new state with a release store.  So there is no lock,
 * and a frame's history is a chain of exchanges that each saw the one before.
 *
 *                 fault, install                        discard, lazy_drop that dropped
 *      ZERO ------> BUSY ------> RESIDENT | ZEROMAP ------> BUSY ------> ZERO
 *                                RESIDENT | ZEROMAP | LAZY ---> BUSY ---> LAZY      lazy_free
 *                                ZEROMAP ------> RESIDENT                           a write: no fault, no BUSY
 *                                anything at rest ---> BUSY ---> LOST ---> BUSY ---> ZERO     poison, unpoison
 *                                RESIDENT ---> BUSY ---> ASIDE ---> BUSY ---> RESIDENT        set_aside; a touch
 *                                ASIDE ---> BUSY ---> PRESERVED ---> BUSY ---> RESIDENT       swap_out; a touch
 *                                ASIDE ---> BUSY ---> ZERO | DISCARDED                        drop; evict
 *                                PRESERVED, DISCARDED ---> BUSY ---> ZERO                     discard
 *                                anything in memory, ZERO, PRESERVED ---> BUSY ---> DISCARDED volatile: stolen; said of nothing
 *
 * Rules of BUSY:
 *  - it is short (one batch of reclaim.c, one ioctl of fault.c) and its holder never touches a guest frame: the
 *    fault that it could take would wait for itself;
 *  - its holder never waits for another BUSY frame.  Two discards over the same frames in different order would
 *    wait for each other;
 *  - who meets BUSY waits and then *reads the byte again*: nothing learned before the wait is worth anything.
 *
 * Waiting: futexes are 32 bits wide and states are 8, so waiters sleep on a sequence word of their block's queue.
 * The waiter announces itself, reads seq, reads the state again, sleeps if it is still BUSY; the holder publishes,
 * then looks for waiters.  Both sides have a full barrier between their store and their load (as in Dekker's
 * algorithm), so either the waiter sees the new state or the holder sees the waiter; and if the holder's increment
 * came between the waiter's read of seq and its sleep, FUTEX_WAIT returns at once.
 *
 * The summary word of a 2 MiB block counts its frames that aren't ZERO.  It goes up after ZERO -> BUSY and down
 * before BUSY -> ZERO is published, so a block whose word is 0 holds nothing that any finished call put there.
 */
#include "core.h"
#include "memmap.h"

#include <assert.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * Eight bytes at once: on the processors that we know they are ordered with single ones.  TSan keeps its clocks by address,
 * and would take a byte that was published as part of a word for one that nobody published.
 */
#if defined(__SANITIZE_THREAD__)
#define WORDS 0
#else
#define WORDS 1
#endif

#define BIT(s) (1u << EMU_##s)
static const uint32_t legal[EMU_NR_STATES] = {
	[EMU_ZERO] = BIT(BUSY),
	[EMU_ZEROMAP] = BIT(BUSY) | BIT(RESIDENT),
	[EMU_RESIDENT] = BIT(BUSY),
	[EMU_LAZY] = BIT(BUSY),
	[EMU_BUSY] = BIT(ZERO) | BIT(ZEROMAP) | BIT(RESIDENT) | BIT(LAZY) | BIT(LOST) | BIT(ASIDE) | BIT(PRESERVED) |
	             BIT(DISCARDED),
	[EMU_LOST] = BIT(BUSY),
	[EMU_ASIDE] = BIT(BUSY),
	[EMU_PRESERVED] = BIT(BUSY),
	[EMU_DISCARDED] = BIT(BUSY),
};
/* Without userfaultfd no fault tells us: the access itself notes what it is about to do (guestaccess.h). */
static const uint32_t legal_off[EMU_NR_STATES] = {
	[EMU_ZERO] = BIT(RESIDENT) | BIT(ZEROMAP),
};

bool emu_state_legal(uint8_t from, uint8_t to, bool uffd)
{
	if (from >= EMU_NR_STATES || to >= EMU_NR_STATES)
		return false;
	return ((legal[from] | (uffd ? 0 : legal_off[from])) >> to) & 1;
}

static void summary_add(struct emu_region *r, uint64_t gfn, uint32_t n)
{
	atomic_fetch_add_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], n, memory_order_relaxed);
}

bool emu_state_try(struct emu_region *r, uint64_t gfn, uint8_t from, uint8_t to)
{
	uint8_t byte = atomic_load_explicit(&r->state[gfn], memory_order_relaxed);

	assert(emu_state_legal(from, to, r->service != EMU_SERVICE_OFF));
	do {
		if (emu_byte_state(byte) != from)
			return false;
	} while (!atomic_compare_exchange_weak_explicit(&r->state[gfn], &byte, (uint8_t)((byte & ~EMU_STATE_MASK) | to),
	                                                memory_order_acq_rel, memory_order_relaxed));
	if (from == EMU_ZERO)
		summary_add(r, gfn, 1);
	return true;
}

/* The end of gfn's block, or `end` if that comes first. */
static uint64_t in_block(uint64_t gfn, uint64_t end)
{
	uint64_t next = (gfn / EMU_BLOCK_FRAMES + 1) * EMU_BLOCK_FRAMES;

	return next < end ? next : end;
}

static uint64_t bytes8(uint8_t byte)
{
	return byte * (uint64_t)0x0101010101010101;
}
#define STATES8 bytes8(EMU_STATE_MASK)

static uint64_t *word8(const struct emu_region *r, uint64_t gfn)
{
	return (uint64_t *)(void *)(r->state + gfn);
}

/*
 * Take frames from gfn on, as many in a row as are in state `from` and at most `most`, into BUSY; return how many.
 *
 * Eight at a time where they lie in one word: a compare-and-swap over eight bytes is one over each of them, and the
 * hardware orders it with those of single bytes, since both lock the same cache line.  A word whose frames differ, or
 * that somebody changes meanwhile, is left to the single steps.
 */
uint64_t emu_state_claim(struct emu_region *r, uint64_t gfn, uint64_t most, uint8_t from)
{
	return emu_state_claim_used(r, gfn, most, from, EMU_ANY_USAGE);
}

static bool usage_in(uint8_t byte, unsigned usages)
{
	return usages >> emu_byte_usage(byte) & 1;
}

/* Eight frames from one state into BUSY, if all are in it, and of usages in the set: one usage, or any. */
static bool claim8(struct emu_region *r, uint64_t gfn, uint8_t from, unsigned usages)
{
	uint64_t word = __atomic_load_n(word8(r, gfn), __ATOMIC_RELAXED);

	if ((word & STATES8) != bytes8(from) ||
	    (usages != EMU_ANY_USAGE && (word != bytes8((uint8_t)word) || !usage_in((uint8_t)word, usages))))
		return false;
	return __atomic_compare_exchange_n(word8(r, gfn), &word, (word & ~STATES8) | bytes8(EMU_BUSY), false, __ATOMIC_ACQ_REL,
	                                   __ATOMIC_RELAXED);
}

static bool claim1(struct emu_region *r, uint64_t gfn, uint8_t from, unsigned usages)
{
	uint8_t byte = atomic_load_explicit(&r->state[gfn], memory_order_relaxed);

	do {
		if (emu_byte_state(byte) != from || !usage_in(byte, usages))
			return false;
	} while (!atomic_compare_exchange_weak_explicit(&r->state[gfn], &byte, (uint8_t)((byte & ~EMU_STATE_MASK) | EMU_BUSY),
	                                                memory_order_acq_rel, memory_order_relaxed));
	return true;
}

uint64_t emu_state_claim_used(struct emu_region *r, uint64_t gfn, uint64_t most, uint8_t from, unsigned usages)
{
	const uint64_t start = gfn, end = gfn + most;

	assert(emu_state_legal(from, EMU_BUSY, r->service != EMU_SERVICE_OFF));
	while (gfn < end) {
		const uint64_t first = gfn, last = in_block(gfn, end);

		while (gfn < last) {
			if (WORDS && gfn % 8 == 0 && last - gfn >= 8 && claim8(r, gfn, from, usages))
				gfn += 8;
			else if (claim1(r, gfn, from, usages))
				gfn++;
			else
				break;
		}
		if (from == EMU_ZERO && gfn > first)
			summary_add(r, first, (uint32_t)(gfn - first));
		if (gfn < last)
			break;
	}
	return gfn - start;
}

/*
 * The byte of a frame that rests in state `to`, of the usage that it had: only the legal pairs exist (usage.c).  What is
 * discarded was volatile; what is in the store is kept, and so is stable; what its owner gives back isn't volatile any more.
 */
static uint8_t rest(uint8_t usage, uint8_t to)
{
	if (to == EMU_DISCARDED)
		usage = EMU_VOLATILE;
	else if (to == EMU_PRESERVED || to == EMU_LOST || (to == EMU_ZERO && usage != EMU_UNUSED))
		usage = EMU_STABLE;
	return (uint8_t)(usage << EMU_USAGE_SHIFT) | to;
}

/* Nobody changes a BUSY frame's byte but its holder: so there is no exchange here, but a store. */
void emu_state_publish_as(struct emu_region *r, uint64_t gfn, uint8_t to, uint8_t usage)
{
	assert(emu_byte_state(atomic_load_explicit(&r->state[gfn], memory_order_relaxed)) == EMU_BUSY);
	assert(emu_state_legal(EMU_BUSY, to, true));
	if (to == EMU_ZERO)
		summary_add(r, gfn, -1u);
	atomic_store_explicit(&r->state[gfn], rest(usage, to), memory_order_release);
}

void emu_state_publish(struct emu_region *r, uint64_t gfn, uint8_t to)
{
	emu_state_publish_as(r, gfn, to, emu_byte_usage(atomic_load_explicit(&r->state[gfn], memory_order_relaxed)));
}

/* The same for frames [gfn, gfn + count), all of which the caller holds. */
void emu_state_publish_run(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t to)
{
	const uint64_t end = gfn + count;

	assert(emu_state_legal(EMU_BUSY, to, true));
	while (gfn < end) {
		const uint64_t last = in_block(gfn, end);

		if (to == EMU_ZERO)
			summary_add(r, gfn, -(uint32_t)(last - gfn));
		while (gfn < last) {
			const uint8_t byte = atomic_load_explicit(&r->state[gfn], memory_order_relaxed);
			const uint8_t at_rest = rest(emu_byte_usage(byte), to);

			assert(emu_byte_state(byte) == EMU_BUSY);
			if (WORDS && gfn % 8 == 0 && last - gfn >= 8 && __atomic_load_n(word8(r, gfn), __ATOMIC_RELAXED) == bytes8(byte)) {
				__atomic_store_n(word8(r, gfn), bytes8(at_rest), __ATOMIC_RELEASE);
				gfn += 8;
			} else {
				atomic_store_explicit(&r->state[gfn++], at_rest, memory_order_release);
			}
		}
	}
}

long emu_futex(_Atomic uint32_t *word, int op, uint32_t val)
{
	return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, val, NULL, NULL, 0);
}

static struct emu_waitq *waitq(struct emu_region *r, uint64_t gfn)
{
	return &r->waitq[(gfn / EMU_BLOCK_FRAMES) % EMU_WAITQS];
}

/*
 * After publishing frames [gfn, gfn + count): wake who waits for them, and tell rss.c that their pages have changed.  The
 * fence serves both: between the byte and the look for waiters, and between the page and the look at the block's mark.
 */
void emu_state_wake(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	uint64_t last = (gfn + count - 1) / EMU_BLOCK_FRAMES;

	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t block = gfn / EMU_BLOCK_FRAMES; block <= last; block++) {
		struct emu_waitq *q = &r->waitq[block % EMU_WAITQS];

		emu_rss_mark(r, block);
		if (!atomic_load_explicit(&q->waiters, memory_order_relaxed))
			continue;
		atomic_fetch_add_explicit(&q->seq, 1, memory_order_seq_cst);
		emu_futex(&q->seq, FUTEX_WAKE, INT32_MAX);
	}
}

/* Until gfn isn't BUSY, or at least has been something else meanwhile.  Async-signal-safe. */
void emu_state_wait(struct emu_region *r, uint64_t gfn)
{
	struct emu_waitq *q = waitq(r, gfn);
	uint32_t seq;

	emu_stat_add(r, EMU_STAT_busy_wait, 1);
	atomic_fetch_add_explicit(&q->waiters, 1, memory_order_seq_cst);
	atomic_thread_fence(memory_order_seq_cst);
	seq = atomic_load_explicit(&q->seq, memory_order_seq_cst);
	if (emu_state_load(r, gfn) == EMU_BUSY)
		emu_futex(&q->seq, FUTEX_WAIT, seq);
	atomic_fetch_sub_explicit(&q->waiters, 1, memory_order_relaxed);
}

bool emu_state_awaited(struct emu_region *r, uint64_t gfn)
{
	return atomic_load_explicit(&waitq(r, gfn)->waiters, memory_order_relaxed);
}

/* Frames have gone from one state to another: the gauges, and what they were charged for if they no longer hold memory. */
void emu_state_moved(struct emu_region *r, uint8_t from, uint8_t to, int64_t frames)
{
	if (from == to || !frames)
		return;
	if (emu_state_held(from) && !emu_state_held(to))
		emu_gate_uncharge(r, frames);
	/* ZERO's own is what the others leave of the whole, and is worked out when it is read */
	if (from != EMU_ZERO)
		emu_stat_add(r, (enum emu_stat)(EMU_STAT_nr_zero + from), -frames);
	if (to != EMU_ZERO)
		emu_stat_add(r, (enum emu_stat)(EMU_STAT_nr_zero + to), frames);
}

int emu_states_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret)
{
	int err = emu_range_ok(r, gfn, count) ? emu_region_enter(r) : -ERANGE;

	if (err)
		return err;
	for (uint64_t end = gfn + count; gfn < end;) {
		uint64_t next = (gfn / EMU_BLOCK_FRAMES + 1) * EMU_BLOCK_FRAMES;

		if (next > end)
			next = end;
		/* an all-ZERO block's bytes may never have been populated: don't make them resident by looking */
		if (!atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_acquire)) {
			memset(ret, EMU_ZERO, next - gfn);
			ret += next - gfn;
			gfn = next;
			continue;
		}
		for (; gfn < next; gfn++)
			*ret++ = emu_state_load(r, gfn);
	}
	emu_region_leave(r);
	return 0;
}

static unsigned kind(uint8_t byte)
{
	const uint8_t state = emu_byte_state(byte);

	return emu_byte_usage(byte) >= EMU_VOLATILE && (state == EMU_RESIDENT || state == EMU_LAZY) ? EMU_TALLY_VOLATILE : state;
}

static void tally_run(const struct emu_region *r, uint64_t gfn, uint64_t end, uint32_t *ret)
{
	while (gfn < end) {
		const uint64_t last = in_block(gfn, end);

		if (!atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_acquire)) {
			ret[EMU_ZERO] += (uint32_t)(last - gfn);
			gfn = last;
			continue;
		}
		while (gfn < last) {
			const uint8_t byte = emu_byte_load(r, gfn);
			const unsigned n = gfn % 8 == 0 && last - gfn >= 8 && emu_byte_alike8(r, gfn, byte) ? 8 : 1;

			ret[kind(byte)] += n;
			gfn += n;
		}
	}
}

/* Frames [gfn, end), all of one owner, to their cells. */
static void tally(const struct emu_region *r, uint64_t gfn, uint64_t end, uint64_t cell_frames, uint64_t owner, uint32_t *ret)
{
	while (gfn < end) {
		const uint64_t cell = gfn / cell_frames, next = (cell + 1) * cell_frames;
		const uint64_t last = next < end ? next : end;

		tally_run(r, gfn, last, ret + (cell * EMU_NR_OWNERS + owner) * EMU_NR_TALLIES);
		gfn = last;
	}
}

/* How many frames from gfn on have one owner. */
static uint64_t owned_run(const uint8_t *owner, uint64_t gfn, uint64_t end)
{
	const uint64_t start = gfn, eight = bytes8(owner[gfn]);

	while (gfn < end) {
		uint64_t word;

		if (end - gfn >= 8) {
			memcpy(&word, owner + gfn, 8);
			if (word == eight) {
				gfn += 8;
				continue;
			}
		}
		if (owner[gfn] != owner[start])
			break;
		gfn++;
	}
	return gfn - start;
}

/* Frames [gfn, end), whose owners the descriptors tell. Blocks that neither side has touched cost a look at two words. */
static void tally_owned(const struct emu_region *r, const struct emu_memmap *m, uint64_t gfn, uint64_t end,
                        uint64_t cell_frames, uint32_t *ret)
{
	while (gfn < end) {
		const uint64_t last = in_block(gfn, end);
		uint64_t run = last - gfn;

		if (m->t.block[gfn / EMU_BLOCK_FRAMES])
			run = owned_run(m->t.owner, gfn, last);
		tally(r, gfn, gfn + run, cell_frames, m->t.block[gfn / EMU_BLOCK_FRAMES] ? m->t.owner[gfn] : EMU_OWNER_FREE, ret);
		gfn += run;
	}
}

int emu_states_tally(struct emu_region *r, const struct emu_memmap *m, const struct emu_range *ranges, size_t n,
                     uint64_t cell_frames, uint32_t *ret)
{
	uint64_t at = 0;
	int err = emu_ranges_check(r, ranges, n);

	if (!cell_frames || m->t.frames != r->frames)
		return -EINVAL;
	for (size_t i = 0; i < n && !err; i++) {
		if (ranges[i].gfn < at || ranges[i].key >= EMU_NR_OWNERS)
			err = -EINVAL;
		at = ranges[i].gfn + ranges[i].count;
	}
	if (!err)
		err = emu_region_enter(r);
	if (err)
		return err;
	at = 0;
	for (size_t i = 0; i < n; i++) {
		tally_owned(r, m, at, ranges[i].gfn, cell_frames, ret);
		at = ranges[i].gfn + ranges[i].count;
		tally(r, ranges[i].gfn, at, cell_frames, ranges[i].key, ret);
	}
	tally_owned(r, m, at, r->frames, cell_frames, ret);
	emu_region_leave(r);
	return 0;
}
