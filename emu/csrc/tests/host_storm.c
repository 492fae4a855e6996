/* SPDX-License-Identifier: MIT */
/*
 * A guest that runs, and a host that takes its memory as it likes: no wrong byte, no lost increment.
 *
 * Writers fill and verify frames of their own, give some back, free some lazily; counters increment a word in each of
 * their pages by plain loads and stores, without any call of the core; readers verify what is never written.  Meanwhile
 * takers set all of these frames aside, swap them out, bring them back, sweep, harvest bits, age and collapse pages.
 * One move in eight is made to miscount, as the kernel's sometimes do (move.c).
 */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { OWN = 384, WRITERS = 4, COUNTERS = 2, READ_ONLY = 512, FRAMES = (WRITERS + COUNTERS) * OWN + READ_ONLY };

struct storm {
	struct rig *rig;
	_Atomic int stop;
	_Atomic uint64_t rounds;
	bool huge;
	int clear_refs;
};
struct actor {
	struct storm *storm;
	int id;
	uint64_t rng;
};

static uint64_t next(struct actor *a)
{
	a->rng ^= a->rng << 13;
	a->rng ^= a->rng >> 7;
	a->rng ^= a->rng << 17;
	return a->rng;
}

static _Atomic uint32_t moves;
static _Atomic int64_t hidden; /* pages moved and not counted, by our doing */

/* Some pages are moved and counted, further ones moved only; the rest is the caller's next call. */
static int miscounting(int fd, unsigned long request, void *arg)
{
	struct uffdio_move *move = arg, part;
	uint64_t first;
	uint32_t nth;

	if (request != UFFDIO_MOVE || (nth = atomic_fetch_add(&moves, 1)) % 8)
		return ioctl(fd, request, arg);
	first = nth / 8 % 4 * EMU_FRAME_SIZE;
	if (move->len <= first)
		return ioctl(fd, request, arg);
	part = *move;
	part.len = first;
	part.move = 0;
	if (first && ioctl(fd, UFFDIO_MOVE, &part)) {
		move->move = part.move;
		return -1;
	}
	part.dst += first;
	part.src += first;
	part.len = move->len - first < 64 * EMU_FRAME_SIZE ? move->len - first : 64 * EMU_FRAME_SIZE;
	part.move = 0;
	if (ioctl(fd, UFFDIO_MOVE, &part) && part.move <= 0) {
		move->move = first ? (int64_t)first : part.move;
		if (first)
			errno = EAGAIN;
		return -1;
	}
	atomic_fetch_add(&hidden, part.move >> EMU_FRAME_SHIFT);
	move->move = first ? (int64_t)first : -EEXIST;
	errno = first ? EAGAIN : EEXIST;
	return -1;
}

static void *writer(void *arg)
{
	struct actor *a = arg;
	struct rig *rig = a->storm->rig;
	const uint64_t base = (uint64_t)a->id * OWN;

	for (uint64_t round = 1; !atomic_load(&a->storm->stop); round++) {
		const uint64_t at = next(a) % OWN, n = 1 + next(a) % (OWN - at);
		const struct emu_range range = { base + at, n, 0 };
		uint64_t bad, page[512];
		struct emu_progress p;

		if (next(a) % 2) {
			CHECK_EQ(rig_run(rig, EMU_FILL, base, OWN, round, 1, NULL), 0);
		} else {
			for (uint64_t k = 0; k < OWN; k++) {
				emu_content_words(round, base + k, page);
				CHECK_EQ(emu_guest_write(rig->r, (base + k) << 12, page, sizeof(page), &p), 0);
			}
		}
		for (int again = 0; again < 2; again++) {
			CHECK_EQ(rig_run(rig, EMU_VERIFY, base, OWN, round, 1, &bad), 0);
			CHECK_EQ(bad, 0);
		}
		if (next(a) % 2) {
			CHECK(emu_discard(rig->r, &range, 1) >= 0);
			CHECK_EQ(emu_guest_read(rig->r, range.gfn << 12, page, sizeof(page), &p), 0);
			for (int i = 0; i < 512; i++)
				CHECK_EQ(page[i], 0);
		} else {
			CHECK(emu_lazy_free(rig->r, &range, 1) >= 0);
		}
		if (at) {
			CHECK_EQ(rig_run(rig, EMU_VERIFY, base, at, round, 1, &bad), 0);
			CHECK_EQ(bad, 0);
		}
		atomic_fetch_add(&a->storm->rounds, 1);
	}
	return NULL;
}

EMU_GUEST_BYTES static void increment(struct emu_region *r, uint64_t gfn)
{
	volatile uint64_t *word = (volatile uint64_t *)(void *)(emu_frame(r, gfn) + 64);

	*word = *word + 1;
}

