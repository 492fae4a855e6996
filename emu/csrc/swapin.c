/* SPDX-License-Identifier: MIT */
/*
 * swapin.c - a frame back from the store: at a fault, ahead of one, or asked for.
 *
 * The faulting thread reads the stored bytes (from the pool, or the file), checks them, decompresses into a buffer, and
 * installs.  What was stored right after it, and lies right after it in the guest, is brought back too, in a window that
 * doubles while faults go on where the last one ended (mm/swap_state.c, swap_vma_readahead).  Everything here is
 * async-signal-safe: futex, pread, ioctl, decompression without heap.
 */
#define _GNU_SOURCE
#include "swap.h"

#include <sched.h>
#include <string.h>

static struct emu_swap_buffer *get_buffer(struct emu_swap *sw)
{
	for (;;) {
		uint32_t taken = atomic_load(&sw->buffers_taken), i = (uint32_t)__builtin_ctz(~taken);

		if (taken == (1u << EMU_SWAP_BUFFERS) - 1)
			sched_yield(); /* who has one needs no other, and comes to an end */
		else if (atomic_compare_exchange_strong(&sw->buffers_taken, &taken, taken | 1u << i))
			return &sw->buffer[i];
	}
}

static void put_buffer(struct emu_swap *sw, struct emu_swap_buffer *b)
{
	atomic_fetch_and(&sw->buffers_taken, ~(1u << (b - sw->buffer)));
}

/* The page of a slot from its stored bytes: 0, or -EBADMSG. */
static int unpack(struct emu_swap *sw, const struct emu_slot *slot, uint64_t gfn, const uint8_t *bytes, uint8_t *page)
{
	const uint16_t len = slot->kind == EMU_SLOT_SAME ? 8 : slot->len;

	if (emu_store_sum(bytes, len, emu_swap_sum_key(gfn, slot->seq)) != slot->sum)
		return -EBADMSG;
	if (slot->kind == EMU_SLOT_SAME)
		for (size_t i = 0; i < EMU_FRAME_SIZE; i += 8)
			memcpy(page + i, bytes, 8);
	else if (len == EMU_FRAME_SIZE)
		memcpy(page, bytes, EMU_FRAME_SIZE);
	else if (sw->lz4->decompress((const char *)bytes, (char *)page, len, EMU_FRAME_SIZE) != EMU_FRAME_SIZE)
		return -EBADMSG;
	return 0;
}

static uint64_t block_up(uint64_t at)
{
	return (at + EMU_FRAME_SIZE - 1) & ~(uint64_t)(EMU_FRAME_SIZE - 1);
}

/* All lines of an object at once: the checksum would wait for one after another. */
static void fetch_ahead(const struct emu_swap *sw, const struct emu_slot *slot)
{
	if (slot->kind == EMU_SLOT_MEMORY)
		for (uint32_t at = 0; at < slot->len; at += 64)
			__builtin_prefetch(emu_store_bytes(sw->store, slot) + at);
}

/* Pages of frames [gfn, gfn + n), all BUSY, into the buffer: how many, from the first on; *err: why not the next. */
static uint32_t load_pages(struct emu_swap *sw, uint64_t gfn, uint32_t n, struct emu_swap_buffer *b, int *err)
{
	uint64_t have = 0, have_end = 0; /* bytes of the file that are in the buffer */

	*err = 0;
	for (uint32_t i = 0; i < n; i++) {
		const struct emu_slot *slot = &sw->slot[gfn + i];
		const uint8_t *bytes = (const uint8_t *)&slot->at;

		if (slot->kind == EMU_SLOT_MEMORY)
			bytes = emu_store_bytes(sw->store, slot);
		if (i + 1 < n)
			fetch_ahead(sw, &slot[1]); /* the next one's bytes are as cold as these were */
		if (slot->kind == EMU_SLOT_FILE && (slot->at < have || slot->at + slot->len > have_end)) {
			/* from here to the last of the next ones that was written with it, whole blocks */
			const uint64_t own_end = slot->at + slot->len;
			uint64_t end = own_end;

			have = slot->at & ~(uint64_t)(EMU_FRAME_SIZE - 1);
			for (uint32_t k = i + 1; k < n && sw->slot[gfn + k].kind == EMU_SLOT_FILE && sw->slot[gfn + k].at == end; k++)
				end += sw->slot[gfn + k].len;
			if (end - have > sizeof(b->file))
				end = have + sizeof(b->file);
			have_end = block_up(end);
			*err = emu_store_read(sw->store, have, (uint32_t)(have_end - have), b->file);
			if (*err && end > own_end) { /* a neighbour's blocks, perhaps: its own alone */
				have_end = block_up(own_end);
				*err = emu_store_read(sw->store, have, (uint32_t)(have_end - have), b->file);
			}
		}
		if (slot->kind == EMU_SLOT_FILE)
			bytes = b->file + (slot->at - have);
		if (!*err)
			*err = unpack(sw, slot, gfn + i, bytes, b->page[i]);
		if (*err)
			return i;
	}
	return n;
}

