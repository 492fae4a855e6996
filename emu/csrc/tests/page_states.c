/* SPDX-License-Identifier: MIT */
/* What the guest's kernel says of its pages: each of the eleven things that keep one, and each place that says it. */
#define _GNU_SOURCE
#include "harness.h"
#include "memmap.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { FRAMES = 256 };
#define AT(first, n, index) (&(struct emu_range){ first, n, index }), 1

struct guest {
	struct rig *rig;
	struct emu_memmap *m;
	struct emu_space *s;
};

static bool boot(struct guest *g, unsigned how)
{
	g->rig = rig_open_nth(0, FRAMES, 0);
	if (!g->rig)
		return false;
	CHECK_EQ(emu_memmap_create(FRAMES, &g->m), 0);
	CHECK_EQ(emu_space_create(g->m, FRAMES, &g->s), 0);
	CHECK_EQ(emu_access_track(g->rig->r, 1), 0);
	CHECK_EQ(emu_page_states_on(g->rig->r, g->m, how), 0);
	return true;
}

static void halt(struct guest *g)
{
	uint32_t gone[FRAMES];
	int64_t n;

	while ((n = emu_page_states_off(g->m, gone, FRAMES)))
		for (int64_t i = 0; i < n; i++) {
			const uint32_t index = page_of(g->m, gone[i])->index;

			CHECK_EQ(emu_space_remove(g->m, g->s, index, index + 1, EMU_REMOVE_TRUNCATE, &(uint32_t){ 0 }, 1), 1);
			CHECK_EQ(emu_pages_release(g->m, AT(gone[i], 1, 0)), 0);
		}
	for (uint64_t gfn = 0; gfn < FRAMES; gfn++)
		CHECK_EQ(emu_byte_usage(emu_byte_load(g->rig->r, gfn)), EMU_STABLE);
	emu_memmap_destroy(g->m);
	rig_close(g->rig);
}

/* Pages [index, index + n) of the file, in the frames of the same numbers, as the kernel reads them. */
static void read_in(struct guest *g, uint32_t first, uint32_t n)
{
	CHECK_EQ(emu_pages_allocated(g->m, AT(first, n, 0)), 0);
	CHECK_EQ(rig_run(g->rig, EMU_FILL, first, n, 3, 1, NULL), 0);
	CHECK_EQ(emu_space_insert(g->m, g->s, AT(first, n, first), 0), 0);
}

static int usage(struct guest *g, uint32_t pfn)
{
	return emu_byte_usage(emu_byte_load(g->rig->r, pfn));
}

static int64_t moved(struct guest *g, int cause, int from, int to)
{
	struct emu_usage_counts counts;

	CHECK_EQ(emu_usage_counts(g->rig->r, &counts), 0);
	return counts.moved[cause][from][to];
}

static int64_t get(struct guest *g, uint64_t first, uint64_t count)
{
	struct emu_range runs[FRAMES];
	size_t n;

	return emu_space_lookup(g->m, g->s, first, count, EMU_LOOKUP_GET, runs, FRAMES, &n);
}

static void try(struct guest *g, uint32_t pfn)
{
	emu_states_begin(g->m);
	emu_page_make_volatile(g->m, pfn, EMU_CAUSE_OTHER);
	emu_states_end(g->m);
}

/* With each of them a page stays stable; without, it becomes volatile. */
static int the_eleven_conditions(void)
{
	static const uint32_t flags[] = { PG_RESERVED, EMU_PG_DIRTY, EMU_PG_WRITEBACK, EMU_PG_LOCKED, PG_SWAPBACKED,
		                          PG_NOT_UPTODATE, PG_PRIVATE, EMU_PG_DISCARDED };
	struct guest g;
	struct emu_page *p;

	if (!boot(&g, 0))
		return SKIPPED;
	read_in(&g, 10, 1);
	p = page_of(g.m, 10);
	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]) + 3; i++) {
		const struct emu_page before = *p;

		CHECK_EQ(usage(&g, 10), EMU_VOLATILE);
		emu_states_begin(g.m);
		CHECK(emu_page_make_stable(g.m, 10, EMU_CAUSE_OTHER));
		emu_states_end(g.m);
		if (i < sizeof(flags) / sizeof(flags[0]))
			p->flags |= flags[i];
		else if (i == sizeof(flags) / sizeof(flags[0]))
			p->space = NO_SPACE;
		else if (i == sizeof(flags) / sizeof(flags[0]) + 1)
			p->flags &= ~PG_LRU;
		else
			p->pins++;
		try(&g, 10);
		CHECK_EQ(usage(&g, 10), EMU_STABLE);
		*p = before;
		try(&g, 10);
	}
	g.s->mlocked = 1; /* and a file that was ever locked in memory */
	CHECK_EQ(get(&g, 10, 1), 1);
	CHECK_EQ(emu_pages_put(g.m, AT(10, 1, 0)), 0);
	CHECK_EQ(usage(&g, 10), EMU_STABLE);
	halt(&g);
	return 0;
}

