/* SPDX-License-Identifier: MIT */
/*
 * gate.c - the charge gate: a budget in frames that several guests share, held before memory is taken and not after.
 *
 * Guests of a fleet are processes, and their faults take memory at hundreds of MiB a second.  A host that polls them is
 * too late by that much.  So each resolver charges a frame before it installs it (mm/memcontrol.c, try_charge), in a page of
 * counters that all of them map: a guest that would go over `max` waits, in its own fault, until somebody gives back.
 *
 * Each process has a slot, and only it adds to its slot; the sum of the slots is what is charged.  A charge adds to the
 * own slot first and sums up then (all sequentially consistent): of two that would go over together at least one sees both,
 * takes back what it added, and waits.  So the sum of what was let through is never above max, and a process that is
 * killed between any two instructions leaves a slot that says what it had, or a little more: the host zeroes it.
 *
 * Summing 64 slots at each fault would cost more than the fault's own atomics, so a region keeps up to 2 * STOCK frames of
 * stock, charged and not used (memcg's MEMCG_CHARGE_BATCH).  Stock counts as charged, so max is exact; it lies in the slot,
 * too, so that who waits may give back an idle guest's.
 *
 * What is charged: frames with a page of the host's (emu_state_held(): the shared zero page among them, since a write
 * makes it a page without a fault), copies left aside, the store's pool.  Forced charges - a page coming back from aside
 * needs a copy for a moment, the pool grows so that more pages can go, pages are copied on their way aside where they can't
 * be moved - may go over max, by some tens of frames a running thread.
 *
 * Who waits kicks the region's own swap worker, if there is one, and sleeps until somebody gives back.  Nobody who waits
 * holds a BUSY frame or a lock (fault.c).  After the deadline the access fails with ENOMEM: what memcg would do by its
 * OOM killer.
 */
#define _GNU_SOURCE
#include "core.h"

#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x656d752d67617465u /* "emu-gate" */
#define STOCK 32
#define NAP_MS 20 /* at most, between two looks: a slot may be emptied by the host, who may die before it wakes us */

_Static_assert(sizeof(struct emu_gate_slot) == 64 && sizeof(struct emu_gate) == 64 * (EMU_GATE_SLOTS + 1), "a line a slot");

