/* SPDX-License-Identifier: MIT */
/*
 * swap.c - a frame's content out of the guest and into the store, and back at a touch: what a host does that takes memory
 * without asking.
 *
 * Out.  Frames are set aside first, in long runs (aside.c): the guest runs on, and a touch brings a frame back, which
 * cancels its way out.  Then, GROUP by group, they are claimed, each is looked at (one word all over? then that word is all
 * that is kept), compressed, put into the store, and only then are the side's pages dropped and the frames published as
 * PRESERVED.  Between two frames of a group we look whether a fault waits for one near: then the rest of the group is let
 * go.  A page that can't be stored goes back into the guest: nothing is lost, and the count says so.
 *
 * In.  The faulting thread reads the stored bytes (from the pool, or the file), checks them, decompresses into a
 * buffer, and installs.  What was stored right after it, and lies right after it in the guest, is brought back too, in a
 * window that doubles while faults go on where the last one ended (mm/swap_state.c, swap_vma_readahead).  Everything here
 * is async-signal-safe: futex, pread, ioctl, decompression without heap.
 *
 * The slot of a frame belongs to whoever holds it BUSY.  A slot is freed, and may be reused, before its frame is published
 * as something else, and never before the page is in the guest.
 *
 * Wrong bytes are found by the checksum: such a frame is LOST, and the access that wanted it fails and names it.  A read
 * error isn't that: the frame stays PRESERVED, the access fails with EIO, and may be tried again.
 *
 * The worker (one thread) takes what is idle longest, when the host asks for so many frames, or when a charge has to wait
 * at the gate.
 */
#define _GNU_SOURCE
#include "store.h"

#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHUNK 512 /* frames set aside before they are stored */
#define GROUP 64  /* frames that are BUSY while they are compressed */
#define COMPRESSED_MOST 3584 /* bytes: more than this isn't worth decompressing */
#define WINDOW 32 /* pages of a buffer */
#define BUFFERS 16

struct buffer {
	uint8_t page[WINDOW][EMU_FRAME_SIZE];
	uint8_t file[(EMU_EXTENT_BLOCKS + 1) * EMU_FRAME_SIZE];
};

struct emu_swap {
	struct emu_store *store;
	const struct emu_lz4 *lz4;
	struct emu_table slots_table, buffers_table;
	struct emu_slot *slot;
	struct buffer *buffer;
	_Atomic uint32_t buffers_taken; /* a bit each */
	_Atomic uint32_t seq;
	uint32_t readahead;
	_Atomic uint64_t ra_next;
	_Atomic uint32_t ra_window;

	pthread_t thread;
	bool have_thread;
	_Atomic uint32_t word; /* futex of the worker: changed when there is something to do */
	_Atomic uint32_t done; /* futex of who waits for it */
	_Atomic int64_t want;  /* frames */
	_Atomic int busy;
	_Atomic bool stop;
};

static struct emu_swap *swap_of(const struct emu_region *r)
{
	return atomic_load_explicit(&r->swap, memory_order_acquire);
}