/* Where a page becomes volatile, and stable: each by its own cause. */
static int where_it_is_said(void)
{
	struct guest g;
	struct emu_shrink shrink = { .nr_to_scan = 4 };

	if (!boot(&g, 0))
		return SKIPPED;
	CHECK_EQ(moved(&g, EMU_CAUSE_OTHER, EMU_STABLE, EMU_UNUSED), FRAMES);
	read_in(&g, 20, 8);
	CHECK_EQ(moved(&g, EMU_CAUSE_ALLOC, EMU_UNUSED, EMU_STABLE), 8);
	CHECK_EQ(moved(&g, EMU_CAUSE_READ, EMU_STABLE, EMU_VOLATILE), 8);
	CHECK_EQ(get(&g, 20, 3), 3);
	CHECK_EQ(moved(&g, EMU_CAUSE_LOOKUP, EMU_VOLATILE, EMU_STABLE), 3);
	CHECK_EQ(get(&g, 20, 1), 1); /* a second reference */
	CHECK_EQ(emu_pages_put(g.m, AT(20, 3, 0)), 0);
	CHECK_EQ(usage(&g, 20), EMU_STABLE);
	CHECK_EQ(moved(&g, EMU_CAUSE_PUT, EMU_STABLE, EMU_VOLATILE), 2);
	CHECK_EQ(emu_space_flag(g.m, g.s, 20, 21, EMU_PG_DIRTY, 0), 1);
	CHECK_EQ(emu_pages_put(g.m, AT(20, 1, 0)), 0);
	CHECK_EQ(emu_pages_put(g.m, AT(20, 1, 0)), -EINVAL);
	CHECK_EQ(usage(&g, 20), EMU_STABLE);
	CHECK_EQ(emu_space_flag(g.m, g.s, 20, 21, EMU_PG_WRITEBACK, EMU_PG_DIRTY), 1);
	CHECK_EQ(usage(&g, 20), EMU_STABLE);
	CHECK_EQ(emu_space_flag(g.m, g.s, 20, 21, 0, EMU_PG_WRITEBACK), 1);
	CHECK_EQ(usage(&g, 20), EMU_VOLATILE);
	CHECK_EQ(moved(&g, EMU_CAUSE_WRITEBACK, EMU_STABLE, EMU_VOLATILE), 1);
	/* mapped for writing: potentially volatile, until nobody can write it any more */
	CHECK_EQ(get(&g, 21, 1), 1);
	CHECK_EQ(emu_pages_map(g.m, AT(21, 1, 0), 1, 1), 0);
	CHECK_EQ(emu_pages_writable(g.m, AT(21, 1, 0)), 0);
	CHECK_EQ(emu_pages_put(g.m, AT(21, 1, 0)), 0);
	CHECK_EQ(usage(&g, 21), EMU_POTENTIAL);
	CHECK_EQ(emu_pages_map(g.m, AT(21, 1, 0), -1, 0), 0);
	CHECK_EQ(usage(&g, 21), EMU_VOLATILE);
	CHECK_EQ(moved(&g, EMU_CAUSE_UNMAP, EMU_POTENTIAL, EMU_VOLATILE), 1);
	/* sinks */
	for (int i = 0; i < 2; i++) {
		emu_lru_accessed(g.m, 22);
		emu_lru_accessed(g.m, 22);
	}
	CHECK(has(page_of(g.m, 22), EMU_PG_ACTIVE));
	CHECK_EQ(emu_usage_set_frames(g.rig->r, (uint32_t[]){ 22 }, 1, EMU_STABLE, EMU_CAUSE_OTHER, NULL, 0, &(size_t){ 0 }), 1);
	CHECK_EQ(emu_lru_shrink(g.m, EMU_LRU_ACTIVE_FILE, &shrink), 0);
	CHECK_EQ(moved(&g, EMU_CAUSE_SINK, EMU_STABLE, EMU_VOLATILE), 1);
	/* freed */
	CHECK_EQ(emu_space_remove(g.m, g.s, 23, 24, EMU_REMOVE_TRUNCATE, &(uint32_t){ 0 }, 1), 1);
	CHECK_EQ(emu_pages_release(g.m, AT(23, 1, 0)), 0);
	CHECK_EQ(usage(&g, 23), EMU_UNUSED);
	CHECK_EQ(moved(&g, EMU_CAUSE_FREE, EMU_VOLATILE, EMU_UNUSED), 1);
	halt(&g);
	return 0;
}

