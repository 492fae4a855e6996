/* SPDX-License-Identifier: MIT */
/*
 * swapout.c - frames into the store, by whoever asks, or by the worker.
 *
 * Frames are set aside first, in long runs (aside.c): the guest runs on, and a touch brings a frame back, which cancels its
 * way out.  Then, GROUP by group, they are claimed, each is looked at (one word all over? then that word is all that is
 * kept), compressed, put into the store, and only then are the side's pages dropped and the frames published as PRESERVED.
 * Between two frames of a group we look whether a fault waits for one near: then the rest of the group is let go.  A page
 * that can't be stored goes back into the guest: nothing is lost, and the count says so.
 *
 * The worker (one thread) takes what is idle longest, when the host asks for so many frames, or when a charge has to wait
 * at the gate.
 */
#define _GNU_SOURCE
#include "swap.h"

#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHUNK 512 /* frames set aside before they are stored */
#define GROUP 64  /* frames that are BUSY while they are compressed */
#define COMPRESSED_MOST 3584 /* bytes: more than this isn't worth decompressing */

struct out {
	struct emu_region *r;
	struct emu_swap *sw;
	void *state;    /* of LZ4 */
	uint8_t *file;  /* objects on their way to the file, aligned */
	uint32_t pending, pending_bytes;
	uint32_t pending_at[GROUP];
	uint8_t pending_of[GROUP]; /* which frame of the group */
	struct emu_slot slot[GROUP];
	int64_t dropped; /* frames that its guest doesn't need: steal.c */
	int stored[GROUP]; /* by frame: 1, or -errno */
	uint8_t bytes[EMU_FRAME_SIZE];
};

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
		slot->sum = emu_store_sum(&slot->at, 8, emu_swap_sum_key(gfn, slot->seq));
		return 1;
	}
	if (o->sw->lz4) {
		len = o->sw->lz4->compress(o->state, (const char *)page, (char *)o->bytes, EMU_FRAME_SIZE, COMPRESSED_MOST, 1);
		bytes = len > 0 ? o->bytes : page;
	}
	slot->len = (uint16_t)(len > 0 ? len : EMU_FRAME_SIZE);
	slot->sum = emu_store_sum(bytes, slot->len, emu_swap_sum_key(gfn, slot->seq));
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

/*
 * What was set aside for this of [gfn, end), and is of a usage in the set, into the store. Returns how many frames went; *err:
 * why not the others.
 */
static int64_t store_range(struct out *o, uint64_t gfn, uint64_t end, unsigned usages, int *err)
{
	struct emu_region *r = o->r;
	int64_t went = 0;

	while (gfn < end && !*err) {
		uint8_t state = emu_state_load(r, gfn);
		uint64_t done, keep;
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
		n = (uint32_t)emu_state_claim_used(r, gfn, end - gfn < GROUP ? end - gfn : GROUP, EMU_ASIDE, usages);
		n = (uint32_t)emu_aside_stamped(r, gfn, n, EMU_STAMP_SWAP);
		if (!n) { /* set aside by somebody else, who drops it in time; or needed */
			gfn++;
			continue;
		}
		done = emu_steal_held(r, gfn, n, &keep);
		if (done || keep < n) {
			emu_state_publish_run(r, gfn + done + keep, n - done - keep, EMU_ASIDE);
			emu_state_wake(r, gfn, n);
		}
		o->dropped += (int64_t)done;
		gfn += done;
		if (done)
			continue;
		n = (uint32_t)keep;
		went += store_group(o, gfn, n, &looked, err);
		gfn += looked;
		if (looked < n) /* let the one who waits have it */
			sched_yield();
	}
	return went;
}

static void close_out(struct out *o)
{
	if (o) {
		free(o->state);
		free(o->file);
	}
	free(o);
}

static struct out *open_out(struct emu_region *r)
{
	struct emu_swap *sw = emu_swap_of(r);
	struct out *o = calloc(1, sizeof(*o));

	if (!o)
		return NULL;
	o->r = r;
	o->sw = sw;
	o->state = sw->lz4 ? malloc(sw->lz4->state_size) : NULL;
	o->file = emu_store_has_file(sw->store) ? aligned_alloc(EMU_FRAME_SIZE, GROUP * EMU_FRAME_SIZE) : NULL;
	if ((sw->lz4 && !o->state) || (emu_store_has_file(sw->store) && !o->file)) {
		close_out(o);
		return NULL;
	}
	return o;
}

