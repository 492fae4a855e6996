/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct rig *open_or_null(int s, uint32_t disable)
{
	return rig_open(8192, services[s], 1, disable);
}

static int discard_takes_what_holds_memory_and_no_more(void)
{
	for (int s = 0; s < 3; s++)
		for (int vectored = 0; vectored < 2; vectored++) {
			struct rig *rig = open_or_null(s, vectored ? 0 : EMU_NO_PROCESS_MADVISE);
			struct emu_range *ranges;
			uint64_t bad;

			if (!rig)
				return SKIPPED;
			CHECK_EQ(rig_run(rig, EMU_FILL, 0, 4096, 1, 1, NULL), 0);
			CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 5000, 10, 1, 1, NULL), 0);
			/* every other frame of the first 4096, and the zero-mapped and untouched ones */
			ranges = calloc(2049, sizeof(*ranges));
			for (uint64_t i = 0; i < 2048; i++)
				ranges[i] = (struct emu_range){ 2 * i, 1, 0 };
			ranges[2048] = (struct emu_range){ 4096, 4096, 0 };
			CHECK_EQ(emu_discard(rig->r, ranges, 2049), 2048);
			CHECK_EQ(rig_rss(rig), 2048);
			CHECK_EQ(rig_stat(rig, "discard_frames"), 2048);
			CHECK_EQ(rig_stat(rig, "discard_zeromap"), 10);
			CHECK_EQ(rig_stat(rig, "nr_zero"), 8192 - 2048);
			if (vectored && rig->r->vectored)
				CHECK_EQ(rig_stat(rig, "discard_calls"), 3);
			else
				CHECK_EQ(rig_stat(rig, "discard_calls"), 2049);
			for (uint64_t i = 0; i < 4096; i++) {
				CHECK_EQ(rig_run(rig, EMU_VERIFY, i, 1, 1, 1, &bad), 0);
				CHECK_EQ(bad, i % 2 == 0); /* the others hold what they held */
			}
			rig_check_books(rig);
			/* what is ZERO costs no call */
			CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 6000, 2000, 0 }, 1), 0);
			CHECK(rig_stat(rig, "discard_calls") <= 2049);
			CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 8000, 193, 0 }, 1), -ERANGE);
			free(ranges);
			rig_close(rig);
		}
	return 0;
}

static int lazily_freed_frames_go_under_pressure_and_written_ones_stay(void)
{
	for (int s = 0; s < 3; s++) {
		struct rig *rig = open_or_null(s, 0);
		struct emu_range all = { 0, 600, 0 };
		int64_t gone, kept;
		uint64_t bad;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 600, 1, 1, NULL), 0);
		CHECK_EQ(emu_lazy_free(rig->r, &all, 1), 600);
		CHECK_EQ(rig_rss(rig), 600); /* RSS doesn't show it */
		CHECK_EQ(rig_stat(rig, "nr_lazy"), 600);
		CHECK_EQ(rig_run(rig, EMU_FILL, 100, 50, 2, 1, NULL), 0); /* cancels silently */
		/* pages parked in another CPU's batch can't be reached: a few, and they stay LAZY (reclaim.c) */
		gone = emu_lazy_drop(rig->r, &all, 1);
		CHECK(gone <= 550 && gone >= 550 - 31 * sysconf(_SC_NPROCESSORS_ONLN));
		CHECK_EQ(rig_rss(rig), 600 - gone);
		CHECK_EQ(rig_stat(rig, "nr_lazy"), 600 - gone);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 100, 50, 2, 1, &bad), 0);
		CHECK_EQ(bad, 0);
		rig_check_books(rig);
		/* a lazy frame dropped behind our back faults and comes back as zero, counted */
		CHECK_EQ(emu_lazy_free(rig->r, &(struct emu_range){ 100, 50, 0 }, 1), 50);
		CHECK_EQ(madvise(emu_frame(rig->r, 100), 50 * 4096, MADV_PAGEOUT), 0);
		kept = rig_rss(rig);
		CHECK(kept < 600 - gone);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 600, 0, 1, NULL), 0);
		CHECK_EQ(rig_rss(rig), 600);
		if (rig->uffd >= 0)
			CHECK_EQ(rig_stat(rig, "pgfault_lazy"), 600 - gone - kept);
		CHECK_EQ(emu_discard(rig->r, &all, 1), 600);
		CHECK_EQ(rig_rss(rig), 0);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

