/* SPDX-License-Identifier: MIT */
/* swap.h - what the swapper's files share: swap.c, swapout.c, swapin.c. */
#ifndef EMU_SWAP_H
#define EMU_SWAP_H

#include "store.h"

#define EMU_SWAP_WINDOW 32 /* pages of a buffer */
#define EMU_SWAP_BUFFERS 16

struct emu_swap_buffer {
	uint8_t page[EMU_SWAP_WINDOW][EMU_FRAME_SIZE];
	uint8_t file[(EMU_EXTENT_BLOCKS + 1) * EMU_FRAME_SIZE];
};

struct emu_swap {
	struct emu_store *store;
	const struct emu_lz4 *lz4;
	struct emu_table slots_table, buffers_table;
	struct emu_slot *slot;
	_Atomic uint32_t seq;

	struct emu_swap_buffer *buffer;
	_Atomic uint32_t buffers_taken; /* a bit each */
	uint32_t readahead;
	_Atomic uint64_t ra_next;
	_Atomic uint32_t ra_window;

	pthread_t thread;
	_Atomic bool have_thread;
	_Atomic uint32_t word; /* futex of the worker: changed when there is something to do */
	_Atomic uint32_t done; /* futex of who waits for it */
	_Atomic int64_t want;  /* frames */
	_Atomic int busy;
	_Atomic bool stop;
};

static inline struct emu_swap *emu_swap_of(const struct emu_region *r)
{
	return atomic_load_explicit(&r->swap, memory_order_acquire);
}

/* Whose bytes: a frame's, and no older ones of its. */
static inline uint64_t emu_swap_sum_key(uint64_t gfn, uint32_t seq)
{
	return (gfn << 32 | seq) * 0xff51afd7ed558ccdu + gfn;
}

/* swap.c: a call on a region with a store: 0, or -errno. Then emu_region_leave(). */
int emu_swap_enter(struct emu_region *r, const struct emu_range *ranges, size_t n);

#endif