/* What steal.c has set aside, and found dirty. Returns how many frames went; the others are still aside. */
int64_t emu_swap_store(struct emu_region *r, uint64_t gfn, uint64_t end)
{
	struct out *o = open_out(r);
	int err = o ? 0 : -ENOMEM;
	int64_t went = o ? store_range(o, gfn, end, 1u << EMU_POTENTIAL, &err) : 0;

	close_out(o);
	emu_stat_add(r, EMU_STAT_swap_out_frames, went);
	if (err)
		emu_store_failed(emu_swap_of(r)->store, -err);
	return went;
}

static int64_t swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	struct emu_swap *sw = emu_swap_of(r);
	struct out *o = open_out(r);
	int64_t went = 0, dropped;
	int err = o ? 0 : -ENOMEM;

	for (size_t i = 0; i < n && !err; i++) {
		const uint64_t end = ranges[i].gfn + ranges[i].count;

		for (uint64_t gfn = ranges[i].gfn, next; gfn < end && !err; gfn = next) {
			int64_t aside;

			next = gfn + CHUNK < end ? gfn + CHUNK : end;
			aside = emu_aside_take(r, gfn, next, EMU_STAMP_SWAP, EMU_ANY_USAGE);
			if (aside < 0)
				err = (int)aside;
			else
				went += store_range(o, gfn, next, EMU_ANY_USAGE, &err);
			if (err) { /* what couldn't be stored, back to where it was */
				int64_t back = emu_aside_restore(r, gfn, next, EMU_STAMP_SWAP);

				emu_stat_add(r, EMU_STAT_swap_failed, back > 0 ? back : 0);
			}
		}
	}
	dropped = o ? o->dropped : 0;
	close_out(o);
	emu_stat_add(r, EMU_STAT_swap_out_frames, went);
	if (went)
		emu_ring_push(r, EMU_EV_SWAP_OUT, n ? ranges[0].gfn : 0, (uint64_t)went, 0);
	if (err) {
		emu_store_failed(sw->store, -err);
		emu_ring_push(r, EMU_EV_SWAP_FAILED, n ? ranges[0].gfn : 0, 1, -err);
	}
	return went + dropped;
}

int64_t emu_swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	int64_t went = emu_swap_enter(r, ranges, n);

	if (went)
		return went;
	went = swap_out(r, ranges, n);
	emu_region_leave(r);
	return went;
}

/* ---- the worker */

#define VICTIMS 256 /* ranges a round */
#define ROUND 2048  /* frames */

static void *swapd(void *arg)
{
	struct emu_region *r = arg;
	struct emu_swap *sw = emu_swap_of(r);

	emu_sigbus_unblock(); /* a page shared with a forked child is touched */
	while (!atomic_load(&sw->stop)) {
		const uint32_t word = atomic_load(&sw->word);
		struct emu_range victim[VICTIMS];
		int64_t want = atomic_load(&sw->want), went = 0;
		size_t n = 0;

		if (want > 0 && emu_access_victims(r, 0, want < ROUND ? (uint64_t)want : ROUND, EMU_ANY_USAGE, victim, VICTIMS,
		                                   &n) > 0)
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
	int err = emu_swap_enter(r, NULL, 0);
	struct emu_swap *sw;

	if (err)
		return err;
	sw = emu_swap_of(r);
	pthread_mutex_lock(&r->setup);
	if (!sw->have_thread) {
		err = emu_thread_start(&sw->thread, swapd, r, "emu-swapd");
		atomic_store(&sw->have_thread, !err);
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

/* Async-signal-safe: a charge that waits calls it. A wish that is larger already isn't added to. */
int emu_swapd_kick(struct emu_region *r, uint64_t frames)
{
	struct emu_swap *sw = emu_swap_of(r);
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
	int err = emu_swap_enter(r, NULL, 0);
	struct emu_swap *sw = emu_swap_of(r);

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
	struct emu_swap *sw = emu_swap_of(r);

	if (!sw || !sw->have_thread)
		return;
	atomic_store(&sw->stop, true);
	atomic_fetch_add(&sw->word, 1);
	emu_futex(&sw->word, FUTEX_WAKE, 1);
	pthread_join(sw->thread, NULL);
	sw->have_thread = false;
}