/* What the host has taken is found when a reference is taken, and nobody gets it. */
static int a_page_that_is_gone(void)
{
	struct guest g;
	uint32_t gone[4];

	if (!boot(&g, 0))
		return SKIPPED;
	read_in(&g, 30, 8);
	CHECK_EQ(emu_steal(g.rig->r, AT(33, 2, 0), EMU_VOLATILE), 2);
	CHECK_EQ(get(&g, 30, 8), 3 | EMU_LOOKUP_GONE);
	CHECK(has(page_of(g.m, 33), EMU_PG_DISCARDED));
	CHECK_EQ(get(&g, 33, 1), EMU_LOOKUP_GONE); /* until it is out of the cache */
	CHECK_EQ(page_of(g.m, 33)->pins, 0);
	CHECK_EQ(emu_pages_put(g.m, AT(30, 3, 0)), 0);
	/* until they are out of the cache each use of them is told, also while it ends, however often that is interrupted */
	for (int i = 0; i < 2; i++) {
		uint64_t bad;

		CHECK_EQ(emu_page_states_off(g.m, gone, 4), 2);
		CHECK_EQ(gone[0], 33);
		CHECK_EQ(gone[1], 34);
		CHECK(has(page_of(g.m, 34), EMU_PG_DISCARDED));
		CHECK_EQ(rig_run(g.rig, EMU_TOUCH_READ, 34, 1, 0, 1, &bad), -ENODATA);
		CHECK_EQ(usage(&g, 34), EMU_VOLATILE);
	}
	halt(&g);
	return 0;
}

/* The forms: what each leaves out. */
static int forms(void)
{
	struct guest g;

	if (!boot(&g, EMU_STATES_LIGHT))
		return SKIPPED;
	read_in(&g, 40, 1);
	CHECK_EQ(usage(&g, 40), EMU_STABLE);
	CHECK_EQ(usage(&g, 41), EMU_UNUSED);
	halt(&g);
	CHECK(boot(&g, EMU_STATES_PER_MAPPING | EMU_STATES_BUFFERS | EMU_STATES_MINOR));
	read_in(&g, 40, 3);
	CHECK_EQ(get(&g, 40, 1), 1);
	CHECK_EQ(emu_pages_map(g.m, AT(40, 2, 0), 1, 1), 0);
	CHECK_EQ(emu_pages_writable(g.m, AT(40, 1, 0)), 0);
	CHECK_EQ(emu_pages_put(g.m, AT(40, 1, 0)), 0);
	CHECK_EQ(usage(&g, 40), EMU_STABLE);
	CHECK_EQ(emu_usage_set_frames(g.rig->r, (uint32_t[]){ 41 }, 1, EMU_STABLE, EMU_CAUSE_OTHER, NULL, 0, &(size_t){ 0 }), 1);
	CHECK_EQ(emu_pages_map(g.m, AT(40, 2, 0), -1, 0), 0);
	CHECK_EQ(usage(&g, 40), EMU_VOLATILE); /* its last writable entry is gone */
	CHECK_EQ(usage(&g, 41), EMU_STABLE);   /* a minor fault's end says nothing */
	CHECK_EQ(emu_space_flag(g.m, g.s, 42, 43, EMU_PG_DIRTY, 0), 1);
	CHECK_EQ(emu_space_flag(g.m, g.s, 42, 43, EMU_PG_WRITEBACK, EMU_PG_DIRTY), 1);
	CHECK_EQ(emu_space_flag(g.m, g.s, 42, 43, 0, EMU_PG_WRITEBACK), 1);
	CHECK_EQ(usage(&g, 42), EMU_STABLE); /* it has private data */
	halt(&g);
	return 0;
}