int emu_swap_on(struct emu_region *r, const struct emu_store_options *o)
{
	struct emu_swap *sw = NULL;
	int err = emu_region_enter(r);

	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	if (swap_of(r))
		err = -EBUSY;
	else if (!r->aside)
		err = -EOPNOTSUPP;
	else if (!o->readahead || o->readahead > WINDOW || (o->memory < 65536 && (o->fd < 0 || o->file < EMU_FRAME_SIZE)))
		err = -EINVAL;
	else if (!(sw = calloc(1, sizeof(*sw))))
		err = -ENOMEM;
	if (!err) {
		err = emu_store_open(r, o, &sw->store);
		if (!err)
			err = emu_table_map(&sw->slots_table, r->frames * sizeof(struct emu_slot));
		if (!err)
			err = emu_table_map(&sw->buffers_table, BUFFERS * sizeof(struct buffer));
	}
	if (!err) {
		sw->lz4 = o->disable & EMU_NO_LZ4 ? NULL : emu_lz4();
		sw->slot = (struct emu_slot *)(void *)sw->slots_table.p;
		sw->buffer = (struct buffer *)(void *)sw->buffers_table.p;
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
	struct emu_swap *sw = swap_of(r);

	return sw ? emu_table_bytes(&sw->slots_table) + emu_table_bytes(&sw->buffers_table) : 0;
}

int emu_swap_info(struct emu_region *r, struct emu_store_info *ret)
{
	int err = emu_region_enter(r);

	*ret = (struct emu_store_info){ 0 };
	if (err)
		return err;
	if (swap_of(r)) {
		emu_store_tell(swap_of(r)->store, ret);
		ret->lz4 = !!swap_of(r)->lz4;
	}
	emu_region_leave(r);
	return 0;
}

/* ---- out */

struct out {
	struct emu_region *r;
	struct emu_swap *sw;
	void *state;    /* of LZ4 */
	uint8_t *file;  /* objects on their way to the file, aligned */
	uint32_t pending, pending_bytes;
	uint32_t pending_at[GROUP];
	uint8_t pending_of[GROUP]; /* which frame of the group */
	struct emu_slot slot[GROUP];
	int stored[GROUP]; /* by frame: 1, or -errno */
	uint8_t bytes[EMU_FRAME_SIZE];
};

/* Whose bytes: a frame's, and no older ones of its. */
static uint64_t sum_key(uint64_t gfn, uint32_t seq)
{
	return (gfn << 32 | seq) * 0xff51afd7ed558ccdu + gfn;
}

static bool same_filled(const uint64_t *page)
{
	for (size_t i = 1; i < EMU_FRAME_SIZE / 8; i++)
		if (page[i] != page[0])
			return false;
	return true;
}

/* Objects [from, to) that are pending go to the file; in two parts, where there is no room for them in a row. */
static void write_pending(struct out *o, uint32_t from, uint32_t to)
{
	const uint32_t start = o->pending_at[from];
	const uint32_t end = to < o->pending ? o->pending_at[to] : o->pending_bytes;
	const uint32_t blocks = (end - start + EMU_FRAME_SIZE - 1) / EMU_FRAME_SIZE;
	int64_t at = emu_store_extent(o->sw->store, blocks, to - from);
	int err = at < 0 ? (int)at : 0;

	if (err && to - from > 1) {
		write_pending(o, from, from + (to - from) / 2);
		write_pending(o, from + (to - from) / 2, to);
		return;
	}
	if (!err) {
		if (start % EMU_FRAME_SIZE) /* what was before it has been written, or has failed */
			memmove(o->file, o->file + start, end - start);
		err = emu_store_write(o->sw->store, start % EMU_FRAME_SIZE ? o->file : o->file + start, blocks, at);
	}
	for (uint32_t i = from; i < to; i++) {
		struct emu_slot *slot = &o->slot[o->pending_of[i]];

		o->stored[o->pending_of[i]] = err ? err : 1;
		slot->kind = EMU_SLOT_FILE;
		slot->at = (uint64_t)at + (o->pending_at[i] - start);
		slot->extent = (uint8_t)(slot->at / EMU_FRAME_SIZE - (uint64_t)at / EMU_FRAME_SIZE);
	}
}

/* Look at one page, compress it, and find it a place: 1, 0 (it waits for the group's write), or -errno. */
static int store_page(struct out *o, uint64_t gfn, uint32_t i, const uint8_t *page)
{
	struct emu_slot *slot = &o->slot[i];
	const uint8_t *bytes = page;
	int len = 0, err;

	*slot = (struct emu_slot){ .seq = atomic_fetch_add_explicit(&o->sw->seq, 1, memory_order_relaxed) };
	if (same_filled((const uint64_t *)(const void *)page)) {
		slot->kind = EMU_SLOT_SAME;
		memcpy(&slot->at, page, 8);
		slot->sum = emu_store_sum(&slot->at, 8, sum_key(gfn, slot->seq));
		return 1;
	}
	if (o->sw->lz4) {
		len = o->sw->lz4->compress(o->state, (const char *)page, (char *)o->bytes, EMU_FRAME_SIZE, COMPRESSED_MOST, 1);
		bytes = len > 0 ? o->bytes : page;
	}
	slot->len = (uint16_t)(len > 0 ? len : EMU_FRAME_SIZE);
	slot->sum = emu_store_sum(bytes, slot->len, sum_key(gfn, slot->seq));
	/* what doesn't compress takes as much memory in the pool as it did in the guest: if there is a file, it goes there */
	err = slot->len == EMU_FRAME_SIZE && emu_store_has_file(o->sw->store) ? -ENOSPC
	      : emu_store_put(o->sw->store, bytes, slot->len, slot);
	if (!err)
		return 1;
	if (!emu_store_has_file(o->sw->store))
		return err;
	memcpy(o->file + o->pending_bytes, bytes, slot->len);
	o->pending_at[o->pending] = o->pending_bytes;
	o->pending_of[o->pending++] = (uint8_t)i;
	o->pending_bytes += slot->len;
	return 0;
}

/*
 * Frames [gfn, gfn + n), BUSY from ASIDE, into the store.  Publishes them all; returns how many went, and the first error in
 * *err. *looked: how many there was time for before somebody waited.
 */
static int64_t store_group(struct out *o, uint64_t gfn, uint32_t n, uint32_t *looked, int *err)
{
	struct emu_region *r = o->r;
	int64_t went = 0;
	uint32_t i;

	o->pending = o->pending_bytes = 0;
	for (i = 0; i < n; i++) {
		if (i && emu_state_awaited(r, gfn))
			break;
		o->stored[i] = store_page(o, gfn + i, i, emu_side(r, gfn + i));
	}
	*looked = i;
	if (o->pending)
		write_pending(o, 0, o->pending);
	for (uint32_t first = 0, end; first < n; first = end) {
		const bool goes = first < *looked && o->stored[first] > 0;
		bool left;

		for (end = first + 1; end < n && goes == (end < *looked && o->stored[end] > 0); end++)
			;
		if (!goes) {
			if (first < *looked && !*err)
				*err = o->stored[first];
			emu_state_publish_run(r, gfn + first, end - first, EMU_ASIDE);
			continue;
		}
		for (uint32_t k = first; k < end; k++) {
			o->sw->slot[gfn + k] = o->slot[k];
			emu_store_kept(o->sw->store, &o->slot[k]);
			emu_stat_add(r, EMU_STAT_swap_same, o->slot[k].kind == EMU_SLOT_SAME);
			emu_stat_add(r, EMU_STAT_swap_raw, o->slot[k].len == EMU_FRAME_SIZE);
		}
		/* refused (locked memory?): the copies stay aside, and count */
		left = madvise(emu_side(r, gfn + first), (uint64_t)(end - first) << EMU_FRAME_SHIFT, MADV_DONTNEED);
		if (left)
			for (uint32_t k = first; k < end; k++) {
				emu_gate_charge(r, 1, EMU_GATE_FORCE);
				emu_aside_left(r, gfn + k);
			}
		emu_state_publish_run(r, gfn + first, end - first, EMU_PRESERVED);
		emu_state_moved(r, EMU_ASIDE, EMU_PRESERVED, end - first);
		for (uint32_t k = first; left && k < end; k++)
			emu_aside_settle(r, gfn + k);
		went += end - first;
	}
	emu_state_wake(r, gfn, n);
	return went;
}

/* What was set aside for this of [gfn, end) into the store. Returns how many frames went; *err: why not the others. */
static int64_t store_range(struct out *o, uint64_t gfn, uint64_t end, int *err)
{
	struct emu_region *r = o->r;
	int64_t went = 0;

	while (gfn < end && !*err) {
		uint8_t state = emu_state_load(r, gfn);
		uint32_t n, looked;

		if (state == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (state != EMU_ASIDE) {
			emu_stat_add(r, EMU_STAT_swap_cancelled, state == EMU_RESIDENT);
			gfn++;
			continue;
		}
		n = (uint32_t)emu_state_claim(r, gfn, end - gfn < GROUP ? end - gfn : GROUP, EMU_ASIDE);
		n = (uint32_t)emu_aside_stamped(r, gfn, n, EMU_STAMP_SWAP);
		if (!n) { /* set aside by somebody else, who drops it in time */
			gfn++;
			continue;
		}
		went += store_group(o, gfn, n, &looked, err);
		gfn += looked;
		if (looked < n) /* let the one who waits have it */
			sched_yield();
	}
	return went;
}

static int64_t swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	struct emu_swap *sw = swap_of(r);
	struct out *o = malloc(sizeof(*o));
	void *state = sw->lz4 ? malloc(sw->lz4->state_size) : NULL;
	void *file = emu_store_has_file(sw->store) ? aligned_alloc(EMU_FRAME_SIZE, GROUP * EMU_FRAME_SIZE) : NULL;
	int64_t went = 0;
	int err = 0;

	if (!o || (sw->lz4 && !state) || (emu_store_has_file(sw->store) && !file))
		err = -ENOMEM;
	for (size_t i = 0; i < n && !err; i++) {
		const uint64_t end = ranges[i].gfn + ranges[i].count;

		*o = (struct out){ .r = r, .sw = sw, .state = state, .file = file };
		for (uint64_t gfn = ranges[i].gfn, next; gfn < end && !err; gfn = next) {
			int64_t aside;

			next = gfn + CHUNK < end ? gfn + CHUNK : end;
			aside = emu_aside_take(r, gfn, next, EMU_STAMP_SWAP);
			if (aside < 0)
				err = (int)aside;
			else
				went += store_range(o, gfn, next, &err);
			if (err) { /* what couldn't be stored, back to where it was */
				int64_t back = emu_aside_restore(r, gfn, next, EMU_STAMP_SWAP);

				emu_stat_add(r, EMU_STAT_swap_failed, back > 0 ? back : 0);
			}
		}
	}
	free(file);
	free(state);
	free(o);
	emu_stat_add(r, EMU_STAT_swap_out_frames, went);
	if (went)
		emu_ring_push(r, EMU_EV_SWAP_OUT, n ? ranges[0].gfn : 0, (uint64_t)went, 0);
	if (err) {
		emu_store_failed(sw->store, -err);
		emu_ring_push(r, EMU_EV_SWAP_FAILED, n ? ranges[0].gfn : 0, 1, -err);
	}
	return went;
}

static int begin(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int err = emu_region_enter_at(r, ranges, n);

	if (!err && !swap_of(r)) {
		emu_region_leave(r);
		err = -EOPNOTSUPP;
	}
	return err;
}

int64_t emu_swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int64_t went = begin(r, ranges, n);

	if (went)
		return went;
	went = swap_out(r, ranges, n);
	emu_region_leave(r);
	return went;
}

