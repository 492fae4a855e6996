/* SPDX-License-Identifier: MIT */
/*
 * move.c - UFFDIO_MOVE between the guest and the side region, and the pages that the kernel moves without saying so.
 *
 * Since Linux 6.18 one step of the ioctl moves a batch of pages (mm/userfaultfd.c, move_pages()).  A step that finds its
 * first entry changed between the look at it and the lock is tried again: an accessed or dirty bit was set by a vCPU or
 * cleared by page aging (kswapd, page_idle, DAMON, clear_refs), or the page migrated, or a huge page was being split.
 * The failed step leaves -EAGAIN in `err`, and a later step that succeeds doesn't clear it: what that one moves isn't added
 * to `moved`, the loop goes round at the same address, finds the page that it has just put there, and returns EEXIST.
 * (6.18.44; tests/kernel_move.c shows it with bare ioctls on 4 KiB pages.)
 *
 * A caller who believes it has lost those pages: the guest's place is empty, and the books say that it isn't.  So after
 * EEXIST we look: a page that is gone from the source and there at the target was moved.  Nothing else makes that of a frame
 * that we hold BUSY and whose target place we know to be empty: the guest's faults wait for the frame, and the side region
 * is touched by nobody.  A place with a stale copy isn't empty: its mark says so.
 *
 * The look is /proc/self/pagemap's, which tells a hole from a page on its way to swap or to another node; mincore(2)
 * doesn't.  Without pagemap (no /proc, or a process that isn't dumpable) there is no move: emu/ram.py then opens the uffd
 * for the other way out.
 *
 * pagemap doesn't tell a marker (service.c, refuse) from a swapped page.  The kernel moves nothing over a marker, so where
 * there may be one, only a present page has arrived.
 */
#include "core.h"

#define LOOK 64

/* Of n frames from gfn on: how many, from the first on, have left `src` and are at `dst`. */
static uint64_t arrived(struct emu_region *r, uint64_t gfn, uint64_t n, bool back)
{
	uint8_t *const src = back ? emu_side(r, gfn) : emu_frame(r, gfn), *const dst = back ? emu_frame(r, gfn) : emu_side(r, gfn);
	const uint8_t least = back && r->service == EMU_SERVICE_THREAD ? EMU_THERE : EMU_THERE_SWAP;
	uint8_t left[LOOK], come[LOOK];

	for (uint64_t i = 0; i < n; i++) {
		if (i % LOOK == 0) {
			const uint64_t part = n - i < LOOK ? n - i : LOOK;

			emu_pages_there(r, src + (i << EMU_FRAME_SHIFT), part, left);
			emu_pages_there(r, dst + (i << EMU_FRAME_SHIFT), part, come);
		}
		if (left[i % LOOK] || come[i % LOOK] < least || (!back && atomic_load(&r->aside->stale[gfn + i])))
			return i;
	}
	return n;
}

/*
 * Frames [gfn, gfn + n), BUSY and ours, out of the guest, or back into it.  Returns 0, or the error of frame gfn + *done;
 * *done frames before it were moved.  Who sleeps on them is the caller's to wake.  Async-signal-safe.
 */
int emu_move(struct emu_region *r, uint64_t gfn, uint64_t n, bool back, uint64_t *done)
{
	unsigned eagain = 0;
	int err;

	*done = 0;
	do {
		const uint64_t at = gfn + *done;
		uint8_t *const frame = emu_frame(r, at), *const side = emu_side(r, at);
		uint64_t bytes, unsaid;

		err = emu_uffd_fill(r->uffd, EMU_FILL_MOVE, (uintptr_t)(back ? frame : side), back ? side : frame,
		                    (n - *done) << EMU_FRAME_SHIFT, false, &bytes, &eagain);
		*done += bytes >> EMU_FRAME_SHIFT;
		if (err != -EEXIST)
			break;
		unsaid = arrived(r, gfn + *done, n - *done, back);
		if (!unsaid)
			break;
		emu_stat_add(r, EMU_STAT_uffd_miscounted, (int64_t)unsaid);
		*done += unsaid;
		err = 0;
	} while (*done < n);
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	return err;
}
