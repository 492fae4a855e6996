/* SPDX-License-Identifier: MIT */
/*
 * Real threads on one region: writers that own frames and check every byte of them, and reclaimers.
 *
 * Ownership is the guest's protocol: a frame given back is nobody's until its owner touches it again.  Each writer has
 * its own frames, fills them, verifies, gives some back, and verifies that those read as zero.  Meanwhile touchers and
 * reclaimers work on a common area without any protocol, where only the books must hold.
 */
#include "harness.h"

#include <string.h>
#include <time.h>

enum { OWN = 512, WRITERS = 3, COMMON = 1024, FRAMES = WRITERS * OWN + COMMON };

struct storm {
	struct rig *rig;
	struct rig *lost; /* its frame 1 is; NULL without userfaultfd, where that would be a SIGSEGV */
	_Atomic int stop;
	_Atomic uint64_t rounds;
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

static void *owner(void *arg)
{
	struct actor *a = arg;
	struct rig *rig = a->storm->rig;
	const uint64_t base = (uint64_t)a->id * OWN;

	for (uint64_t round = 1; !atomic_load(&a->storm->stop); round++) {
		uint64_t at = next(a) % OWN, n = 1 + next(a) % (OWN - at), bad;
		struct emu_range range = { base + at, n, 0 };
		uint8_t zero[4096], got[4096];
		struct emu_progress p;

		CHECK_EQ(rig_run(rig, EMU_FILL, base, OWN, round, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, base, OWN, round, 1, &bad), 0);
		CHECK_EQ(bad, 0);
		switch (next(a) % 3) {
		case 0:
			CHECK_EQ(emu_discard(rig->r, &range, 1), (int64_t)n);
			memset(zero, 0, sizeof(zero));
			CHECK_EQ(emu_guest_read(rig->r, (base + at) << 12, got, 4096, &p), 0);
			CHECK_EQ(memcmp(zero, got, 4096), 0);
			break;
		case 1:
			CHECK(emu_lazy_free(rig->r, &range, 1) >= (int64_t)n - 1);
			break;
		default:
			CHECK(emu_lazy_drop(rig->r, &range, 1) >= 0);
			break;
		}
		/* what wasn't given back is untouched */
		if (at)
			CHECK_EQ(rig_run(rig, EMU_VERIFY, base, at, round, 1, &bad), 0);
		if (at)
			CHECK_EQ(bad, 0);
		atomic_fetch_add(&a->storm->rounds, 1);
	}
	return NULL;
}

static void *toucher(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&a->storm->stop)) {
		uint64_t at = next(a) % COMMON, n = 1 + next(a) % (COMMON - at);

		CHECK_EQ(rig_run(a->storm->rig, next(a) % 2 ? EMU_TOUCH_WRITE : EMU_TOUCH_READ, WRITERS * OWN + at, n, 0, 1,
		                 NULL), 0);
	}
	return NULL;
}

/* Copies within the common area: both of its frames may be taken at any moment. */
static void *copier(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&a->storm->stop)) {
		uint64_t n = 1 + next(a) % 100;
		struct emu_range range = { WRITERS * OWN + next(a) % (COMMON - n), n, WRITERS * OWN + next(a) % (COMMON - n) };
		struct emu_vcpu_job job = { .op = EMU_COPY, .threads = 1 };

		CHECK_EQ(emu_vcpu_run(a->storm->rig->r, &range, 1, &job), 0);
		CHECK_EQ(job.progress.done, n);
	}
	return NULL;
}

/* Writes into the common area from memory of another region, half of which is lost: each call jumps out in the middle. */
static void *jumper(void *arg)
{
	struct actor *a = arg;
	struct emu_region *r = a->storm->rig->r;

	while (a->storm->lost && !atomic_load(&a->storm->stop)) {
		const uint64_t gpa = ((WRITERS * OWN + next(a) % (COMMON - 3)) << EMU_FRAME_SHIFT) + next(a) % 2 * 100;
		struct emu_progress progress;

		CHECK(emu_guest_write(r, gpa, emu_frame(a->storm->lost->r, 0), 2 * EMU_FRAME_SIZE, &progress) < 0);
	}
	return NULL;
}

/* Looks by marks alone while all change: what rig_check_books() finds afterwards is right only if no mark was lost. */
static void *looker(void *arg)
{
	struct actor *a = arg;
	struct emu_look look;

	while (!atomic_load(&a->storm->stop)) {
		CHECK_EQ(emu_rss_look(a->storm->rig->r, next(a) % 8 == 0, &look), 0);
		CHECK(look.rss >= 0 && look.rss <= FRAMES);
	}
	return NULL;
}

static void *reclaimer(void *arg)
{
	struct actor *a = arg;
	struct emu_region *r = a->storm->rig->r;

	while (!atomic_load(&a->storm->stop)) {
		struct emu_range ranges[8];
		size_t n = 1 + next(a) % 8;

		for (size_t i = 0; i < n; i++) {
			ranges[i].gfn = WRITERS * OWN + next(a) % COMMON;
			ranges[i].count = 1 + next(a) % (FRAMES - ranges[i].gfn);
			if (ranges[i].count > 100)
				ranges[i].count = 100;
		}
		switch (next(a) % 4) {
		case 0:
			CHECK(emu_lazy_free(r, ranges, n) >= 0);
			break;
		case 1:
			CHECK(emu_lazy_drop(r, ranges, n) >= 0);
			break;
		default:
			CHECK(emu_discard(r, ranges, n) >= 0);
			break;
		}
	}
	return NULL;
}

