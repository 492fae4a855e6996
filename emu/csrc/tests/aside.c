/* SPDX-License-Identifier: MIT */
/* Frames set aside: residency, content and counters of each way out and each way back. */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define ALL(frames) (&(struct emu_range){ 0, frames, 0 }), 1

/* Runs a check on each way out and each service that this machine has. */
static int on_each(void (*check)(struct rig *), uint64_t frames)
{
	int ran = 0;

	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, frames, 0);

		if (!rig)
			continue;
		check(rig);
		rig_close(rig);
		ran++;
	}
	return ran ? 0 : SKIPPED;
}

static void check_a_read_brings_it_back(struct rig *rig)
{
	uint8_t got[EMU_FRAME_SIZE];
	uint64_t want[EMU_FRAME_SIZE / 8], bad[1];
	struct emu_progress p;
	struct emu_hist h;

	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 1024, 7, 1, NULL), 0);
	CHECK_EQ(emu_set_aside(rig->r, &(struct emu_range){ 100, 600, 0 }, 1, 3), 600);
	CHECK_EQ(rig_stat(rig, "nr_aside"), 600);
	CHECK_EQ(rig_rss(rig), 424);
	CHECK_EQ(rig_side_rss(rig), 600);
	rig_check_books(rig);
	/* again: nothing is there to be taken */
	CHECK_EQ(emu_set_aside(rig->r, &(struct emu_range){ 100, 600, 0 }, 1, 3), 0);
	CHECK_EQ(emu_guest_read(rig->r, 333ull << 12, got, sizeof(got), &p), 0);
	emu_content_words(7, 333, want);
	CHECK_EQ(memcmp(got, want, sizeof(got)), 0);
	CHECK_EQ(rig_stat(rig, "aside_return"), 1);
	CHECK_EQ(rig_stat(rig, "nr_aside"), 599);
	CHECK_EQ(rig_rss(rig), 425);
	rig_check_books(rig);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 1024, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	CHECK_EQ(emu_latency_read(rig->r, EMU_LAT_ASIDE_RETURN, &h), 0);
	CHECK(h.count >= 599 / EMU_LATENCY_EVERY && h.sum > 0);
	CHECK_EQ(rig_stat(rig, "aside_return"), 600);
	CHECK_EQ(rig_rss(rig), 1024);
	CHECK(rig_stat(rig, "aside_stale") <= 64); /* copies are swept as they come */
	rig_check_books(rig);
	CHECK_EQ(emu_aside_sweep(rig->r), 0);
	CHECK_EQ(rig_stat(rig, "aside_stale"), 0);
	CHECK_EQ(rig_side_rss(rig), 0);
	rig_check_books(rig);
}
static int a_read_brings_it_back(void)
{
	return on_each(check_a_read_brings_it_back, 1024);
}

static void check_dropped_frames_are_gone(struct rig *rig)
{
	uint64_t bad[1];

	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 512, 7, 1, NULL), 0);
	CHECK_EQ(emu_set_aside(rig->r, ALL(256), 1), 256);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 64, 0, 1, NULL), 0);
	/* came back and went again: of another time */
	CHECK_EQ(emu_set_aside(rig->r, ALL(32), 2), 32);
	CHECK_EQ(emu_aside_drop(rig->r, ALL(512), 1, 0), 192);
	CHECK_EQ(rig_stat(rig, "aside_dropped"), 192);
	rig_check_books(rig);
	CHECK_EQ(rig_rss(rig), 256 + 32);
	/* given up by their owner: zeros */
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 64, 192, 0, 1, NULL), 0);
	CHECK_EQ(rig_stat(rig, "nr_zeromap"), 192);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 64, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 256, 256, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	rig_check_books(rig);
}
static int dropped_frames_are_gone(void)
{
	return on_each(check_dropped_frames_are_gone, 512);
}

static void check_evicted_frames_tell(struct rig *rig)
{
	uint8_t got[EMU_FRAME_SIZE] = { 0 };
	struct emu_progress p;
	uint64_t bad[1];

	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
	CHECK_EQ(emu_set_aside(rig->r, ALL(64), 1), 64);
	CHECK_EQ(emu_aside_drop(rig->r, ALL(64), -1, 1), 64);
	CHECK_EQ(rig_stat(rig, "nr_discarded"), 64);
	CHECK_EQ(rig_rss(rig), 0);
	CHECK_EQ(rig_side_rss(rig), 0);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(emu_guest_read(rig->r, 4096 * 5 + 10, got, 100, &p), -ENODATA);
		CHECK_EQ(p.bad_gfn, 5);
		CHECK_EQ(p.done, 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 9, 1, 0, 1, NULL), -ENODATA);
		CHECK_EQ(emu_guest_write(rig->r, 4096 * 7, got, 100, &p), -ENODATA);
		CHECK_EQ(p.bad_gfn, 7);
	}
	rig_check_books(rig);
	/* wholly overwritten, it is what was written */
	memset(got, 0x5a, sizeof(got));
	CHECK_EQ(emu_guest_write(rig->r, 4096 * 5, got, sizeof(got), &p), 0);
	CHECK_EQ(rig_run(rig, EMU_FILL, 6, 2, 8, 1, NULL), 0);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 6, 2, 8, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	CHECK_EQ(rig_run(rig, EMU_SET, 8, 1, 0, 1, NULL), 0);
	CHECK_EQ(rig_stat(rig, "nr_discarded"), 60);
	/* given back, it is an empty one */
	CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 9, 10, 0 }, 1), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 9, 10, 0, 1, NULL), 0);
	CHECK_EQ(rig_stat(rig, "nr_discarded"), 50);
	rig_check_books(rig);
}
static int evicted_frames_tell(void)
{
	return on_each(check_evicted_frames_tell, 64);
}

