/* SPDX-License-Identifier: MIT */
/*
 * stats.c - counters, named as vmstat would, and latency histograms.
 *
 * A counter is kept in stripes, one picked by each thread, and summed when read: vCPUs that fault at once don't
 * share a cache line.  Reading is not a snapshot across counters (no counter here is worth stopping the guest for),
 * but with no call under way the sums are exact.  Gauges (frames by state) are kept by the same adds, so no tick
 * ever walks the states.
 */
#include "core.h"

#include <string.h>
#include <time.h>

_Thread_local struct emu_thread emu_thread __attribute__((tls_model("initial-exec")));
static _Atomic unsigned next_stripe;

static const char *const names[EMU_NR_STATS] = {
#define X(name) #name,
	EMU_STATS(X)
#undef X
};

static unsigned stripe(void)
{
	if (!emu_thread.stripe)
		emu_thread.stripe = 1 + atomic_fetch_add_explicit(&next_stripe, 1, memory_order_relaxed) % EMU_STRIPES;
	return emu_thread.stripe - 1;
}

/* Async-signal-safe: a lock-free add, and at a thread's first call one more. */
void emu_stat_add(struct emu_region *r, enum emu_stat which, int64_t n)
{
	atomic_fetch_add_explicit(&r->stripe[stripe()].n[which], n, memory_order_relaxed);
}

int emu_stats_count(void)
{
	return EMU_NR_STATS;
}

const char *emu_stats_name(int i)
{
	return i >= 0 && i < EMU_NR_STATS ? names[i] : NULL;
}

int emu_stats_read(struct emu_region *r, int64_t *ret)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	memset(ret, 0, sizeof(*ret) * EMU_NR_STATS);
	for (int s = 0; s < EMU_STRIPES; s++)
		for (int i = 0; i < EMU_NR_STATS; i++)
			ret[i] += atomic_load_explicit(&r->stripe[s].n[i], memory_order_relaxed);
	/* what others say already costs no add of its own at each fault */
	ret[EMU_STAT_pgfault] = ret[EMU_STAT_pgfault_write] + ret[EMU_STAT_pgfault_read];
	ret[EMU_STAT_nr_zero] = (int64_t)r->frames;
	for (int i = EMU_STAT_nr_zero + 1; i < EMU_STAT_nr_zero + EMU_NR_STATES; i++)
		ret[EMU_STAT_nr_zero] -= ret[i];
	emu_region_leave(r);
	return 0;
}

uint64_t emu_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Buckets 0..7 are 0..7 ns; above, the three bits under the leading one choose among 8 buckets of an octave. */
static int hist_bucket(uint64_t ns)
{
	int lead, bucket;

	if (ns < 8)
		return (int)ns;
	lead = 63 - __builtin_clzll(ns);
	bucket = (lead - 2) * 8 + (int)((ns >> (lead - 3)) & 7);
	return bucket < EMU_HIST_BUCKETS ? bucket : EMU_HIST_BUCKETS - 1;
}

uint64_t emu_hist_floor(int bucket)
{
	if (bucket < 8)
		return bucket < 0 ? 0 : (uint64_t)bucket;
	return (8 + ((uint64_t)bucket & 7)) << (bucket / 8 - 1);
}

void emu_hist_add(struct emu_hist *h, uint64_t ns)
{
	h->count++;
	h->sum += ns;
	if (ns > h->max)
		h->max = ns;
	h->bucket[hist_bucket(ns)]++;
}

void emu_hist_merge(struct emu_hist *into, const struct emu_hist *from)
{
	into->count += from->count;
	into->sum += from->sum;
	if (from->max > into->max)
		into->max = from->max;
	for (int i = 0; i < EMU_HIST_BUCKETS; i++)
		into->bucket[i] += from->bucket[i];
}

/*
 * How long faults took, from before the access to after it, in the thread that faulted: kernel, signal or message,
 * resolver, and the way back.  Taken by the access (guestaccess.h) where the frame's byte says that a fault will come, of each thread's
 * first fault and every eighth after it: two readings of the clock and four adds would be 2 % of an inline fault.
 */
size_t emu_latencies_bytes(void)
{
	return sizeof(struct emu_latencies) * EMU_STRIPES * EMU_NR_LATENCIES;
}

void emu_latency_add(struct emu_region *r, enum emu_latency which, uint64_t ns)
{
	struct emu_latencies *l = &r->latencies[stripe() * EMU_NR_LATENCIES + which];
	uint64_t max = atomic_load_explicit(&l->max, memory_order_relaxed);

	atomic_fetch_add_explicit(&l->count, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&l->sum, ns, memory_order_relaxed);
	atomic_fetch_add_explicit(&l->bucket[hist_bucket(ns)], 1, memory_order_relaxed);
	while (ns > max &&
	       !atomic_compare_exchange_weak_explicit(&l->max, &max, ns, memory_order_relaxed, memory_order_relaxed))
		;
}

int emu_latency_read(struct emu_region *r, int which, struct emu_hist *ret)
{
	int err = which >= 0 && which < EMU_NR_LATENCIES ? emu_region_enter(r) : -EINVAL;

	if (err)
		return err;
	*ret = (struct emu_hist){ 0 };
	for (int s = 0; s < EMU_STRIPES; s++) {
		struct emu_latencies *l = &r->latencies[s * EMU_NR_LATENCIES + which];
		uint64_t max = atomic_load_explicit(&l->max, memory_order_relaxed);

		/* a stripe that nobody used has no pages: one look, and no more */
		if (!atomic_load_explicit(&l->count, memory_order_relaxed))
			continue;
		ret->sum += atomic_load_explicit(&l->sum, memory_order_relaxed);
		if (max > ret->max)
			ret->max = max;
		for (int i = 0; i < EMU_HIST_BUCKETS; i++) {
			uint64_t n = atomic_load_explicit(&l->bucket[i], memory_order_relaxed);

			ret->bucket[i] += n;
			ret->count += n; /* the buckets' sum, so that percentiles add up while faults go on */
		}
	}
	emu_region_leave(r);
	return 0;
}
