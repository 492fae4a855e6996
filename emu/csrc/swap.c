/* SPDX-License-Identifier: MIT */
/*
 * swap.c - a frame's content out of the guest and into the store, and back at a touch: what a host does that takes memory
 * without asking.  Here are the swapper of a region and the slots; swapout.c has the way out, swapin.c the way back.
 *
 * The slot of a frame belongs to whoever holds it BUSY.  A slot is freed, and may be reused, before its frame is published
 * as something else, and never before the page is in the guest.
 *
 * Wrong bytes are found by the checksum: such a frame is LOST, and the access that wanted it fails and names it.  A read
 * error isn't that: the frame stays PRESERVED, the access fails with EIO, and may be tried again.
 */
#include "swap.h"

#include <stdlib.h>
#include <sys/mman.h>

#define FORGET 512 /* frames that are BUSY while their slots are freed */

int emu_swap_on(struct emu_region *r, const struct emu_store_options *o)
{
	struct emu_swap *sw = NULL;
	int err = emu_region_enter(r);

	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	if (emu_swap_of(r))
		err = -EBUSY;
	else if (!r->aside)
		err = -EOPNOTSUPP;
	else if (!o->readahead || o->readahead > EMU_SWAP_WINDOW || (o->memory < 65536 && (o->fd < 0 || o->file < EMU_FRAME_SIZE)))
		err = -EINVAL;
	else if (!(sw = calloc(1, sizeof(*sw))))
		err = -ENOMEM;
	if (!err) {
		err = emu_store_open(r, o, &sw->store);
		if (!err)
			err = emu_table_map(&sw->slots_table, r->frames * sizeof(struct emu_slot));
		if (!err)
			err = emu_table_map(&sw->buffers_table, EMU_SWAP_BUFFERS * sizeof(struct emu_swap_buffer));
	}
	if (!err) {
		sw->lz4 = o->disable & EMU_NO_LZ4 ? NULL : emu_lz4();
		sw->slot = (struct emu_slot *)(void *)sw->slots_table.p;
		sw->buffer = (struct emu_swap_buffer *)(void *)sw->buffers_table.p;
		sw->readahead = o->readahead;
		atomic_init(&sw->ra_next, UINT64_MAX);
		atomic_store_explicit(&r->swap, sw, memory_order_release);
	} else if (sw) {
		emu_table_unmap(&sw->slots_table);
		emu_table_unmap(&sw->buffers_table);
		if (sw->store)
			emu_store_close(sw->store);
		free(sw);
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

void emu_swap_free(struct emu_region *r)
{
	struct emu_swap *sw = atomic_exchange(&r->swap, NULL);

	if (!sw)
		return;
	emu_store_close(sw->store);
	emu_table_unmap(&sw->slots_table);
	emu_table_unmap(&sw->buffers_table);
	free(sw);
}

int64_t emu_swap_table_bytes(struct emu_region *r)
{
	struct emu_swap *sw = emu_swap_of(r);

	return sw ? emu_table_bytes(&sw->slots_table) + emu_table_bytes(&sw->buffers_table) : 0;
}

int emu_swap_info(struct emu_region *r, struct emu_store_info *ret)
{
	int err = emu_region_enter(r);

	*ret = (struct emu_store_info){ 0 };
	if (err)
		return err;
	if (emu_swap_of(r)) {
		emu_store_tell(emu_swap_of(r)->store, ret);
		ret->lz4 = !!emu_swap_of(r)->lz4;
	}
	emu_region_leave(r);
	return 0;
}

int emu_swap_enter(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int err = emu_region_enter_at(r, ranges, n);

	if (!err && !emu_swap_of(r)) {
		emu_region_leave(r);
		err = -EOPNOTSUPP;
	}
	return err;
}

/* Frames in a row that are PRESERVED, at most count: their content isn't wanted any more. -> ZERO; how many. */
uint64_t emu_swap_forget(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	struct emu_swap *sw = emu_swap_of(r);
	const uint64_t n = emu_state_claim(r, gfn, count < FORGET ? count : FORGET, EMU_PRESERVED);

	for (uint64_t i = 0; i < n; i++)
		emu_store_free(sw->store, &sw->slot[gfn + i]);
	if (!n)
		return 0;
	emu_state_publish_run(r, gfn, n, EMU_ZERO);
	emu_state_moved(r, EMU_PRESERVED, EMU_ZERO, (int64_t)n);
	emu_stat_add(r, EMU_STAT_swap_dropped, (int64_t)n);
	emu_state_wake(r, gfn, n);
	return n;
}

/* One frame that is stored: its page is thrown away, and it is of that usage, volatile or unused: gone, or nothing. */
bool emu_swap_forget_as(struct emu_region *r, uint64_t gfn, uint8_t usage)
{
	struct emu_swap *sw = emu_swap_of(r);
	const uint8_t to = usage == EMU_VOLATILE ? EMU_DISCARDED : EMU_ZERO;

	if (!emu_state_try(r, gfn, EMU_PRESERVED, EMU_BUSY))
		return false;
	emu_store_free(sw->store, &sw->slot[gfn]);
	if (to == EMU_DISCARDED)
		emu_lose(r, gfn, 1);
	emu_state_publish_as(r, gfn, to, usage);
	emu_state_moved(r, EMU_PRESERVED, to, 1);
	emu_stat_add(r, EMU_STAT_swap_dropped, 1);
	emu_state_wake(r, gfn, 1);
	return true;
}

int emu_swap_corrupt(struct emu_region *r, uint64_t gfn, uint64_t byte)
{
	struct emu_range range = { gfn, 1, 0 };
	int err = emu_swap_enter(r, &range, 1);
	struct emu_slot *slot;

	if (err)
		return err;
	slot = &emu_swap_of(r)->slot[gfn];
	if (!emu_state_try(r, gfn, EMU_PRESERVED, EMU_BUSY)) {
		emu_region_leave(r);
		return -ENOENT;
	}
	if (slot->kind == EMU_SLOT_MEMORY)
		((uint8_t *)(uintptr_t)emu_store_bytes(emu_swap_of(r)->store, slot))[byte % slot->len] ^= 0x10;
	else if (slot->kind == EMU_SLOT_SAME)
		slot->at ^= 0x10;
	else
		err = -ENOTSUP; /* the file is the caller's */
	emu_state_publish(r, gfn, EMU_PRESERVED);
	emu_state_wake(r, gfn, 1);
	emu_region_leave(r);
	return err;
}