static void check_every_way_out_of_aside(struct rig *rig)
{
	uint64_t bad[1];

	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 256, 7, 1, NULL), 0);
	CHECK_EQ(emu_set_aside(rig->r, ALL(256), 1), 256);
	CHECK_EQ(emu_bring_back(rig->r, &(struct emu_range){ 0, 100, 0 }, 1, -1), 100);
	CHECK_EQ(rig_stat(rig, "aside_restored"), 100);
	CHECK_EQ(rig_stat(rig, "pgfault"), 256); /* no fault */
	rig_check_books(rig);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 100, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 50, 100, 0 }, 1), 100);
	CHECK_EQ(rig_stat(rig, "discard_frames"), 50);
	CHECK_EQ(rig_stat(rig, "aside_dropped"), 50);
	rig_check_books(rig);
	CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 150, 10, 0 }, 1), 10);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 155, 1, 0, 1, NULL), -EHWPOISON);
	CHECK_EQ(emu_lazy_free(rig->r, &(struct emu_range){ 160, 96, 0 }, 1), 0); /* not there to be freed */
	rig_check_books(rig);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 160, 96, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	rig_check_books(rig);
}
static int every_way_out_of_aside(void)
{
	return on_each(check_every_way_out_of_aside, 256);
}

static void check_zero_and_lazy_frames_stay(struct rig *rig)
{
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 10, 0, 1, NULL), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 20, 10, 0, 1, NULL), 0);
	CHECK_EQ(emu_lazy_free(rig->r, &(struct emu_range){ 20, 5, 0 }, 1), 5);
	CHECK_EQ(emu_set_aside(rig->r, ALL(64), 1), 5);
	CHECK_EQ(rig_stat(rig, "nr_zeromap"), 10);
	CHECK_EQ(rig_stat(rig, "nr_lazy"), 5);
	rig_check_books(rig);
	CHECK_EQ(emu_set_aside(rig->r, ALL(65), 1), -ERANGE);
	CHECK_EQ(emu_set_aside(rig->r, ALL(64), EMU_STAMP_SWAP), -EINVAL);
}
static int zero_and_lazy_frames_stay(void)
{
	return on_each(check_zero_and_lazy_frames_stay, 64);
}

/* A page shared with a child can't be moved, also when the child is gone: it is made the process's own first. */
static int after_a_fork(void)
{
	struct rig *rig = rig_open_nth(0, 64, 0);
	uint64_t bad[1];
	pid_t child;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
	/* the rig has no MADV_DONTFORK */
	child = fork();
	CHECK(child >= 0);
	if (!child)
		_exit(0);
	CHECK_EQ(waitpid(child, NULL, 0), child);
	CHECK_EQ(emu_set_aside(rig->r, ALL(64), 1), 64);
	rig_check_books(rig);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 64, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	rig_close(rig);
	return 0;
}

static int without_a_way(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_OFF, 1, 0);

	CHECK_EQ(emu_region_aside_how(rig->r), 0);
	CHECK_EQ(emu_region_lend_side(rig->r, rig->map), -EOPNOTSUPP);
	CHECK_EQ(emu_set_aside(rig->r, ALL(64), 1), -EOPNOTSUPP);
	CHECK_EQ(emu_bring_back(rig->r, ALL(64), -1), -EOPNOTSUPP);
	CHECK_EQ(emu_swap_out(rig->r, ALL(64)), -EOPNOTSUPP);
	rig_close(rig);
	return 0;
}

/* The trap: with WP_ASYNC on the same uffd the second way out would lose writes without a sign. */
static int never_both(void)
{
	struct emu_region_options o = { .service = EMU_SERVICE_INLINE, .uffd = 0, .fault_around = 1, .wp = 1, .wp_async = 1 };
	struct emu_region *r;
	static uint8_t page[EMU_FRAME_SIZE] __attribute__((aligned(EMU_FRAME_SIZE)));

	CHECK_EQ(emu_region_open(page, 1, &o, &r), -EINVAL);
	return 0;
}

const struct test aside_tests[] = {
	{ "aside: a read brings it back", a_read_brings_it_back },
	{ "aside: dropped frames are gone, by their stamp", dropped_frames_are_gone },
	{ "aside: evicted frames tell", evicted_frames_tell },
	{ "aside: every way out of it", every_way_out_of_aside },
	{ "aside: zero and lazy frames stay", zero_and_lazy_frames_stay },
	{ "aside: after a fork", after_a_fork },
	{ "aside: without a way", without_a_way },
	{ "aside: write protection and WP_ASYNC, never both", never_both },
	{ NULL, NULL },
};
