/* SPDX-License-Identifier: MIT */
/*
 * reclaim.c - every way by which memory leaves the guest.
 *
 *   discard     MADV_DONTNEED   the page is gone when the call returns        -> ZERO
 *   lazy_free   MADV_FREE       the kernel takes it when it needs memory      -> LAZY
 *   lazy_drop   MADV_PAGEOUT    pressure on demand: takes the lazy ones now   LAZY -> ZERO, where it did
 *   poison      MADV_DONTNEED   and every access fails from then on           -> LOST
 *   unpoison                    the only way out of LOST: never a side effect -> ZERO
 *
 * One engine under all: walk the ranges, claim frames into BUSY, gather neighbours into runs and runs into a batch,
 * make one system call for the batch, publish.  A batch holds at most BATCH frames, which bounds how long a fault may
 * find its frame BUSY, and at most 1,024 ranges, which is what process_madvise(2) takes (UIO_MAXIOV).  Frames that
 * hold nothing cost no system call; a block whose summary word is 0 isn't even walked.
 *
 * Races, thought through once for all five:
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
 *  - lazy_drop asks pagemap, under BUSY, what the kernel did: neither present nor swapped means dropped.  mincore
 *    can't tell a swapped page from a dropped one, and a swapped page holds data.
 */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH 1024 /* frames, and so at most as many ranges */

#define IN(s) (1u << EMU_##s)

enum verb { DISCARD, LAZY_FREE, LAZY_DROP, POISON, UNPOISON };

static const struct {
	uint32_t claims; /* states that the verb takes */
	int advice;
	int event;
	enum emu_stat frames, calls;
} verbs[] = {
	[DISCARD] = { IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY), MADV_DONTNEED, EMU_EV_DISCARD,
	              EMU_STAT_discard_frames, EMU_STAT_discard_calls },
	[LAZY_FREE] = { IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY), MADV_FREE, EMU_EV_LAZY_FREE,
	                EMU_STAT_lazyfree_frames, EMU_STAT_lazyfree_calls },
	[LAZY_DROP] = { IN(LAZY), MADV_PAGEOUT, EMU_EV_LAZY_DROP,
	                EMU_STAT_lazydrop_frames, EMU_STAT_lazydrop_calls },
	[POISON] = { IN(ZERO) | IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY), MADV_DONTNEED, EMU_EV_POISON,
	             EMU_STAT_poison_frames, EMU_STAT_discard_calls },
	[UNPOISON] = { IN(LOST), MADV_DONTNEED, 0, EMU_STAT_unpoison_frames, EMU_STAT_discard_calls },
};

struct batch {
	struct emu_region *r;
	enum verb verb;
	int64_t taken;  /* frames that held memory, over all batches */
	size_t runs;
	uint64_t frames;
	struct iovec run[BATCH];
	uint8_t prior[BATCH]; /* by frame, in the runs' order */
};

static long advise_vectored(const struct iovec *iov, size_t n, int advice)
{
	static _Atomic int self = PIDFD_SELF_PROCESS;
	long done = syscall(SYS_process_madvise, atomic_load(&self), iov, n, advice, 0);

	if (done < 0 && errno == EBADF && atomic_load(&self) == PIDFD_SELF_PROCESS) {
		/*
		 * Before 6.14 the name for "myself" is a descriptor of ours.  One for the process; a forked child
		 * never gets here (its caller refuses), so it can't advise its parent.
		 */
		int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
		int expected = PIDFD_SELF_PROCESS;

		if (pidfd < 0)
			return -1;
		if (!atomic_compare_exchange_strong(&self, &expected, pidfd))
			close(pidfd);
		done = syscall(SYS_process_madvise, atomic_load(&self), iov, n, advice, 0);
	}
	return done;
}

/* Whether this kernel lets a process discard many ranges of its own in one call (6.13): found by doing it. */
static int vectored_works;

static void vectored_probe(void)
{
	uint8_t *p = mmap(NULL, 2 * EMU_FRAME_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec iov[2] = { { p, EMU_FRAME_SIZE }, { p + EMU_FRAME_SIZE, EMU_FRAME_SIZE } };

	if (p == MAP_FAILED)
		return;
	p[0] = p[EMU_FRAME_SIZE] = 1;
	vectored_works = advise_vectored(iov, 2, MADV_DONTNEED) == 2 * EMU_FRAME_SIZE &&
	                 !*(volatile uint8_t *)p && !*(volatile uint8_t *)(p + EMU_FRAME_SIZE);
	munmap(p, 2 * EMU_FRAME_SIZE);
}

bool emu_advise_vectored_probe(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, vectored_probe);
	return vectored_works;
}