static int64_t load(const int64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static void add(int64_t *p, int64_t n)
{
	__atomic_fetch_add(p, n, __ATOMIC_SEQ_CST);
}

int emu_gate_init(struct emu_gate *g, int64_t max)
{
	if (max < 1 || (uintptr_t)g % 64)
		return -EINVAL;
	memset(g, 0, sizeof(*g));
	g->max = max;
	__atomic_store_n(&g->magic, MAGIC, __ATOMIC_RELEASE);
	return 0;
}

/* Between processes: not FUTEX_PRIVATE. */
static void gave_back(struct emu_gate *g)
{
	__atomic_fetch_add(&g->seq, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&g->waiters, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, &g->seq, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void emu_gate_set_max(struct emu_gate *g, int64_t max)
{
	__atomic_store_n(&g->max, max, __ATOMIC_SEQ_CST);
	gave_back(g);
}

int64_t emu_gate_charged(struct emu_gate *g)
{
	int64_t sum = 0, charged;

	for (int i = 0; i < EMU_GATE_SLOTS; i++) {
		charged = load(&g->slot[i].charged);
		sum += charged > 0 ? charged : 0; /* below: stock was taken from one that was released meanwhile */
	}
	return sum;
}

int64_t emu_gate_slot_read(struct emu_gate *g, int slot, struct emu_gate_slot *ret)
{
	if (slot < 0 || slot >= EMU_GATE_SLOTS)
		return -EINVAL;
	*ret = (struct emu_gate_slot){ .charged = load(&g->slot[slot].charged), .stock = load(&g->slot[slot].stock),
		.throttled = load(&g->slot[slot].throttled),
		.throttled_ns = load(&g->slot[slot].throttled_ns), .failed = load(&g->slot[slot].failed) };
	return 0;
}

int64_t emu_gate_release(struct emu_gate *g, int slot)
{
	int64_t had;

	if (slot < 0 || slot >= EMU_GATE_SLOTS)
		return -EINVAL;
	__atomic_store_n(&g->slot[slot].stock, 0, __ATOMIC_SEQ_CST);
	/* those of it that waited when they were killed */
	__atomic_fetch_sub(&g->waiters, (uint32_t)__atomic_exchange_n(&g->slot[slot].waiting, 0, __ATOMIC_SEQ_CST),
	                   __ATOMIC_SEQ_CST);
	had = __atomic_exchange_n(&g->slot[slot].charged, 0, __ATOMIC_SEQ_CST);
	gave_back(g);
	return had;
}

/* Add to the own slot if that stays within max. A charge that is in vain is seen by others for a moment, who look again. */
static bool take(struct emu_gate *g, int64_t *slot, int64_t frames, bool force)
{
	int64_t sum, peak = load(&g->peak);

	if (!force && emu_gate_charged(g) + frames > load(&g->max))
		return false;
	add(slot, frames);
	sum = emu_gate_charged(g);
	if (!force && sum > load(&g->max)) {
		add(slot, -frames);
		gave_back(g);
		return false;
	}
	while (sum > peak && !__atomic_compare_exchange_n(&g->peak, &peak, sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
	return true;
}

static bool from_stock(struct emu_gate_slot *slot, int64_t frames)
{
	int64_t stock = load(&slot->stock);

	while (stock >= frames)
		if (__atomic_compare_exchange_n(&slot->stock, &stock, stock - frames, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			return true;
	return false;
}

/*
 * Give back everybody's stock: somebody waits.  Whoever takes stock takes it from the slot's charge afterwards; if he is
 * killed in between, the slot says more than its process has, until that one ends.
 */
static void empty_stocks(struct emu_gate *g)
{
	bool any = false;

	for (int i = 0; i < EMU_GATE_SLOTS; i++) {
		const int64_t stock = load(&g->slot[i].stock) ? __atomic_exchange_n(&g->slot[i].stock, 0, __ATOMIC_SEQ_CST) : 0;

		if (stock)
			add(&g->slot[i].charged, -stock);
		any |= stock;
	}
	if (any)
		gave_back(g);
}

static bool try_charge(struct emu_gate *g, struct emu_gate_slot *slot, int64_t frames, bool force)
{
	if (from_stock(slot, frames))
		return true;
	if (!__atomic_load_n(&g->waiters, __ATOMIC_RELAXED) && take(g, &slot->charged, frames + STOCK, false)) {
		add(&slot->stock, STOCK);
		return true;
	}
	if (take(g, &slot->charged, frames, force))
		return true;
	empty_stocks(g);
	return take(g, &slot->charged, frames, force);
}

/* Wait until somebody gives back, or a while. A charge that fails and then finds no change since `seq` sleeps. */
static void nap(struct emu_gate *g, struct emu_gate_slot *slot, uint32_t seq)
{
	struct timespec most = { .tv_nsec = NAP_MS * 1000000 };

	__atomic_fetch_add(&g->waiters, 1, __ATOMIC_SEQ_CST);
	add(&slot->waiting, 1);
	syscall(SYS_futex, &g->seq, FUTEX_WAIT, seq, &most, NULL, 0);
	add(&slot->waiting, -1);
	__atomic_fetch_sub(&g->waiters, 1, __ATOMIC_SEQ_CST);
}

void emu_gate_parked(struct emu_region *r, uint64_t ns, bool in_vain)
{
	struct emu_gate *g = atomic_load_explicit(&r->gate, memory_order_acquire);
	struct emu_gate_slot *slot;

	if (!g)
		return;
	slot = &g->slot[r->gate_slot];
	add(&slot->throttled, 1);
	add(&slot->throttled_ns, (int64_t)ns);
	add(&slot->failed, in_vain);
	emu_stat_add(r, EMU_STAT_gate_throttled, 1);
	emu_stat_add(r, EMU_STAT_gate_failed, in_vain);
}

int emu_gate_charge_slow(struct emu_region *r, int64_t frames, int how)
{
	struct emu_gate *g = atomic_load_explicit(&r->gate, memory_order_acquire);
	struct emu_gate_slot *slot = &g->slot[r->gate_slot];
	uint64_t begun, deadline;
	int err = 0;

	if (try_charge(g, slot, frames, how == EMU_GATE_FORCE))
		return 0;
	if (how == EMU_GATE_TRY || emu_thread.impatient)
		return -ENOMEM;
	begun = emu_now_ns();
	deadline = begun + (uint64_t)r->gate_deadline_ms * 1000000;
	for (;;) {
		uint32_t seq = __atomic_load_n(&g->seq, __ATOMIC_SEQ_CST);

		if (try_charge(g, slot, frames, false))
			break;
		if (emu_now_ns() >= deadline || atomic_load(&r->closed)) {
			err = -ENOMEM;
			break;
		}
		emu_swapd_kick(r, (uint64_t)frames + 2 * STOCK);
		nap(g, slot, seq);
	}
	emu_gate_parked(r, emu_now_ns() - begun, err);
	return err;
}

void emu_gate_uncharge_slow(struct emu_region *r, int64_t frames)
{
	struct emu_gate *g = atomic_load_explicit(&r->gate, memory_order_acquire);
	struct emu_gate_slot *slot = &g->slot[r->gate_slot];
	int64_t stock = __atomic_add_fetch(&slot->stock, frames, __ATOMIC_SEQ_CST);

	/*
	 * What is more than twice the stock goes back; all of it, if somebody waits, or if forced charges have gone over max:
	 * kept, it would be used without another look at the sum, and over max would be the rule.
	 */
	while (stock > 0) {
		const bool all = __atomic_load_n(&g->waiters, __ATOMIC_SEQ_CST) || emu_gate_charged(g) > load(&g->max);
		const int64_t keep = all ? 0 : STOCK;

		if (!all && stock <= 2 * STOCK)
			return;

		if (__atomic_compare_exchange_n(&slot->stock, &stock, keep, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
			add(&slot->charged, keep - stock);
			gave_back(g);
			return;
		}
	}
}

/*
 * What the region has now is charged at once, over max if need be.  Before guests run: a frame that is installed between the
 * count and the gate's being there would never be charged.
 */
int emu_gate_attach(struct emu_region *r, struct emu_gate *g, int slot, int deadline_ms)
{
	int64_t stats[EMU_NR_STATS];
	int err;

	if (slot < 0 || slot >= EMU_GATE_SLOTS || deadline_ms < 0 || __atomic_load_n(&g->magic, __ATOMIC_ACQUIRE) != MAGIC)
		return -EINVAL;
	if (r->service == EMU_SERVICE_OFF)
		return -EOPNOTSUPP; /* pages come without a fault that we see */
	err = emu_region_enter(r);
	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	err = atomic_load(&r->gate) ? -EBUSY : emu_stats_read(r, stats);
	if (!err) {
		int64_t has = stats[EMU_STAT_nr_zeromap] + stats[EMU_STAT_nr_resident] + stats[EMU_STAT_nr_lazy] +
		              stats[EMU_STAT_nr_aside] + stats[EMU_STAT_aside_stale] + stats[EMU_STAT_pool_frames];

		r->gate_slot = slot;
		r->gate_deadline_ms = deadline_ms;
		add(&g->slot[slot].charged, has);
		atomic_store_explicit(&r->gate, g, memory_order_release);
	}
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

/* The region is closed: what it had goes back. */
void emu_gate_detach(struct emu_region *r)
{
	struct emu_gate *g = atomic_exchange(&r->gate, NULL);

	if (g)
		emu_gate_release(g, r->gate_slot);
}
