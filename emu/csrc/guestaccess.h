/* SPDX-License-Identifier: MIT */
/*
 * guestaccess.h - how guest memory is touched, for the only two files whose code does: guestcopy.c (bytes to and from a
 * buffer) and guestwalk.c (vCPU loops over frames).
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
 * Such a note is a promise: if the access jumps out (its other side was lost), the promise is kept by touching that frame,
 * or the books would call resident what has no page.
 *
 * After the access the byte is read once more: if a discard came between note and access, the frame may be present and
 * marked ZERO, so the access is made again (a touch, a fill, a read or a copy of the same bytes can be).  With that the
 * books are exact under any interleaving with reclaim.
 */
#ifndef EMU_GUESTACCESS_H
#define EMU_GUESTACCESS_H

#include <string.h>

#include "core.h"

#define barrier() atomic_signal_fence(memory_order_seq_cst)

/* Before an access: returns 0, 1 if the books were changed by it, or an error if the frame is known to be lost. */
static inline int note(struct emu_region *r, uint64_t gfn, bool write)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);
		uint8_t to;

		switch (state) {
		case EMU_LOST:
			emu_stat_add(r, EMU_STAT_pgfault_lost, 1);
			return -EHWPOISON;
		case EMU_DISCARDED:
			emu_stat_add(r, EMU_STAT_pgfault_discarded, 1);
			return -ENODATA;
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
static inline void mark(struct emu_region *r, uint64_t gfn)
{
	atomic_thread_fence(memory_order_seq_cst);
	emu_rss_mark(r, gfn / EMU_BLOCK_FRAMES);
}

/* After an access: true if the books still tell what the access did. */
static inline bool noted(struct emu_region *r, uint64_t gfn, bool write)
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

EMU_GUEST_BYTES static inline void copy_bytes(uint8_t *to, const uint8_t *from, size_t n)
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

EMU_GUEST_BYTES static inline void touch_byte(uint8_t *frame, bool write)
{
	if (write)
		__atomic_fetch_or(frame, 0, __ATOMIC_RELAXED);
	else
		(void)*(const volatile uint8_t *)frame;
}

/*
 * note() under a guard, which learns of the promise. The same returns; an error is in the guard, too. A write is one even
 * if the books said RESIDENT before: a discard and a reader may come between, and the first bytes be stored by then.
 */
static inline int promise(struct emu_guard *guard, struct emu_region *r, uint64_t gfn, bool write)
{
	int changed;

	emu_access_note(r, gfn, 1, write);
	changed = note(r, gfn, write);

	if (changed < 0) {
		guard->err = changed;
		guard->gfn = gfn;
	} else if (changed || write) {
		guard->promised_write = write;
		guard->promised = gfn;
	}
	barrier();
	return changed;
}

/* After the access, with what promise() returned for that frame. */
static inline void promise_kept(struct emu_guard *guard, struct emu_region *r, uint64_t gfn, int changed)
{
	barrier();
	guard->promised = EMU_NO_PROMISE;
	if (changed)
		mark(r, gfn);
}

/* What an access to a frame in that state, which is missing, is timed as. */
static inline enum emu_latency latency_of(uint8_t state, bool write)
{
	if (state == EMU_ASIDE)
		return EMU_LAT_ASIDE_RETURN;
	if (state == EMU_PRESERVED)
		return EMU_LAT_SWAP_IN;
	return write ? EMU_LAT_FAULT_WRITE : EMU_LAT_FAULT_READ;
}

/*
 * One access to a frame, noted before and after; returns 0, or an error with the frame in guard.  `was`: the frame's state a
 * moment ago; if it was missing, one byte is touched by itself, and some of the times timed, so that what a fault
 * costs is known and the rest of the access isn't part of it.
 */
static inline int touch_frame(struct emu_guard *guard, struct emu_region *r, uint64_t gfn, bool write, uint8_t was)
{
	const bool timed = emu_state_missing(was) && emu_thread.faults++ % EMU_LATENCY_EVERY == 0;
	uint64_t t0 = timed ? emu_now_ns() : 0;
	int changed;

	do {
		changed = promise(guard, r, gfn, write);
		if (changed < 0)
			return changed;
		touch_byte(emu_frame(r, gfn), write);
		promise_kept(guard, r, gfn, changed);
	} while (!noted(r, gfn, write));
	if (timed)
		emu_latency_add(r, latency_of(was, write), emu_now_ns() - t0);
	return 0;
}

/*
 * After a jump out: do what was promised, under the same guard; what stopped the call stays in it.  With a note of its own
 * and a look afterwards, since a discard and a reader may have come between: then the frame is ZEROMAP again, and a bare
 * store would make it resident unseen.
 */
static inline void keep_promise(struct emu_guard *guard)
{
	const uint64_t gfn = guard->promised;
	const bool write = guard->promised_write;
	const int err = guard->err;
	const uint64_t bad = guard->gfn;

	/* nothing was done to a frame that couldn't be served itself: trying again would only wait again (gate.c) */
	if (gfn == EMU_NO_PROMISE || (gfn == bad && !guard->elsewhere))
		return;
	guard->promised = EMU_NO_PROMISE;
	if (!sigsetjmp(guard->env, EMU_SAVEMASK)) {
		barrier();
		if (!touch_frame(guard, guard->region, gfn, write, EMU_RESIDENT))
			mark(guard->region, gfn); /* the promise itself may have been for a page that came without a fault */
		barrier();
	}
	guard->err = err;
	guard->gfn = bad;
}

#endif