static int advise(struct batch *b)
{
	const int advice = verbs[b->verb].advice;
	size_t i = 0;

	if (b->runs > 1 && b->r->vectored) {
		uint64_t len = 0, whole = 0;
		long done;

		for (size_t k = 0; k < b->runs; k++)
			len += b->run[k].iov_len;
		done = advise_vectored(b->run, b->runs, advice);
		emu_stat_add(b->r, verbs[b->verb].calls, 1);
		if (done == (long)len)
			return 0;
		/* A part, or none: the bare call finishes from the first unfinished run on, and tells the errno. */
		while (done > 0 && i < b->runs && whole + b->run[i].iov_len <= (uint64_t)done)
			whole += b->run[i++].iov_len;
	}
	for (; i < b->runs; i++) {
		emu_stat_add(b->r, verbs[b->verb].calls, 1);
		while (madvise(b->run[i].iov_base, b->run[i].iov_len, advice))
			if (errno != EAGAIN && errno != EINTR)
				return -errno;
	}
	return 0;
}

/* Frames held BUSY with no page behind them: from now on an access fails. What LOST rests on besides the byte. */
int emu_lose(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	uint64_t start = (uintptr_t)emu_frame(r, gfn), len = count << EMU_FRAME_SHIFT, done;
	unsigned eagain = 0;

	if (r->service == EMU_SERVICE_INLINE) /* missing raises SIGBUS, and the handler reads LOST */
		return 0;
	if (r->service == EMU_SERVICE_THREAD && r->have_poison)
		return emu_uffd_fill(r->uffd, EMU_FILL_POISON, start, NULL, len, true, &done, &eagain);
	/* before 6.6, or without userfaultfd: an access dies by SIGSEGV instead */
	if (mprotect((void *)(uintptr_t)start, len, PROT_NONE))
		return -errno;
	if (r->uffd >= 0)
		emu_uffd_wake(r->uffd, start, len);
	return 0;
}

static int find(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	if (r->service == EMU_SERVICE_INLINE || (r->service == EMU_SERVICE_THREAD && r->have_poison))
		return 0; /* the MADV_DONTNEED has dropped the marker */
	return mprotect(emu_frame(r, gfn), count << EMU_FRAME_SHIFT, PROT_READ | PROT_WRITE) ? -errno : 0;
}

/* Which of a run's frames the kernel has dropped: out[i] = 1. */
static void dropped(struct emu_region *r, const struct iovec *run, uint8_t *out)
{
	uint64_t page = (uintptr_t)run->iov_base >> EMU_FRAME_SHIFT, n = run->iov_len >> EMU_FRAME_SHIFT;
	uint64_t entry[BATCH];

	if (r->pagemap_fd >= 0 && pread(r->pagemap_fd, entry, n * 8, (off_t)(page * 8)) == (ssize_t)(n * 8)) {
		for (uint64_t i = 0; i < n; i++)
			out[i] = !(entry[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAP));
		return;
	}
	memset(out, 0, n); /* without /proc nothing can be known: the frames stay LAZY, and a fault will tell */
}