/* Pages in a row are said of eight at a time: the same states, the same counts, and nothing is left stable unheld. */
static int in_a_row(void)
{
	struct emu_range runs[8];
	struct guest g;
	size_t n;

	if (!boot(&g, 0))
		return SKIPPED;
	read_in(&g, 45, 30);
	CHECK_EQ(moved(&g, EMU_CAUSE_READ, EMU_STABLE, EMU_VOLATILE), 30);
	CHECK_EQ(get(&g, 46, 29), 29);
	for (uint32_t pfn = 46; pfn < 75; pfn++)
		CHECK_EQ(usage(&g, pfn), EMU_STABLE);
	CHECK_EQ(moved(&g, EMU_CAUSE_LOOKUP, EMU_VOLATILE, EMU_STABLE), 29);
	CHECK_EQ(get(&g, 60, 1), 1); /* a second reference: that page stays */
	CHECK_EQ(emu_pages_put(g.m, AT(46, 29, 0)), 0);
	for (uint32_t pfn = 45; pfn < 75; pfn++)
		CHECK_EQ(usage(&g, pfn), pfn == 60 ? EMU_STABLE : EMU_VOLATILE);
	CHECK_EQ(moved(&g, EMU_CAUSE_PUT, EMU_STABLE, EMU_VOLATILE), 28);
	CHECK_EQ(emu_pages_put(g.m, AT(60, 1, 0)), 0);
	/* readahead's mark ends a lookup in the middle of eight */
	CHECK_EQ(emu_space_flag(g.m, g.s, 50, 51, EMU_PG_READAHEAD, 0), 1);
	CHECK_EQ(emu_space_lookup(g.m, g.s, 48, 20, EMU_LOOKUP_GET | EMU_LOOKUP_READAHEAD, runs, 8, &n), 3 | EMU_LOOKUP_MARKER);
	for (uint32_t pfn = 48; pfn < 68; pfn++)
		CHECK_EQ(usage(&g, pfn), pfn <= 50 ? EMU_STABLE : EMU_VOLATILE);
	CHECK_EQ(emu_pages_put(g.m, AT(48, 3, 0)), 0);
	/* and so does the end of the room for runs, before a page that lies elsewhere */
	read_in(&g, 80, 1);
	CHECK_EQ(emu_space_remove(g.m, g.s, 75, 81, EMU_REMOVE_TRUNCATE, &(uint32_t){ 0 }, 1), 1);
	CHECK_EQ(emu_space_insert(g.m, g.s, AT(80, 1, 75), 0), 0);
	CHECK_EQ(emu_space_lookup(g.m, g.s, 72, 4, EMU_LOOKUP_GET, runs, 1, &n), 3);
	CHECK_EQ(usage(&g, 80), EMU_VOLATILE);
	CHECK_EQ(emu_pages_put(g.m, AT(72, 3, 0)), 0);
	halt(&g);
	return 0;
}

/* A page has so many references and no more: one too many is refused, and nothing wraps. */
static int too_many_references(void)
{
	struct emu_range run;
	struct guest g;
	size_t n;

	if (!boot(&g, 0))
		return SKIPPED;
	read_in(&g, 30, 2);
	for (int i = 0; i < UINT16_MAX; i++)
		CHECK_EQ(get(&g, 31, 1), 1);
	CHECK_EQ(get(&g, 31, 1), -EOVERFLOW);
	CHECK_EQ(emu_pages_mlock(g.m, AT(31, 1, 0)), -EOVERFLOW);
	CHECK_EQ(emu_space_lookup(g.m, g.s, 30, 2, EMU_LOOKUP_GET, &run, 1, &n), 1); /* what is before it can be had */
	CHECK_EQ(emu_pages_put(g.m, &run, n), 0);
	CHECK_EQ(page_of(g.m, 31)->pins, UINT16_MAX);
	for (int i = 0; i < UINT16_MAX; i++)
		CHECK_EQ(emu_pages_put(g.m, AT(31, 1, 0)), 0);
	CHECK_EQ(usage(&g, 31), EMU_VOLATILE);
	halt(&g);
	return 0;
}