static int storm(int service, uint32_t fault_around, uint32_t disable)
{
	void *(*const bodies[])(void *) = { owner, owner, owner, toucher, toucher, reclaimer, reclaimer,
		                          copier, looker, jumper };
	enum { N = sizeof(bodies) / sizeof(bodies[0]) };
	const char *seconds = getenv("STORM");
	struct storm s = { .rig = rig_open(FRAMES, service, fault_around, disable) };
	double len = seconds ? atof(seconds) : 0.5;
	const uint64_t rotate = emu_rss_rotate;
	struct actor actors[N];
	pthread_t threads[N];

	if (!s.rig)
		return SKIPPED;
	if (service != EMU_SERVICE_OFF) {
		s.lost = rig_open(2, service, 1, 0);
		CHECK_EQ(emu_poison(s.lost->r, &(struct emu_range){ 1, 1, 0 }, 1), 1);
	}
	emu_rss_rotate = 0;
	for (int i = 0; i < N; i++) {
		actors[i] = (struct actor){ &s, i, 0x9e3779b97f4a7c15u * (uint64_t)(i + 1) };
		CHECK_EQ(pthread_create(&threads[i], NULL, bodies[i], &actors[i]), 0);
	}
	nanosleep(&(struct timespec){ (time_t)len, (long)((len - (double)(time_t)len) * 1e9) }, NULL);
	atomic_store(&s.stop, 1);
	for (int i = 0; i < N; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK(atomic_load(&s.rounds) > 0);
	emu_rss_rotate = rotate;
	rig_check_books(s.rig);
	CHECK_EQ(emu_discard(s.rig->r, &(struct emu_range){ 0, FRAMES, 0 }, 1) >= 0, 1);
	CHECK_EQ(rig_rss(s.rig), 0);
	rig_check_books(s.rig);
	rig_close(s.rig);
	if (s.lost)
		rig_close(s.lost);
	return 0;
}

/*
 * One frame, round after round, each from the same start: a write to it whose source is lost, while one thread reads it and
 * one discards it.  A whole storm would repair what a round leaves wrong; here it's looked at after each.
 */
struct round {
	struct storm storm;
	_Atomic int go, done;
};

static void *round_helper(void *arg)
{
	struct actor *a = arg;
	struct round *round = (struct round *)a->storm;
	struct emu_region *r = a->storm->rig->r;

	for (int seen = 0;;) {
		while (atomic_load(&round->go) == seen)
			;
		seen = atomic_load(&round->go);
		if (atomic_load(&a->storm->stop))
			return NULL;
		for (uint64_t spin = next(a) % 2000; spin; spin--)
			atomic_signal_fence(memory_order_seq_cst);
		if (a->id)
			CHECK(emu_discard(r, &(struct emu_range){ 0, 1, 0 }, 1) >= 0);
		else
			CHECK_EQ(rig_run(a->storm->rig, EMU_TOUCH_READ, 0, 1, 0, 1, NULL), 0);
		atomic_fetch_add(&round->done, 1);
	}
}

static int a_jump_leaves_true_books(void)
{
	struct round round = { .storm.rig = rig_open(8, EMU_SERVICE_INLINE, 1, 0) };
	const char *seconds = getenv("STORM");
	const uint64_t end = emu_now_ns() + (uint64_t)((seconds ? atof(seconds) : 0.5) * 1e9);
	struct rig *rig = round.storm.rig, *lost = rig ? rig_open(2, EMU_SERVICE_INLINE, 1, 0) : NULL;
	struct actor actors[2];
	pthread_t threads[2];

	if (!lost)
		return SKIPPED;
	CHECK_EQ(emu_poison(lost->r, &(struct emu_range){ 1, 1, 0 }, 1), 1);
	for (int i = 0; i < 2; i++) {
		actors[i] = (struct actor){ &round.storm, i, 0x9e3779b97f4a7c15u * (uint64_t)(i + 1) };
		CHECK_EQ(pthread_create(&threads[i], NULL, round_helper, &actors[i]), 0);
	}
	while (emu_now_ns() < end) {
		struct emu_progress progress;

		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 1, 0, 1, NULL), 0);
		atomic_store(&round.done, 0);
		atomic_fetch_add(&round.go, 1);
		CHECK(emu_guest_write(rig->r, 8, emu_frame(lost->r, 1) - 64, 128, &progress) < 0);
		while (atomic_load(&round.done) < 2)
			;
		CHECK_EQ(rig_stat(rig, "nr_resident"), rig_rss(rig));
	}
	atomic_store(&round.storm.stop, 1);
	atomic_fetch_add(&round.go, 1);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	rig_check_books(rig);
	rig_close(rig);
	rig_close(lost);
	return 0;
}

static int storm_inline(void)
{
	return storm(EMU_SERVICE_INLINE, 1, 0);
}
static int storm_inline_around(void)
{
	return storm(EMU_SERVICE_INLINE, 16, EMU_NO_PROCESS_MADVISE);
}
static int storm_thread(void)
{
	return storm(EMU_SERVICE_THREAD, 1, 0);
}
static int storm_thread_around(void)
{
	return storm(EMU_SERVICE_THREAD, 16, 0);
}
static int storm_off(void)
{
	return storm(EMU_SERVICE_OFF, 1, 0);
}

const struct test storm_tests[] = {
	{ "storm: inline", storm_inline },
	{ "storm: inline, fault_around 16, no process_madvise", storm_inline_around },
	{ "storm: thread", storm_thread },
	{ "storm: thread, fault_around 16", storm_thread_around },
	{ "storm: off", storm_off },
	{ "storm: a jump leaves true books", a_jump_leaves_true_books },
	{ NULL, NULL },
};