EMU_GUEST_BYTES static uint64_t read_word(struct emu_region *r, uint64_t gfn)
{
	return *(volatile uint64_t *)(void *)(emu_frame(r, gfn) + 64);
}

static void *counter(void *arg)
{
	struct actor *a = arg;
	struct rig *rig = a->storm->rig;
	const uint64_t base = (uint64_t)a->id * OWN;
	uint64_t count[OWN] = { 0 };

	/* a page of its own from the start: a raw write to the shared zero page isn't in the books */
	CHECK_EQ(rig_run(rig, EMU_SET, base, OWN, 0, 1, NULL), 0);
	while (!atomic_load(&a->storm->stop)) {
		const uint64_t at = next(a) % OWN;

		for (uint64_t k = 0; k < 64; k++) {
			const uint64_t i = (at + k) % OWN;

			increment(rig->r, base + i);
			count[i]++;
		}
	}
	for (uint64_t i = 0; i < OWN; i++)
		CHECK_EQ(read_word(rig->r, base + i), count[i]);
	return NULL;
}

static void *reader(void *arg)
{
	struct actor *a = arg;
	const uint64_t base = (WRITERS + COUNTERS) * OWN;
	uint64_t bad;

	while (!atomic_load(&a->storm->stop)) {
		const uint64_t at = next(a) % READ_ONLY, n = 1 + next(a) % (READ_ONLY - at);

		CHECK_EQ(rig_run(a->storm->rig, EMU_VERIFY, base + at, n, 99, 1, &bad), 0);
		CHECK_EQ(bad, 0);
	}
	return NULL;
}

static void *taker(void *arg)
{
	struct actor *a = arg;
	struct emu_region *r = a->storm->rig->r;
	uint8_t bits[FRAMES];
	uint64_t ages[256];

	while (!atomic_load(&a->storm->stop)) {
		struct emu_range ranges[8];
		size_t n = 1 + next(a) % 8;

		for (size_t i = 0; i < n; i++) {
			ranges[i].gfn = next(a) % FRAMES;
			ranges[i].count = 1 + next(a) % (FRAMES - ranges[i].gfn);
			if (next(a) % 4 && ranges[i].count > 40)
				ranges[i].count = 40;
		}
		switch (next(a) % 10) {
		case 0: case 1: case 2:
			CHECK(emu_set_aside(r, ranges, n, (int)(next(a) % 100)) >= 0);
			break;
		case 3: case 4: case 5:
			CHECK(emu_swap_out(r, ranges, n) >= 0);
			break;
		case 6:
			CHECK(emu_bring_back(r, ranges, n, -1) >= 0);
			break;
		case 7:
			CHECK(emu_swap_back(r, ranges, n) >= 0);
			break;
		case 8:
			CHECK_EQ(emu_aside_sweep(r), 0);
			CHECK_EQ(emu_swapd_kick(r, next(a) % 500), 0);
			break;
		default:
			if (next(a) % 2)
				CHECK_EQ(emu_access_scan(r, ages), 0);
			else
				CHECK_EQ(emu_access_harvest(r, 0, FRAMES, (int)(next(a) % 4), bits), 0);
			/* the kernel ages pages: a move that meets one in the middle miscounts (move.c) */
			if (next(a) % 2)
				CHECK_EQ(pwrite(a->storm->clear_refs, "1", 1, 0), 1);
			if (a->storm->huge) /* refused for a block with a hole, mostly */
				madvise(emu_frame(r, next(a) % FRAMES / 512 * 512), 2 << 20, MADV_COLLAPSE);
			break;
		}
	}
	return NULL;
}