static int flush(struct batch *b)
{
	struct emu_region *r = b->r;
	int64_t from[EMU_NR_STATES] = { 0 }, gone = 0;
	uint64_t k = 0;
	int err;

	if (!b->runs)
		return 0;
	err = advise(b);
	for (size_t i = 0; i < b->runs; i++) {
		uint64_t gfn = ((uintptr_t)b->run[i].iov_base - (uintptr_t)r->base) >> EMU_FRAME_SHIFT;
		uint64_t n = b->run[i].iov_len >> EMU_FRAME_SHIFT;
		uint8_t drop[BATCH];

		if (!err && b->verb == POISON)
			err = emu_lose(r, gfn, n);
		if (!err && b->verb == UNPOISON)
			err = find(r, gfn, n);
		if (!err && b->verb == LAZY_DROP)
			dropped(r, &b->run[i], drop);
		for (uint64_t f = 0; f < n; f++, k++) {
			uint8_t to = b->prior[k];

			if (err) { /* what the kernel refused is as it was; frames of the batch that it took fault back in */
				emu_state_publish(r, gfn + f, to);
				continue;
			}
			from[to]++;
			if (b->verb == DISCARD || b->verb == UNPOISON)
				to = EMU_ZERO;
			else if (b->verb == LAZY_FREE)
				to = EMU_LAZY;
			else if (b->verb == POISON)
				to = EMU_LOST;
			else if (drop[f])
				to = EMU_ZERO, gone++;
			emu_state_publish(r, gfn + f, to);
		}
		emu_state_wake(r, gfn, n);
	}
	b->runs = 0;
	b->frames = 0;
	if (err)
		return err;

	int64_t frames = from[EMU_RESIDENT] + from[EMU_LAZY];

	switch (b->verb) {
	case DISCARD:
		for (int s = 0; s < EMU_NR_STATES; s++)
			emu_state_moved(r, (uint8_t)s, EMU_ZERO, from[s]);
		emu_stat_add(r, EMU_STAT_discard_zeromap, from[EMU_ZEROMAP]);
		break;
	case LAZY_FREE:
		for (int s = 0; s < EMU_NR_STATES; s++)
			emu_state_moved(r, (uint8_t)s, EMU_LAZY, from[s]);
		frames += from[EMU_ZEROMAP];
		break;
	case LAZY_DROP:
		emu_state_moved(r, EMU_LAZY, EMU_ZERO, gone);
		frames = gone;
		break;
	case POISON:
		for (int s = 0; s < EMU_NR_STATES; s++)
			emu_state_moved(r, (uint8_t)s, EMU_LOST, from[s]);
		frames += from[EMU_ZERO] + from[EMU_ZEROMAP];
		break;
	case UNPOISON:
		emu_state_moved(r, EMU_LOST, EMU_ZERO, from[EMU_LOST]);
		frames = from[EMU_LOST];
		break;
	}
	emu_stat_add(r, verbs[b->verb].frames, frames);
	b->taken += frames;
	return 0;
}

static int gather(struct batch *b, uint64_t gfn, uint64_t end)
{
	struct emu_region *r = b->r;
	const uint32_t claims = verbs[b->verb].claims;

	while (gfn < end) {
		uint8_t state;
		uint8_t *at = emu_frame(r, gfn);
		struct iovec *last = b->runs ? &b->run[b->runs - 1] : NULL;
		int err;

		if (gfn % EMU_BLOCK_FRAMES == 0 && !(claims & IN(ZERO)) &&
		    !atomic_load_explicit(&r->summary[gfn / EMU_BLOCK_FRAMES], memory_order_acquire)) {
			gfn += EMU_BLOCK_FRAMES;
			continue;
		}
		state = emu_state_load(r, gfn);
		if (state == EMU_BUSY) {
			err = flush(b);
			if (err)
				return err;
			emu_state_wait(r, gfn);
			continue;
		}
		if (!(claims & (1u << state))) {
			gfn++;
			continue;
		}
		if (b->frames == BATCH) {
			err = flush(b);
			if (err)
				return err;
			continue; /* time has passed: read the byte again */
		}
		if (!emu_state_try(r, gfn, state, EMU_BUSY))
			continue;
		b->prior[b->frames++] = state;
		if (last && (uint8_t *)last->iov_base + last->iov_len == at)
			last->iov_len += EMU_FRAME_SIZE;
		else
			b->run[b->runs++] = (struct iovec){ at, EMU_FRAME_SIZE };
		gfn++;
	}
	return 0;
}

static int64_t reclaim(struct emu_region *r, const struct emu_range *ranges, size_t n, enum verb verb)
{
	struct batch b; /* 26 KiB of stack, and only the head of it is set */
	int err = emu_ranges_check(r, ranges, n);

	b.r = r;
	b.verb = verb;
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
	return err ? err : b.taken;
}

int64_t emu_discard(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, DISCARD);
}

int64_t emu_lazy_free(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, LAZY_FREE);
}

int64_t emu_lazy_drop(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, LAZY_DROP);
}

int64_t emu_poison(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, POISON);
}

int64_t emu_unpoison(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	return reclaim(r, ranges, n, UNPOISON);
}
