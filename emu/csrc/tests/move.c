/* SPDX-License-Identifier: MIT */
/* UFFDIO_MOVE by a kernel that moves more than it says (6.18), and by one that is right about a place being taken. */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FRAMES = 256, FIRST = 20, COUNT = 200 };

#define AT(first, n) (&(struct emu_range){ first, n, 0 }), 1

static _Atomic bool miscounts; /* the service's thread has the hook, too */
static int said, unsaid; /* pages of each move: counted ones, then others */
static int64_t hidden;   /* pages that were moved uncounted */
static bool in_the_way;

/* What move_pages() does after a step that was tried again: pages move, and the next look at them finds them in the way. */
static int miscounting(int fd, unsigned long request, void *arg)
{
	struct uffdio_move *move = arg, part;
	uint64_t first, then;

	if (request != UFFDIO_MOVE || !atomic_load(&miscounts))
		return ioctl(fd, request, arg);
	first = (uint64_t)said * EMU_FRAME_SIZE;
	then = (uint64_t)unsaid * EMU_FRAME_SIZE;
	if (in_the_way || move->len <= first) {
		in_the_way = false;
		return ioctl(fd, request, arg);
	}
	part = *move;
	part.len = first;
	if (first)
		CHECK_EQ(ioctl(fd, UFFDIO_MOVE, &part), 0);
	part.dst += first;
	part.src += first;
	part.len = move->len - first < then ? move->len - first : then;
	CHECK_EQ(ioctl(fd, UFFDIO_MOVE, &part), 0);
	hidden += (int64_t)part.len >> EMU_FRAME_SHIFT;
	in_the_way = first; /* the rest of this call is told to begin there */
	move->move = first ? (int64_t)first : -EEXIST;
	errno = first ? EAGAIN : EEXIST;
	return -1;
}

/* NULL: no MOVE here */
static struct rig *moving(int service)
{
	struct rig *rig = rig_open_nth(service, FRAMES, 0);

	if (rig && emu_region_aside_how(rig->r) != 2) {
		rig_close(rig);
		rig = NULL;
	}
	return rig;
}

static void verify(struct rig *rig)
{
	uint64_t bad;

	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, FRAMES, 7, 1, &bad), 0);
	CHECK_EQ(bad, 0);
}

static void out_and_back(struct rig *rig)
{
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, FRAMES, 7, 1, NULL), 0);
	atomic_store(&miscounts, true);
	CHECK_EQ(emu_set_aside(rig->r, AT(FIRST, COUNT), 1), COUNT);
	atomic_store(&miscounts, false);
	CHECK(hidden > 0);
	CHECK_EQ(rig_stat(rig, "uffd_miscounted"), hidden);
	CHECK_EQ(rig_stat(rig, "aside_skipped"), 0);
	CHECK_EQ(rig_rss(rig), FRAMES - COUNT);
	CHECK_EQ(rig_side_rss(rig), COUNT);
	rig_check_books(rig);
	atomic_store(&miscounts, true);
	CHECK_EQ(emu_bring_back(rig->r, AT(0, FRAMES), -1), COUNT);
	atomic_store(&miscounts, false);
	CHECK_EQ(rig_stat(rig, "uffd_miscounted"), hidden);
	CHECK_EQ(rig_rss(rig), FRAMES);
	CHECK_EQ(rig_side_rss(rig), 0);
	rig_check_books(rig);
	verify(rig);
}

static int pages_moved_unsaid(void)
{
	static const int steps[][2] = { { 0, 1 }, { 0, 3 }, { 0, 65 }, { 0, COUNT }, { 1, 1 }, { 7, 64 }, { 60, 1 } };

	for (int service = 0; service < 2; service++)
		for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
			int (*real)(int, unsigned long, void *) = emu_uffd_ioctl;
			struct rig *rig;

			emu_uffd_ioctl = miscounting;
			rig = moving(service);
			if (!rig) {
				emu_uffd_ioctl = real;
				return SKIPPED;
			}
			said = steps[i][0];
			unsaid = steps[i][1];
			hidden = 0;
			out_and_back(rig);
			rig_close(rig);
			emu_uffd_ioctl = real;
		}
	return 0;
}