/* How many frames after gfn come with it: stored one after another, still there, and paid for. They are BUSY and charged. */
static uint32_t claim_ahead(struct emu_region *r, struct emu_swap *sw, uint64_t gfn)
{
	uint32_t window = 1, n = 1;
	const uint32_t seq = sw->slot[gfn].seq;

	if (atomic_load_explicit(&sw->ra_next, memory_order_relaxed) == gfn) {
		window = atomic_load_explicit(&sw->ra_window, memory_order_relaxed) * 2;
		window = window < sw->readahead ? window : sw->readahead;
	}
	while (n < window && gfn + n < r->frames && emu_state_load(r, gfn + n) == EMU_PRESERVED) {
		if (emu_gate_charge(r, 1, EMU_GATE_TRY))
			break;
		if (!emu_state_try(r, gfn + n, EMU_PRESERVED, EMU_BUSY)) {
			emu_gate_uncharge(r, 1);
			break;
		}
		if (sw->slot[gfn + n].seq != seq + n) {
			emu_state_publish(r, gfn + n, EMU_PRESERVED);
			emu_state_wake(r, gfn + n, 1);
			emu_gate_uncharge(r, 1);
			break;
		}
		n++;
	}
	atomic_store_explicit(&sw->ra_window, window, memory_order_relaxed);
	atomic_store_explicit(&sw->ra_next, gfn + n, memory_order_relaxed);
	return n;
}

/*
 * A fault's frame, BUSY from PRESERVED and charged. Publishes it; how many frames came back, or -errno: then the charge is
 * still the caller's.
 */
int emu_swap_in(struct emu_region *r, uint64_t gfn)
{
	struct emu_swap *sw = emu_swap_of(r);
	struct emu_swap_buffer *b;
	uint32_t n;
	unsigned eagain = 0;
	uint64_t done = 0;
	uint32_t loaded;
	int err, stop;

	fetch_ahead(sw, &sw->slot[gfn]);
	b = get_buffer(sw);
	n = claim_ahead(r, sw, gfn);
	loaded = load_pages(sw, gfn, n, b, &err);
	stop = err;
	if (loaded) {
		err = emu_uffd_fill(r->uffd, EMU_FILL_COPY, (uintptr_t)emu_frame(r, gfn), b->page,
		                    (uint64_t)loaded << EMU_FRAME_SHIFT, false, &done, &eagain);
		done >>= EMU_FRAME_SHIFT;
	}
	put_buffer(sw, b);
	for (uint64_t i = 0; i < done; i++)
		emu_store_free(sw->store, &sw->slot[gfn + i]);
	emu_state_publish_run(r, gfn, done, EMU_RESIDENT);
	emu_state_moved(r, EMU_PRESERVED, EMU_RESIDENT, (int64_t)done);
	emu_stat_add(r, EMU_STAT_swap_in_frames, (int64_t)done);
	if (eagain)
		emu_stat_add(r, EMU_STAT_uffd_eagain, eagain);
	if (done > 1)
		emu_stat_add(r, EMU_STAT_swap_readahead, (int64_t)done - 1);
	if (!done && stop == -EBADMSG) { /* wrong bytes, and not an error in reading them: they won't get better */
		emu_store_free(sw->store, &sw->slot[gfn]);
		emu_stat_add(r, EMU_STAT_swap_corrupt, 1);
		emu_ring_push(r, EMU_EV_SWAP_CORRUPT, gfn, 1, 0);
		emu_lose(r, gfn, 1);
		emu_state_publish(r, gfn, EMU_LOST);
		emu_state_moved(r, EMU_PRESERVED, EMU_LOST, 1);
		err = -EHWPOISON;
		emu_state_publish_run(r, gfn + 1, n - 1, EMU_PRESERVED);
	} else {
		emu_state_publish_run(r, gfn + done, n - done, EMU_PRESERVED);
	}
	emu_gate_uncharge(r, done ? (int64_t)(n - done) : (int64_t)n - 1);
	emu_state_wake(r, gfn, n);
	if (r->service == EMU_SERVICE_THREAD && done > 1)
		emu_uffd_wake(r->uffd, (uintptr_t)emu_frame(r, gfn), done << EMU_FRAME_SHIFT);
	return done ? (int)done : err;
}

int64_t emu_swap_back(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int64_t back = 0;
	int err = emu_swap_enter(r, ranges, n);

	if (err)
		return err;
	for (size_t i = 0; i < n && !err; i++)
		for (uint64_t gfn = ranges[i].gfn; gfn < ranges[i].gfn + ranges[i].count && !err; gfn++) {
			uint8_t state = emu_state_load(r, gfn);

			if (state == EMU_BUSY) {
				emu_state_wait(r, gfn--);
				continue;
			}
			if (state != EMU_PRESERVED)
				continue;
			err = emu_gate_charge(r, 1, EMU_GATE_WAIT);
			if (err)
				break;
			if (!emu_state_try(r, gfn, EMU_PRESERVED, EMU_BUSY)) {
				emu_gate_uncharge(r, 1);
				gfn--;
				continue;
			}
			err = emu_swap_in(r, gfn);
			if (err < 0)
				emu_gate_uncharge(r, 1);
			back += err > 0 ? err : 0;
			err = err < 0 ? err : 0;
		}
	emu_region_leave(r);
	return back ? back : err;
}
