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

/* Async-signal-safe: a lock-free add, and at a thread's first call one more. */
void emu_stat_add(struct emu_region *r, enum emu_stat which, int64_t n)
{
	if (!emu_thread.stripe)
		emu_thread.stripe = 1 + atomic_fetch_add_explicit(&next_stripe, 1, memory_order_relaxed) % EMU_STRIPES;
	atomic_fetch_add_explicit(&r->stripe[emu_thread.stripe - 1].n[which], n, memory_order_relaxed);
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
	ret[EMU_STAT_nr_zero] += (int64_t)r->frames; /* every frame starts there */
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