/* A page is in the way that isn't the moved one: that frame stays, and what it holds. */
static int a_place_that_is_taken(void)
{
	struct rig *rig = moving(0);
	uint8_t other[EMU_FRAME_SIZE] = { 1 };
	uint64_t done;
	unsigned eagain;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, FRAMES, 7, 1, NULL), 0);
	CHECK_EQ(emu_uffd_fill(rig->uffd, EMU_FILL_COPY, (uintptr_t)emu_side(rig->r, 50), other, sizeof(other), false, &done,
	                       &eagain), 0);
	CHECK_EQ(emu_set_aside(rig->r, AT(FIRST, COUNT), 1), COUNT - 1);
	CHECK_EQ(rig_stat(rig, "uffd_miscounted"), 0);
	CHECK_EQ(rig_stat(rig, "aside_skipped"), 1);
	CHECK_EQ(rig_rss(rig), FRAMES - COUNT + 1);
	verify(rig);
	CHECK_EQ(madvise(emu_side(rig->r, 50), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

/* An old copy that can't be cleared, and a frame taken behind our back: the copy isn't taken for the frame. */
static int a_stale_copy_isnt_what_moved(void)
{
	struct rig *rig = moving(0);
	uint8_t got[EMU_FRAME_SIZE];
	struct emu_progress p;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, FRAMES, 7, 1, NULL), 0);
	CHECK_EQ(emu_set_aside(rig->r, AT(50, 1), 1), 1);
	CHECK_EQ(emu_guest_read(rig->r, 50ull << EMU_FRAME_SHIFT, got, sizeof(got), &p), 0);
	CHECK_EQ(rig_stat(rig, "aside_stale"), 1);
	CHECK_EQ(madvise(emu_frame(rig->r, 50), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
	/* both: the kernel moves nothing between a locked VMA and one that isn't (validate_move_areas) */
	CHECK_EQ(syscall(SYS_mlock2, emu_side(rig->r, 50), EMU_FRAME_SIZE, MLOCK_ONFAULT), 0);
	CHECK_EQ(syscall(SYS_mlock2, emu_frame(rig->r, 50), EMU_FRAME_SIZE, MLOCK_ONFAULT), 0);
	CHECK_EQ(emu_set_aside(rig->r, AT(50, 1), 1), 0);
	CHECK_EQ(rig_stat(rig, "uffd_miscounted"), 0);
	CHECK(emu_guest_read(rig->r, 50ull << EMU_FRAME_SHIFT, got, sizeof(got), &p) < 0);
	CHECK_EQ(rig_stat(rig, "nr_lost"), 1);
	CHECK_EQ(syscall(SYS_munlock, emu_side(rig->r, 50), EMU_FRAME_SIZE), 0);
	rig_close(rig);
	return 0;
}

static int refusing(int fd, unsigned long request, void *arg)
{
	if (request != UFFDIO_MOVE || !atomic_load(&miscounts))
		return ioctl(fd, request, arg);
	((struct uffdio_move *)arg)->move = -EEXIST;
	errno = EEXIST;
	return -1;
}

/* A frame that is in neither place hasn't moved. It is lost, and says so. */
static int what_is_nowhere_hasnt_moved(void)
{
	int (*real)(int, unsigned long, void *) = emu_uffd_ioctl;
	uint8_t got[EMU_FRAME_SIZE];
	struct emu_progress p;
	struct rig *rig;

	emu_uffd_ioctl = refusing;
	rig = moving(0);
	if (rig) {
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, FRAMES, 7, 1, NULL), 0);
		CHECK_EQ(madvise(emu_frame(rig->r, 50), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
		atomic_store(&miscounts, true);
		CHECK_EQ(emu_set_aside(rig->r, AT(50, 1), 1), 0);
		atomic_store(&miscounts, false);
		CHECK_EQ(rig_stat(rig, "uffd_miscounted"), 0);
		CHECK_EQ(rig_stat(rig, "aside_skipped"), 1);
		CHECK(emu_guest_read(rig->r, 50ull << EMU_FRAME_SHIFT, got, sizeof(got), &p) < 0);
		CHECK_EQ(rig_stat(rig, "nr_lost"), 1);
		rig_close(rig);
	}
	emu_uffd_ioctl = real;
	return rig ? 0 : SKIPPED;
}

/* Nor has one whose target has a marker, which pagemap shows as it does a page in swap; a fault on that one is told, too. */
static int a_marker_isnt_what_moved(void)
{
	int (*real)(int, unsigned long, void *) = emu_uffd_ioctl;
	uint8_t got[EMU_FRAME_SIZE];
	struct emu_progress p;
	unsigned eagain = 0;
	struct rig *rig;
	uint64_t done;

	emu_uffd_ioctl = refusing;
	rig = moving(1);
	if (rig && rig->r->have_poison) {
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, FRAMES, 7, 1, NULL), 0);
		CHECK_EQ(emu_set_aside(rig->r, AT(50, 1), 1), 1);
		CHECK_EQ(emu_uffd_fill(rig->uffd, EMU_FILL_POISON, (uintptr_t)emu_frame(rig->r, 50), NULL, EMU_FRAME_SIZE,
		                       false, &done, &eagain), 0);
		CHECK_EQ(madvise(emu_side(rig->r, 50), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
		atomic_store(&miscounts, true);
		CHECK_EQ(emu_move(rig->r, 50, 1, true, &done), -EEXIST);
		atomic_store(&miscounts, false);
		CHECK_EQ(rig_stat(rig, "uffd_miscounted"), 0);
		CHECK_EQ(madvise(emu_frame(rig->r, 60), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
		CHECK_EQ(emu_uffd_fill(rig->uffd, EMU_FILL_POISON, (uintptr_t)emu_frame(rig->r, 60), NULL, EMU_FRAME_SIZE,
		                       false, &done, &eagain), 0);
		CHECK(emu_guest_read(rig->r, 60ull << EMU_FRAME_SHIFT, got, sizeof(got), &p) < 0);
		CHECK_EQ(rig_stat(rig, "nr_lost"), 1);
	}
	const int verdict = rig && rig->r->have_poison ? 0 : SKIPPED;
	if (rig)
		rig_close(rig);
	emu_uffd_ioctl = real;
	return verdict;
}

const struct test move_tests[] = {
	{ "move: pages moved unsaid", pages_moved_unsaid },
	{ "move: a place that is taken", a_place_that_is_taken },
	{ "move: a stale copy isn't what moved", a_stale_copy_isnt_what_moved },
	{ "move: what is nowhere hasn't moved", what_is_nowhere_hasnt_moved },
	{ "move: a marker isn't what moved", a_marker_isnt_what_moved },
	{ NULL, NULL },
};