/* A locked page in the middle refuses MADV_DONTNEED: what was done before it is done, and the books know how far. */
static int a_refusal_in_the_middle_leaves_true_books(void)
{
	for (int s = 0; s < 3; s++)
		for (int vectored = 0; vectored < 2; vectored++)
			for (int verb = 0; verb < 3; verb++) {
				struct rig *rig = open_or_null(s, vectored ? 0 : EMU_NO_PROCESS_MADVISE);
				struct emu_range ranges[3] = { { 0, 200, 0 }, { 300, 300, 0 }, { 700, 100, 0 } };
				uint64_t bad;

				if (!rig)
					return SKIPPED;
				CHECK_EQ(rig_run(rig, EMU_FILL, 0, 1000, 1, 1, NULL), 0);
				if (syscall(SYS_mlock, emu_frame(rig->r, 450), 4096L)) { /* sanitizers stub mlock() */
					rig_close(rig);
					return SKIPPED; /* RLIMIT_MEMLOCK */
				}
				CHECK_EQ((verb == 0   ? emu_discard(rig->r, ranges, 3)
				          : verb == 1 ? emu_lazy_free(rig->r, ranges, 3)
				                      : emu_poison(rig->r, ranges, 3)), -EINVAL);
				rig_check_books(rig);
				if (verb == 0)
					CHECK_EQ(rig_stat(rig, "nr_resident"), 1000 - 200 - 150);
				for (uint64_t i = 0; i < 1000; i++) {
					uint8_t state = emu_state_load(rig->r, i);
					int err = rig_run(rig, EMU_VERIFY, i, 1, 1, 1, &bad);

					if (state == EMU_LOST)
						CHECK_EQ(err, -EHWPOISON);
					else if (state == EMU_RESIDENT)
						CHECK_EQ(err ? err : (int)bad, 0);
					else
						CHECK_EQ(err, 0);
				}
				CHECK_EQ(syscall(SYS_munlock, emu_frame(rig->r, 450), 4096L), 0);
				CHECK(emu_discard(rig->r, &(struct emu_range){ 0, 1000, 0 }, 1) >= 0);
				CHECK_EQ(rig_rss(rig), 0);
				rig_close(rig);
			}
	return 0;
}

/* unpoison that fails halfway, or a stray madvise, takes the marker: the frame is LOST all the same, for raw accesses, too */
static int a_lost_frame_without_its_marker_is_still_lost(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_THREAD, 1, 0);
	struct emu_guard guard;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 0, 4, 0 }, 1), 4);
	CHECK_EQ(madvise(emu_frame(rig->r, 1), 4096, MADV_DONTNEED), 0);
	guard.region = rig->r;
	guard.err = 0;
	if (!sigsetjmp(guard.env, EMU_SAVEMASK)) {
		atomic_store(&emu_thread.guard, &guard);
		(void)*(volatile uint8_t *)emu_frame(rig->r, 1);
		CHECK(!"the load went through");
	}
	atomic_store(&emu_thread.guard, NULL);
	CHECK_EQ(guard.err, -EHWPOISON);
	CHECK_EQ(emu_unpoison(rig->r, &(struct emu_range){ 0, 64, 0 }, 1), 4);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 64, 0, 1, NULL), 0);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

static int zero_pages_are_not_lazily_freed(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_OFF, 1, 0);

	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 10, 0, 1, NULL), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 20, 10, 0, 1, NULL), 0);
	CHECK_EQ(emu_lazy_free(rig->r, &(struct emu_range){ 0, 64, 0 }, 1), 10);
	CHECK_EQ(rig_stat(rig, "nr_zeromap"), 10);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

static int events_tell_what_was_taken(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_OFF, 1, 0);
	struct emu_event events[8];

	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 8, 8, 0, 1, NULL), 0);
	CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 8, 32, 0 }, 1), 8);
	CHECK_EQ(emu_ring_drain(rig->r, events, 8), 1);
	CHECK_EQ(events[0].type, EMU_EV_DISCARD);
	CHECK_EQ(events[0].gfn, 8);
	CHECK_EQ(events[0].count, 8);
	rig_close(rig);
	return 0;
}

const struct test reclaim_tests[] = {
	{ "reclaim: discard takes what holds memory and no more", discard_takes_what_holds_memory_and_no_more },
	{ "reclaim: lazily freed frames go under pressure, written ones stay",
	  lazily_freed_frames_go_under_pressure_and_written_ones_stay },
	{ "reclaim: a refusal in the middle leaves true books", a_refusal_in_the_middle_leaves_true_books },
	{ "reclaim: a lost frame without its marker is still lost", a_lost_frame_without_its_marker_is_still_lost },
	{ "reclaim: zero pages are not lazily freed", zero_pages_are_not_lazily_freed },
	{ "reclaim: events tell what was taken", events_tell_what_was_taken },
	{ NULL, NULL },
};