/* ---- in */

static struct buffer *get_buffer(struct emu_swap *sw)
{
	for (;;) {
		uint32_t taken = atomic_load(&sw->buffers_taken), i = (uint32_t)__builtin_ctz(~taken);

		if (taken == (1u << BUFFERS) - 1)
			sched_yield(); /* who has one needs no other, and comes to an end */
		else if (atomic_compare_exchange_strong(&sw->buffers_taken, &taken, taken | 1u << i))
			return &sw->buffer[i];
	}
}

static void put_buffer(struct emu_swap *sw, struct buffer *b)
{
	atomic_fetch_and(&sw->buffers_taken, ~(1u << (b - sw->buffer)));
}

/* The page of a slot from its stored bytes: 0, or -EBADMSG. */
static int unpack(struct emu_swap *sw, const struct emu_slot *slot, uint64_t gfn, const uint8_t *bytes, uint8_t *page)
{
	const uint16_t len = slot->kind == EMU_SLOT_SAME ? 8 : slot->len;

	if (emu_store_sum(bytes, len, sum_key(gfn, slot->seq)) != slot->sum)
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
static uint32_t load_pages(struct emu_swap *sw, uint64_t gfn, uint32_t n, struct buffer *b, int *err)
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
	struct emu_swap *sw = swap_of(r);
	struct buffer *b;
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
	int err = begin(r, ranges, n);

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

/* Frames in a row that are PRESERVED, at most count: their content isn't wanted any more. -> ZERO; how many. */
uint64_t emu_swap_forget(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	struct emu_swap *sw = swap_of(r);
	const uint64_t n = emu_state_claim(r, gfn, count < CHUNK ? count : CHUNK, EMU_PRESERVED);

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

int emu_swap_corrupt(struct emu_region *r, uint64_t gfn, uint64_t byte)
{
	struct emu_range range = { gfn, 1, 0 };
	int err = begin(r, &range, 1);
	struct emu_slot *slot;

	if (err)
		return err;
	slot = &swap_of(r)->slot[gfn];
	if (!emu_state_try(r, gfn, EMU_PRESERVED, EMU_BUSY)) {
		emu_region_leave(r);
		return -ENOENT;
	}
	if (slot->kind == EMU_SLOT_MEMORY)
		((uint8_t *)(uintptr_t)emu_store_bytes(swap_of(r)->store, slot))[byte % slot->len] ^= 0x10;
	else if (slot->kind == EMU_SLOT_SAME)
		slot->at ^= 0x10;
	else
		err = -ENOTSUP; /* the file is the caller's */
	emu_state_publish(r, gfn, EMU_PRESERVED);
	emu_state_wake(r, gfn, 1);
	emu_region_leave(r);
	return err;
}

/* ---- the worker */

#define VICTIMS 256 /* ranges a round */
#define ROUND 2048  /* frames */

static void *swapd(void *arg)
{
	struct emu_region *r = arg;
	struct emu_swap *sw = swap_of(r);

	emu_sigbus_unblock(); /* a page shared with a forked child is touched */
	while (!atomic_load(&sw->stop)) {
		const uint32_t word = atomic_load(&sw->word);
		struct emu_range victim[VICTIMS];
		int64_t want = atomic_load(&sw->want), went = 0;
		size_t n = 0;

		if (want > 0 && emu_access_victims(r, 0, want < ROUND ? (uint64_t)want : ROUND, victim, VICTIMS, &n) > 0)
			went = swap_out(r, victim, n);
		/* nothing more to be had: the rest of the wish is void; who waits at the gate will ask again */
		atomic_fetch_sub(&sw->want, went > 0 ? went : want > 0 ? want : 0);
		if (atomic_load(&sw->want) > 0)
			continue;
		atomic_store(&sw->busy, 0);
		atomic_fetch_add(&sw->done, 1);
		emu_futex(&sw->done, FUTEX_WAKE, INT32_MAX);
		emu_futex(&sw->word, FUTEX_WAIT, word);
	}
	return NULL;
}

int emu_swapd_start(struct emu_region *r)
{
	int err = begin(r, NULL, 0);
	struct emu_swap *sw;

	if (err)
		return err;
	sw = swap_of(r);
	pthread_mutex_lock(&r->setup);
	if (!sw->have_thread) {
		err = emu_thread_start(&sw->thread, swapd, r, "emu-swapd");
		sw->have_thread = !err;
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

/* Async-signal-safe: a charge that waits calls it. A wish that is larger already isn't added to. */
int emu_swapd_kick(struct emu_region *r, uint64_t frames)
{
	struct emu_swap *sw = swap_of(r);
	int64_t want;

	if (!sw || !sw->have_thread)
		return -EOPNOTSUPP;
	want = atomic_load(&sw->want);
	while (want < (int64_t)frames && !atomic_compare_exchange_weak(&sw->want, &want, (int64_t)frames))
		;
	atomic_store(&sw->busy, 1);
	atomic_fetch_add(&sw->word, 1);
	emu_futex(&sw->word, FUTEX_WAKE, 1);
	return 0;
}

int emu_swapd_drain(struct emu_region *r)
{
	int err = begin(r, NULL, 0);
	struct emu_swap *sw = swap_of(r);

	if (err)
		return err;
	while (sw->have_thread) {
		const uint32_t done = atomic_load(&sw->done);

		if (!atomic_load(&sw->busy) && atomic_load(&sw->want) <= 0)
			break;
		emu_futex(&sw->done, FUTEX_WAIT, done);
	}
	emu_region_leave(r);
	return 0;
}

void emu_swapd_stop(struct emu_region *r)
{
	struct emu_swap *sw = swap_of(r);

	if (!sw || !sw->have_thread)
		return;
	atomic_store(&sw->stop, true);
	atomic_fetch_add(&sw->word, 1);
	emu_futex(&sw->word, FUTEX_WAKE, 1);
	pthread_join(sw->thread, NULL);
	sw->have_thread = false;
}
