/* SPDX-License-Identifier: MIT */
/*
 * fault.c - the one resolver: from a frame's state to the page that a fault gets.
 *
 * Two callers, one body: sigbus.c calls it in the thread that faulted, service.c in a thread of ours.  It looks at
 * the frame's byte, and
 *
 *   ZERO      claims the frame and installs: the shared zero page for a read (no memory), a page of its own for a
 *             write at once (zero page first and copy-on-write next would be two faults)
 *   LAZY      the same: a fault there says that the kernel has dropped the page
 *   BUSY      waits, then looks again
 *   RESIDENT, nothing: the fault was raised before another thread's install, and the access will go through.  The
 *   ZEROMAP   caller counts how often that happens to one address in a row
 *   ASIDE     brings the page back from the side region (aside.c)
 *   PRESERVED brings it back from the store, and perhaps its neighbours (swapin.c)
 *   LOST,     refuses: the access must fail, never see zeros
 *   DISCARDED
 *
 * Race: two vCPUs fault on one frame.  Both signals (or both messages) are real; one claim wins, the loser waits on
 * BUSY and then finds the frame present.  Race: discard against a fault.  A discard holds BUSY over its madvise, so
 * the fault sees either the old page still there (it never faulted), or waits and then fills a ZERO frame; no install
 * can come between the madvise and the byte, which would leave a resident page marked ZERO.
 *
 * Async-signal-safe from end to end: ioctl, futex, atomics.
 */
#include "core.h"

#include <sys/mman.h>

/*
 * Frames [gfn, gfn + count) are BUSY, taken by us from `prior`.  Install src (NULL: zeros) and publish them all; the
 * return is 0, or the error of frame gfn + *done, from which on all went back to `prior`.
 *
 * A page that is there already stays as it is: for ZERO that means somebody touched the memory behind our back, for
 * LAZY that the kernel hadn't dropped it after all.  A fault is content with it; with src it ends the run as EEXIST,
 * since that frame doesn't hold src.
 *
 * Sleepers (thread service) aren't woken here: the caller does that once the books are done.  If the ioctl woke
 * them, a vCPU could return to its caller and read counters that don't have its fault yet.
 */
int emu_fault_fill(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t prior, bool write, const void *src,
                   uint64_t *done)
{
	const enum emu_fill how = write ? EMU_FILL_COPY : EMU_FILL_ZEROPAGE;
	const uint8_t filled = write ? EMU_RESIDENT : EMU_ZEROMAP;
	const uint8_t *from = src ? src : emu_zero_source();
	const uint64_t start = gfn, end = gfn + count;
	unsigned eagain = 0;
	int err = 0;

	while (gfn < end) {
		uint64_t bytes, n;

		err = emu_uffd_fill(r->uffd, how, (uintptr_t)emu_frame(r, gfn), from, (end - gfn) << EMU_FRAME_SHIFT,
		                    false, &bytes, &eagain);
		n = bytes >> EMU_FRAME_SHIFT;
		if (n)
			emu_state_publish_run(r, gfn, n, filled);
		emu_state_moved(r, prior, filled, (int64_t)n);
		if (prior == EMU_LAZY && n)
			emu_stat_add(r, EMU_STAT_lazydrop_frames, (int64_t)n);
		emu_stat_add(r, src ? EMU_STAT_install_frames : write ? EMU_STAT_copy_frames : EMU_STAT_zeropage_frames,
		             (int64_t)n);
		gfn += n;
		if (src)
			from += bytes;
		if (err == -EEXIST) {
			uint8_t there = prior == EMU_LAZY ? EMU_LAZY : EMU_RESIDENT;

			emu_stat_add(r, EMU_STAT_uffd_eexist, 1);
			emu_state_publish(r, gfn, there);
			emu_state_moved(r, prior, there, 1);
			if (!src) {
				gfn++;
				err = 0;
				continue;
			}
			emu_state_publish_run(r, gfn + 1, end - gfn - 1, prior);
			break;
		}
		if (err) {
			emu_state_publish_run(r, gfn, end - gfn, prior);
			break;
		}
	}
	*done = gfn - start;
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	emu_state_wake(r, start, count);
	return err;
}

/*
 * A fault came again and again on a frame that our books call present.  Is its page there?  If it isn't, it was taken
 * behind our back (a stray madvise on the mapping), and what it held is gone: the frame becomes LOST, since zeros would
 * hide that.  Asked under BUSY, so that no discard of ours can be taken for it.  Returns 0 if all is well.
 *
 * signalled: where the service is a thread, only a marker raises signals, and pagemap shows a marker as it does a swapped
 * page; the kernel would have brought that one back.
 */
