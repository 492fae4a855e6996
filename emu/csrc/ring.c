/* SPDX-License-Identifier: MIT */
/*
 * ring.c - what happened, for whoever watches: fixed-size records, many writers, one reader, never a wait.
 *
 * The bounded queue of D. Vyukov: each slot carries a sequence number that says whose turn it is.  A writer takes a
 * position by compare-and-swap, fills the slot and publishes it by its sequence; a reader takes it and hands the
 * slot on to the next lap.  A full ring drops the *new* record and counts it (ring_overflow): the fault path must
 * not wait for a reader that may be Python.  Async-signal-safe, since the SIGBUS handler writes here.
 */
#include "core.h"

#define SLOTS 4096u /* a power of two */

struct slot {
	_Atomic uint64_t seq;
	struct emu_event event;
};

struct emu_ring {
	_Atomic uint64_t head __attribute__((aligned(64)));
	_Atomic uint64_t tail __attribute__((aligned(64)));
	_Atomic int trace_faults;
	struct slot slot[SLOTS];
};

size_t emu_ring_bytes(void)
{
	return sizeof(struct emu_ring);
}

/* The ring lies in a zeroed, lazily populated mapping: slot i's turn is stored minus i, so zeroes are a fresh ring. */
void emu_ring_init(struct emu_ring *ring)
{
	atomic_init(&ring->head, 0);
	atomic_init(&ring->tail, 0);
}

void emu_ring_push(struct emu_region *r, int type, uint64_t gfn, uint64_t count, int arg)
{
	struct emu_ring *ring = r->ring;
	uint64_t pos = atomic_load_explicit(&ring->head, memory_order_relaxed);

	for (;;) {
		uint64_t i = pos % SLOTS;
		struct slot *slot = &ring->slot[i];
		int64_t turn = (int64_t)(atomic_load_explicit(&slot->seq, memory_order_acquire) + i - pos);

		if (turn < 0) { /* the reader hasn't come past here yet */
			emu_stat_add(r, EMU_STAT_ring_overflow, 1);
			return;
		}
		if (turn == 0 && atomic_compare_exchange_weak_explicit(&ring->head, &pos, pos + 1, memory_order_relaxed,
		                                                       memory_order_relaxed)) {
			slot->event = (struct emu_event){
				.ns = emu_now_ns(), .gfn = gfn, .count = (uint32_t)count, .type = (uint16_t)type,
				.arg = (uint16_t)arg,
			};
			atomic_store_explicit(&slot->seq, pos + 1 - i, memory_order_release);
			return;
		}
		if (turn > 0)
			pos = atomic_load_explicit(&ring->head, memory_order_relaxed);
	}
}

/* One reader at a time: the caller sees to it. */
int64_t emu_ring_drain(struct emu_region *r, struct emu_event *ret, size_t cap)
{
	struct emu_ring *ring = r->ring;
	int err = emu_region_enter(r);
	uint64_t pos;
	size_t n = 0;

	if (err)
		return err;
	pos = atomic_load_explicit(&ring->tail, memory_order_relaxed);

	for (; n < cap; n++, pos++) {
		uint64_t i = pos % SLOTS;
		struct slot *slot = &ring->slot[i];

		if (atomic_load_explicit(&slot->seq, memory_order_acquire) + i != pos + 1)
			break;
		ret[n] = slot->event;
		atomic_store_explicit(&slot->seq, pos + SLOTS - i, memory_order_release);
	}
	atomic_store_explicit(&ring->tail, pos, memory_order_relaxed);
	emu_region_leave(r);
	return (int64_t)n;
}

int emu_ring_trace_faults(struct emu_region *r, int on)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	atomic_store_explicit(&r->ring->trace_faults, on, memory_order_relaxed);
	emu_region_leave(r);
	return 0;
}

bool emu_ring_traces_faults(const struct emu_region *r)
{
	return atomic_load_explicit(&r->ring->trace_faults, memory_order_relaxed);
}