/* ---- a race made on purpose: the host steals between a lookup and the use of what it found */

struct race {
	struct guest g;
	_Atomic int stop;
	_Atomic uint64_t turns;
};

static uint64_t next(uint64_t *rng)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return *rng;
}

static void *host(void *arg)
{
	struct race *race = arg;
	uint64_t rng = 5;

	while (!atomic_load(&race->stop)) {
		CHECK(emu_steal_some(race->g.rig->r, 1 + next(&rng) % 6, 1u << EMU_VOLATILE | 1u << EMU_UNUSED,
		                     (int)(next(&rng) % 3), next(&rng)) >= 0);
		/* every few lookups, at any moment of one: without a pause next to nothing would ever be found */
		for (uint64_t until = atomic_load(&race->turns) + next(&rng) % 24, i = next(&rng) % 4000;
		     (atomic_load(&race->turns) < until || i--) && !atomic_load(&race->stop);)
			;
	}
	return NULL;
}

/* Page `index` is gone: out of the cache, and read from the disk again. */
static void again(struct guest *g, uint32_t index)
{
	CHECK_EQ(emu_space_remove(g->m, g->s, index, index + 1, EMU_REMOVE_TRUNCATE, &(uint32_t){ 0 }, 1), 1);
	CHECK_EQ(emu_pages_release(g->m, AT(index, 1, 0)), 0);
	read_in(g, index, 1);
}

static int a_lookup_against_a_host_that_steals(void)
{
	const char *seconds = getenv("STORM");
	const uint64_t len = (uint64_t)((seconds ? atof(seconds) : 0.5) * 1e9);
	uint64_t rng = 9, read = 0, gone = 0, told = 0, started;
	struct race race = { 0 };
	struct guest *g = &race.g;
	pthread_t thread;

	if (!boot(g, 0))
		return SKIPPED;
	read_in(g, 0, FRAMES);
	CHECK_EQ(pthread_create(&thread, NULL, host, &race), 0);
	started = emu_now_ns();
	while (emu_now_ns() - started < len || ((!gone || !told) && emu_now_ns() - started < 20000000000u)) {
		const uint32_t first = (uint32_t)(next(&rng) % FRAMES), count = 1 + (uint32_t)(next(&rng) % 40);
		const bool get = next(&rng) % 4;
		struct emu_range runs[64];
		uint64_t bad;
		size_t n;
		int64_t k = emu_space_lookup(g->m, g->s, first, count, get ? EMU_LOOKUP_GET : 0, runs, 64, &n);
		const uint32_t found = (uint32_t)(k & 0xffff);

		atomic_fetch_add(&race.turns, 1);
		for (size_t i = 0; i < n; i++) {
			const int err = rig_run(g->rig, EMU_VERIFY, runs[i].gfn, runs[i].count, 3, 1, &bad);

			if (!err) {
				CHECK_EQ(bad, 0);
				read += runs[i].count;
				continue;
			}
			CHECK(!get && err == -ENODATA); /* a minor fault's way: told when it is used, and never by zeros */
			told++;
			again(g, (uint32_t)bad);
			break;
		}
		if (get)
			CHECK_EQ(emu_pages_put(g->m, runs, n), 0);
		if (k & EMU_LOOKUP_GONE) {
			gone++;
			again(g, first + found);
		}
	}
	atomic_store(&race.stop, 1);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	fprintf(stderr, "  %llu pages read after a lookup; %llu found gone by it, %llu by their use\n",
	        (unsigned long long)read, (unsigned long long)gone, (unsigned long long)told);
	CHECK(read && gone && told);
	rig_check_books(g->rig);
	halt(g);
	return 0;
}

const struct test page_states_tests[] = {
	{ "page states: the eleven conditions", the_eleven_conditions },
	{ "page states: where it is said", where_it_is_said },
	{ "page states: a page that is gone", a_page_that_is_gone },
	{ "page states: forms", forms },
	{ "page states: in a row", in_a_row },
	{ "page states: too many references", too_many_references },
	{ "page states: a lookup against a host that steals", a_lookup_against_a_host_that_steals },
	{ NULL, NULL },
};