int emu_fault_vanished(struct emu_region *r, uint64_t gfn, bool signalled)
{
	const uint8_t least = signalled && r->service == EMU_SERVICE_THREAD ? EMU_THERE : EMU_THERE_SWAP;
	uint8_t state = emu_state_load(r, gfn), there;
	bool absent;

	if ((state != EMU_RESIDENT && state != EMU_ZEROMAP) || !emu_state_try(r, gfn, state, EMU_BUSY))
		return 0;
	emu_pages_there(r, emu_frame(r, gfn), 1, &there);
	absent = there < least;
	if (absent) {
		emu_lose(r, gfn, 1);
		emu_stat_add(r, EMU_STAT_pgfault_failed, 1);
		emu_ring_push(r, EMU_EV_LOST_FAULT, gfn, 1, 0);
	}
	emu_state_publish(r, gfn, absent ? EMU_LOST : state);
	emu_state_moved(r, state, absent ? EMU_LOST : state, 1);
	emu_state_wake(r, gfn, 1);
	return absent ? -EFAULT : 0;
}

/* Claim ZERO frames around gfn, which is ours already, inside its aligned window. */
static void claim_around(struct emu_region *r, uint64_t gfn, uint64_t *first, uint64_t *end)
{
	uint64_t lo = gfn & ~(uint64_t)(r->fault_around - 1);
	uint64_t hi = lo + r->fault_around;

	if (hi > r->frames)
		hi = r->frames;
	*first = gfn;
	*end = gfn + 1;
	/* what the neighbours cost is charged if there is room, and nobody waits for it */
	while (*first > lo && emu_state_load(r, *first - 1) == EMU_ZERO && !emu_gate_charge(r, 1, EMU_GATE_TRY)) {
		if (!emu_state_try(r, *first - 1, EMU_ZERO, EMU_BUSY)) {
			emu_gate_uncharge(r, 1);
			break;
		}
		--*first;
	}
	if (!emu_gate_charge(r, (int64_t)(hi - *end), EMU_GATE_TRY)) {
		const uint64_t claimed = emu_state_claim(r, *end, hi - *end, EMU_ZERO);

		emu_gate_uncharge(r, (int64_t)(hi - *end - claimed));
		*end += claimed;
	}
}

/*
 * Returns 0 when the access may be tried again, else -errno: it can't succeed. how: whether a charge may wait at the gate
 * (EMU_GATE_WAIT), or -EAGAIN is wanted then (EMU_GATE_TRY).
 */
int emu_fault_resolve(struct emu_region *r, uint64_t gfn, bool write, int how)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);
		uint64_t first = gfn, end = gfn + 1, done;
		bool charged;
		int err;

		switch (state) {
		case EMU_BUSY:
			emu_state_wait(r, gfn);
			continue;
		case EMU_RESIDENT:
		case EMU_ZEROMAP:
			emu_stat_add(r, EMU_STAT_pgfault_spurious, 1);
			return 0;
		case EMU_LOST:
			emu_stat_add(r, EMU_STAT_pgfault_lost, 1);
			emu_ring_push(r, EMU_EV_LOST_FAULT, gfn, 1, write);
			return -EHWPOISON;
		case EMU_DISCARDED:
			emu_stat_add(r, EMU_STAT_pgfault_discarded, 1);
			return -ENODATA;
		default:
			break;
		}
		/* before the frame is claimed: who waits for memory holds nothing that who frees some may wait for */
		charged = state == EMU_ZERO || state == EMU_PRESERVED;
		if (charged && (err = emu_gate_charge(r, 1, how))) {
			if (how == EMU_GATE_TRY)
				return -EAGAIN;
			emu_stat_add(r, EMU_STAT_pgfault_failed, 1);
			return err;
		}
		if (!emu_state_try(r, gfn, state, EMU_BUSY)) {
			emu_gate_uncharge(r, charged);
			continue;
		}
		if (state == EMU_ASIDE || state == EMU_PRESERVED) {
			err = state == EMU_ASIDE ? emu_aside_return(r, gfn) : emu_swap_in(r, gfn);
			if (err < 0) {
				emu_gate_uncharge(r, charged);
				emu_stat_add(r, EMU_STAT_pgfault_failed, 1);
				return err;
			}
			if (emu_ring_traces_faults(r))
				emu_ring_push(r, EMU_EV_FAULT, gfn, 1, write);
			return 0;
		}
		if (state == EMU_LAZY)
			emu_stat_add(r, EMU_STAT_pgfault_lazy, 1);
		else if (r->fault_around > 1)
			claim_around(r, gfn, &first, &end);
		err = emu_fault_fill(r, first, end - first, state, write, NULL, &done);
		if (state == EMU_ZERO)
			emu_gate_uncharge(r, (int64_t)(end - first - done));
		if (err && first + done <= gfn) { /* else the error is a neighbour's, which can fault for itself */
			emu_stat_add(r, EMU_STAT_pgfault_failed, 1);
			return err;
		}
		emu_stat_add(r, write ? EMU_STAT_pgfault_write : EMU_STAT_pgfault_read, 1);
		if (emu_ring_traces_faults(r))
			emu_ring_push(r, EMU_EV_FAULT, gfn, done, write);
		return 0;
	}
}