static int storm(int service, uint32_t disable, bool gated)
{
	void *(*const bodies[])(void *) = { writer, writer, writer, writer, counter, counter, reader, reader, taker, taker };
	enum { N = sizeof(bodies) / sizeof(bodies[0]) };
	const char *seconds = getenv("STORM");
	const double len = seconds ? atof(seconds) : 0.6;
	int (*real)(int, unsigned long, void *) = emu_uffd_ioctl;
	struct storm s = { .huge = disable & RIG_HUGE };
	struct emu_gate *gate;
	struct actor actors[N];
	pthread_t threads[N];
	uint64_t bad;
	int fd;

	atomic_store(&hidden, 0);
	emu_uffd_ioctl = miscounting;
	s.rig = rig_open(FRAMES, service, 1, disable);
	if (!s.rig) {
		emu_uffd_ioctl = real;
		return SKIPPED;
	}
	gate = aligned_alloc(64, sizeof(*gate));
	fd = memfd_create("emu-storm", MFD_CLOEXEC);
	s.clear_refs = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
	CHECK(s.clear_refs >= 0);
	rig_lend_side(s.rig);
	rig_swap_on(s.rig, 4 << 20, fd, 64 << 20);
	CHECK_EQ(emu_access_track(s.rig->r, 1), 0);
	CHECK_EQ(emu_swapd_start(s.rig->r), 0);
	CHECK_EQ(emu_gate_init(gate, gated ? FRAMES * 2 / 3 + 1024 : INT64_MAX / 2), 0);
	CHECK_EQ(emu_gate_attach(s.rig->r, gate, 0, 60000), 0);
	CHECK_EQ(rig_run(s.rig, EMU_FILL, (WRITERS + COUNTERS) * OWN, READ_ONLY, 99, 1, NULL), 0);
	for (int i = 0; i < N; i++) {
		actors[i] = (struct actor){ &s, i, 0x9e3779b97f4a7c15u * (uint64_t)(i + 1) };
		CHECK_EQ(pthread_create(&threads[i], NULL, bodies[i], &actors[i]), 0);
	}
	nanosleep(&(struct timespec){ (time_t)len, (long)((len - (double)(time_t)len) * 1e9) }, NULL);
	atomic_store(&s.stop, 1);
	for (int i = 0; i < N; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK(atomic_load(&s.rounds) > 0);
	CHECK(rig_stat(s.rig, "aside_return") > 0 && rig_stat(s.rig, "swap_in_frames") > 0);
	fprintf(stderr, "  %llu rounds of a writer, %lld frames back from aside, %lld from the store, moved unsaid: %lld, "
	        "%lld of them by the kernel itself\n", (unsigned long long)atomic_load(&s.rounds),
	        (long long)rig_stat(s.rig, "aside_return"), (long long)rig_stat(s.rig, "swap_in_frames"),
	        (long long)rig_stat(s.rig, "uffd_miscounted"),
	        (long long)(rig_stat(s.rig, "uffd_miscounted") - atomic_load(&hidden)));
	CHECK(rig_stat(s.rig, "uffd_miscounted") >= atomic_load(&hidden));
	CHECK((atomic_load(&hidden) > 0) == !(disable & EMU_NO_MOVE));
	CHECK_EQ(rig_stat(s.rig, "swap_corrupt"), 0);
	CHECK_EQ(emu_swapd_drain(s.rig->r), 0);
	rig_check_books(s.rig);
	CHECK_EQ(rig_run(s.rig, EMU_VERIFY, (WRITERS + COUNTERS) * OWN, READ_ONLY, 99, 1, &bad), 0);
	CHECK_EQ(bad, 0);
	if (gated)
		CHECK(gate->peak <= gate->max + EMU_STALE_RING + 16 * 64);
	CHECK(emu_discard(s.rig->r, &(struct emu_range){ 0, FRAMES, 0 }, 1) >= 0);
	CHECK_EQ(emu_aside_sweep(s.rig->r), 0);
	CHECK_EQ(rig_rss(s.rig), 0);
	rig_check_books(s.rig);
	rig_close(s.rig);
	emu_uffd_ioctl = real;
	CHECK_EQ(emu_gate_charged(gate), 0);
	free(gate);
	close(fd);
	close(s.clear_refs);
	return 0;
}

static int move_inline(void)
{
	return storm(EMU_SERVICE_INLINE, 0, false);
}
static int move_thread(void)
{
	return storm(EMU_SERVICE_THREAD, 0, false);
}
static int wp_inline(void)
{
	return storm(EMU_SERVICE_INLINE, EMU_NO_MOVE, false);
}
static int wp_thread(void)
{
	return storm(EMU_SERVICE_THREAD, EMU_NO_MOVE, false);
}
static int move_huge(void)
{
	return storm(EMU_SERVICE_INLINE, RIG_HUGE, false);
}
static int wp_huge(void)
{
	return storm(EMU_SERVICE_INLINE, EMU_NO_MOVE | RIG_HUGE, false);
}
static int move_wp_async(void)
{
	return storm(EMU_SERVICE_INLINE, RIG_WP_ASYNC, false);
}
static int at_the_gate(void)
{
	return storm(EMU_SERVICE_INLINE, 0, true);
}
static int wp_at_the_gate(void)
{
	return storm(EMU_SERVICE_THREAD, EMU_NO_MOVE, true);
}

const struct test host_storm_tests[] = {
	{ "host storm: move, inline", move_inline },
	{ "host storm: move, thread", move_thread },
	{ "host storm: wp, inline", wp_inline },
	{ "host storm: wp, thread", wp_thread },
	{ "host storm: move, huge pages", move_huge },
	{ "host storm: wp, huge pages", wp_huge },
	{ "host storm: move with WP_ASYNC", move_wp_async },
	{ "host storm: move, at a gate", at_the_gate },
	{ "host storm: wp, at a gate", wp_at_the_gate },
	{ NULL, NULL },
};
