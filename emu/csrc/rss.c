/* SPDX-License-Identifier: MIT */
/*
 * rss.c - what the kernel says is resident of a region, at a price that a tick can pay.
 *
 * No kernel interface tells the RSS of a mapping without walking its page tables: smaps takes some 25 ns a page,
 * PAGEMAP_SCAN 5 (48 and 11 ms at 8 GiB, measured on 6.18).  So the kernel's answer is kept by 2 MiB block, and a look
 * asks again
 *
 *   - for the blocks of which a frame changed its state since the last look,
 *   - and for as many others, in rotation, as hold emu_rss_rotate present pages: what happens behind our back (a stray
 *     madvise, a raw write, swap) shows after a round, and in a guest of up to 512 MiB at once.
 *
 * So the figure is the kernel's, never that of our books; what may be old is when it was given.  `whole` says that all
 * of it is of now: the rotation came round, or everything was to be asked.  Lazily freed pages, which the kernel drops
 * without an event, aren't for this file: where there are any, smaps is read, which tells them, too (emu/ram.py).
 *
 * Race: a page that changes during a look.  Whoever changes it marks its block afterwards, with a full barrier between
 * page and mark; the look clears the mark, with a full barrier between mark and question.  As in Dekker's algorithm,
 * either the answer contains the change, or the mark is set again and the next look asks.  An access that changes a page
 * without a fault (guestaccess.h) marks after it, too.
 */
#define _GNU_SOURCE
#include "core.h"

#include <sys/ioctl.h>

uint64_t emu_rss_rotate = 131072; /* resident pages of a look; a test switches the rotation off */

/*
 * Blocks [first, end) are asked about anew, up to about `most` present pages of them; returns the end of what was.
 * *asked grows by those pages: shared zero pages are walked as others are, and so count against the budget.
 */
static int64_t ask(struct emu_region *r, uint64_t first, uint64_t end, uint64_t most, int64_t *asked)
{
	enum { VEC = 256 };
	struct page_region vec[VEC];
	const uint64_t base = (uintptr_t)r->base, block_bytes = (uint64_t)EMU_BLOCK_FRAMES << EMU_FRAME_SHIFT;
	const uint64_t limit = base + (r->frames << EMU_FRAME_SHIFT);
	struct pm_scan_arg arg = {
		.size = sizeof(arg), .start = base + first * block_bytes, .end = base + end * block_bytes,
		.vec = (uintptr_t)vec, .vec_len = VEC, .category_mask = PAGE_IS_PRESENT,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
	};
	uint64_t fresh = first, seen = 0; /* blocks before `fresh` have been zeroed; present pages */

	if (arg.end > limit)
		arg.end = limit;
	while (arg.start < arg.end && seen < most) {
		uint64_t walked;
		int n;

		arg.max_pages = most == UINT64_MAX ? 0 : most - seen;
		n = ioctl(r->pagemap_fd, PAGEMAP_SCAN, &arg);

		if (n < 0)
			return -errno;
		walked = (arg.walk_end - base + block_bytes - 1) / block_bytes;
		for (; fresh < walked; fresh++) {
			r->looked_rss -= r->block_rss[fresh];
			if (r->block_rss[fresh])
				r->block_rss[fresh] = 0;
		}
		for (int i = 0; i < n; i++) {
			uint64_t at = (vec[i].start - base) >> EMU_FRAME_SHIFT, last = (vec[i].end - base) >> EMU_FRAME_SHIFT;

			seen += last - at;
			if (vec[i].categories & PAGE_IS_PFNZERO)
				continue;
			r->looked_rss += (int64_t)(last - at);
			while (at < last) {
				uint64_t block = at / EMU_BLOCK_FRAMES, next = (block + 1) * EMU_BLOCK_FRAMES;

				if (next > last)
					next = last;
				r->block_rss[block] = (uint16_t)(r->block_rss[block] + (next - at));
				at = next;
			}
		}
		if (arg.walk_end <= arg.start)
			break;
		arg.start = arg.walk_end;
		if (seen >= most && (arg.start - base) % block_bytes) { /* to the end of the block that was begun */
			arg.end = base + walked * block_bytes < limit ? base + walked * block_bytes : limit;
			most = UINT64_MAX;
		}
	}
	*asked += (int64_t)seen;
	return (int64_t)fresh;
}

/* The first marked block from `block` on, or `blocks`. Eight at a time: the table is padded to whole pages. */
static uint64_t next_mark(const struct emu_region *r, uint64_t block, uint64_t blocks)
{
	while (block < blocks) {
		if (block % 8 == 0 &&
		    !__atomic_load_n((const uint64_t *)(const void *)(r->changed + block), __ATOMIC_RELAXED)) {
			block += 8;
			continue;
		}
		if (atomic_load_explicit(&r->changed[block], memory_order_relaxed))
			return block;
		block++;
	}
	return blocks;
}

/* The blocks that are marked, neighbours together: a gap of one costs less than another system call. */
static int64_t ask_changed(struct emu_region *r, uint64_t blocks, int64_t *asked)
{
	for (uint64_t first = next_mark(r, 0, blocks), end; first < blocks; first = next_mark(r, end, blocks)) {
		int64_t err;

		for (end = first; end < blocks; end++) {
			if (!atomic_load_explicit(&r->changed[end], memory_order_relaxed) &&
			    (end + 1 == blocks || !atomic_load_explicit(&r->changed[end + 1], memory_order_relaxed)))
				break;
			/* a full barrier: the kernel must be asked after the mark is gone */
			atomic_exchange(&r->changed[end], 0);
		}
		err = ask(r, first, end, UINT64_MAX, asked);
		if (err < 0) {
			for (uint64_t block = first; block < end; block++)
				emu_rss_mark(r, block); /* not answered: the next look asks again */
			return err;
		}
	}
	return 0;
}

static int64_t look(struct emu_region *r, bool everything, struct emu_look *ret)
{
	const uint64_t blocks = (r->frames + EMU_BLOCK_FRAMES - 1) / EMU_BLOCK_FRAMES;
	const uint64_t start = r->look_cursor < blocks ? r->look_cursor : 0;
	int64_t rotated = 0, end;

	*ret = (struct emu_look){ 0 };
	if (everything) {
		end = ask(r, 0, blocks, UINT64_MAX, &ret->asked);
		ret->whole = 1;
	} else {
		end = ask_changed(r, blocks, &ret->asked);
		if (end >= 0 && emu_rss_rotate)
			end = ask(r, start, blocks, emu_rss_rotate, &rotated);
		if (end == (int64_t)blocks && rotated < (int64_t)emu_rss_rotate && start) { /* round the end */
			end = ask(r, 0, start, emu_rss_rotate - (uint64_t)rotated, &rotated);
			ret->whole = end == (int64_t)start;
		} else {
			ret->whole = !start && end == (int64_t)blocks;
		}
		if (end >= 0)
			r->look_cursor = ret->whole ? start : (uint64_t)end % blocks;
		ret->asked += rotated;
	}
	ret->rss = r->looked_rss;
	return end < 0 ? end : 0;
}

int emu_rss_look(struct emu_region *r, int everything, struct emu_look *ret)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	if (r->pagemap_fd < 0) {
		err = -ENOTTY;
	} else {
		pthread_mutex_lock(&r->look_lock);
		err = (int)look(r, everything, ret);
		pthread_mutex_unlock(&r->look_lock);
	}
	emu_region_leave(r);
	return err;
}