/*
 * With the thread service, a frame without content raised a signal: a marker is left from when its page couldn't be had
 * (service.c, refuse), or from a page that was given back since.  Without it the access is the service's again.
 */
void emu_fault_unmark(struct emu_region *r, uint64_t gfn)
{
	const uint8_t state = emu_state_load(r, gfn);

	if ((state != EMU_ZERO && state != EMU_LAZY) || !emu_state_try(r, gfn, state, EMU_BUSY))
		return;
	madvise(emu_frame(r, gfn), EMU_FRAME_SIZE, MADV_DONTNEED);
	emu_find(r, gfn, 1);
	emu_state_publish(r, gfn, state);
	emu_state_wake(r, gfn, 1);
}

/*
 * What a DISCARDED frame held isn't missed: it is about to be wholly overwritten, or its guest has been told (usage.c).  It
 * becomes ZERO, and of that usage; false if it isn't DISCARDED, or can't.  While it is BUSY nobody knows: the service may be
 * putting its marker back, for a fault that it heard of late.
 */
bool emu_fault_forget(struct emu_region *r, uint64_t gfn, uint8_t usage)
{
	int err = 0;

	for (;;) {
		const uint8_t state = emu_state_load(r, gfn);

		if (state == EMU_BUSY)
			emu_state_wait(r, gfn);
		else if (state != EMU_DISCARDED)
			return false;
		else if (emu_state_try(r, gfn, EMU_DISCARDED, EMU_BUSY))
			break;
	}
	if (r->service != EMU_SERVICE_INLINE) /* there is a marker */
		err = madvise(emu_frame(r, gfn), EMU_FRAME_SIZE, MADV_DONTNEED) || emu_find(r, gfn, 1);
	emu_state_publish_as(r, gfn, err ? EMU_DISCARDED : EMU_ZERO, usage);
	emu_state_moved(r, EMU_DISCARDED, err ? EMU_DISCARDED : EMU_ZERO, 1);
	emu_state_wake(r, gfn, 1);
	return !err;
}

/*
 * Frames from gfn on, as many in a row as are ZERO, get the pages at src without a fault.  Returns how many now hold
 * src (0: the first one isn't missing, write it), or -errno if there were none for a reason.
 */
int64_t emu_fault_install(struct emu_region *r, uint64_t gfn, uint64_t count, const void *src)
{
	const uint64_t most = count < EMU_BLOCK_FRAMES ? count : EMU_BLOCK_FRAMES;
	uint64_t want = 0, n, done;
	int err;

	if (r->uffd < 0)
		return 0;
	if (!atomic_load_explicit(&r->gate, memory_order_acquire)) {
		want = most;
	} else {
		while (want < most && emu_state_load(r, gfn + want) == EMU_ZERO)
			want++;
		/* all of them if there is room; else one by one, waiting */
		if (want && emu_gate_charge(r, (int64_t)want, EMU_GATE_TRY)) {
			want = 1;
			err = emu_gate_charge(r, 1, EMU_GATE_WAIT);
			if (err)
				return err;
		}
	}
	n = want ? emu_state_claim(r, gfn, want, EMU_ZERO) : 0;
	emu_gate_uncharge(r, (int64_t)(want - n));
	if (!n)
		return 0;
	err = emu_fault_fill(r, gfn, n, EMU_ZERO, true, src, &done);
	/* EEXIST: that one has a page, if not ours, and is RESIDENT */
	emu_gate_uncharge(r, (int64_t)(n - done) - (err == -EEXIST));
	if (r->service == EMU_SERVICE_THREAD)
		emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, gfn), n << EMU_FRAME_SHIFT);
	return done || err == -EEXIST ? (int64_t)done : err;
}
