/* SPDX-License-Identifier: MIT */
/* Frames in the store: each tier, each failure of it, and that what can't be stored isn't lost. */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define ALL(frames) (&(struct emu_range){ 0, frames, 0 }), 1
#define MIB (1ull << 20)

static void write_pages(struct rig *rig, uint64_t frames, unsigned seed, unsigned noise)
{
	static uint64_t page[512];
	struct emu_progress p;

	/* every fourth page is one word; the others are noise in `noise` of 8 words, and a count in the rest */
	for (uint64_t gfn = 0; gfn < frames; gfn++) {
		uint64_t x = seed * 0x9e3779b97f4a7c15u + gfn + 1;

		for (size_t i = 0; i < 512; i++) {
			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
			page[i] = gfn % 4 == 3 ? gfn : i % 8 < noise ? x : gfn * 512 + i;
		}
		CHECK_EQ(emu_guest_write(rig->r, gfn << 12, page, sizeof(page), &p), 0);
	}
}

static uint64_t sum_page(struct rig *rig, uint64_t gfn)
{
	uint64_t page[512], sum = 0;
	struct emu_progress p;

	CHECK_EQ(emu_guest_read(rig->r, gfn << 12, page, sizeof(page), &p), 0);
	for (size_t i = 0; i < 512; i++)
		sum = sum * 31 + page[i];
	return sum;
}

static int file_of(void)
{
	int fd = memfd_create("emu-test", MFD_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

static void check_out_and_in(struct rig *rig, uint64_t memory, int fd, uint64_t file, uint64_t frames)
{
	uint64_t *sums = calloc(frames, sizeof(*sums));
	struct emu_store_info info;

	rig_swap_on(rig, memory, fd, file);
	for (int round = 0; round < 3; round++) {
		write_pages(rig, frames, (unsigned)round, 3);
		for (uint64_t i = 0; i < frames; i++)
			sums[i] = sum_page(rig, i);
		CHECK_EQ(emu_swap_out(rig->r, ALL(frames)), frames);
		CHECK_EQ(rig_stat(rig, "nr_preserved"), frames);
		CHECK_EQ(rig_rss(rig), 0);
		CHECK_EQ(rig_side_rss(rig), 0);
		rig_check_books(rig);
		CHECK_EQ(emu_swap_info(rig->r, &info), 0);
		CHECK_EQ(info.same, frames / 4);
		CHECK(!info.lz4 || info.object_bytes < (int64_t)(frames * 3 / 4 * EMU_FRAME_SIZE * 3 / 4));
		CHECK_EQ(info.error, 0);
		if (round == 1) {
			CHECK_EQ(emu_swap_back(rig->r, ALL(frames)), frames);
			CHECK_EQ(rig_stat(rig, "nr_resident"), frames);
		}
		if (round == 2) /* against the stream */
			for (uint64_t i = frames; i--;)
				CHECK_EQ(sum_page(rig, i), sums[i]);
		for (uint64_t i = 0; i < frames; i++)
			CHECK_EQ(sum_page(rig, i), sums[i]);
		CHECK_EQ(rig_stat(rig, "nr_preserved"), 0);
		rig_check_books(rig);
	}
	CHECK_EQ(rig_stat(rig, "swap_out_frames"), 3 * frames);
	CHECK_EQ(rig_stat(rig, "swap_in_frames"), 3 * frames);
	CHECK(rig_stat(rig, "swap_readahead") > (int64_t)frames / 2);
	free(sums);
}

static int out_and_in(void)
{
	int ran = 0;

	for (int i = 0; i < RIGS; i++)
		for (int tier = 0; tier < 3; tier++) {
			struct rig *rig = rig_open_nth(i, 700, 0);
			int fd = tier ? file_of() : -1;

			if (!rig)
				continue;
			/* the pool alone; the file alone; both, the pool too small for all */
			check_out_and_in(rig, tier == 0 ? 4 * MIB : tier == 1 ? 0 : MIB / 2, fd, tier ? 4 * MIB : 0, 700);
			rig_close(rig);
			if (fd >= 0)
				close(fd);
			ran++;
		}
	return ran ? 0 : SKIPPED;
}

static int without_lz4(void)
{
	struct rig *rig = rig_open_nth(0, 64, 0);
	struct emu_store_options o = { .memory = MIB, .fd = -1, .readahead = 1, .disable = EMU_NO_LZ4 };
	struct emu_store_info info;
	uint64_t bad[1];

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_swap_on(rig->r, &o), 0);
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
	CHECK_EQ(emu_swap_out(rig->r, ALL(64)), 64);
	CHECK_EQ(emu_swap_info(rig->r, &info), 0);
	CHECK_EQ(info.raw, 64);
	CHECK_EQ(info.lz4, 0);
	CHECK_EQ(info.object_bytes, 64 * EMU_FRAME_SIZE);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 64, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	CHECK_EQ(rig_stat(rig, "swap_readahead"), 0);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

/* What there is no room for stays in the guest, and places are used again. */
static int a_full_store(void)
{
	for (int tier = 0; tier < 2; tier++) {
		struct rig *rig = rig_open_nth(0, 1024, 0);
		int fd = tier ? file_of() : -1;
		struct emu_store_info info;
		int64_t went;
		uint64_t bad[1];

		if (!rig)
			return SKIPPED;
		rig_swap_on(rig, tier ? 0 : MIB, fd, tier ? MIB : 0);
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 1024, 7, 1, NULL), 0); /* noise: 1 MiB takes 256 pages */
		went = emu_swap_out(rig->r, ALL(1024));
		CHECK(went >= 192 && went <= 256);
		CHECK_EQ(rig_stat(rig, "nr_resident"), 1024 - went);
		CHECK(rig_stat(rig, "swap_failed") > 0);
		CHECK_EQ(emu_swap_info(rig->r, &info), 0);
		CHECK_EQ(info.error, ENOSPC);
		rig_check_books(rig);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 1024, 7, 1, bad), 0);
		CHECK_EQ(bad[0], 0);
		rig_check_books(rig);
		/* what is given back in the store makes room */
		CHECK_EQ(emu_swap_out(rig->r, ALL(128)), 128);
		CHECK_EQ(emu_discard(rig->r, ALL(64)), 64);
		CHECK_EQ(rig_stat(rig, "swap_dropped"), 64);
		CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 64, 8, 0 }, 1), 8);
		rig_check_books(rig);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 72, 952, 7, 1, bad), 0);
		CHECK_EQ(bad[0], 0);
		rig_close(rig);
		if (fd >= 0)
			close(fd);
	}
	return 0;
}

/* EFBIG by RLIMIT_FSIZE, and EBADF: a file that fails. */
static int a_failing_file(void)
{
	struct rlimit was, small = { .rlim_cur = 256 * 1024 };
	struct rig *rig = rig_open_nth(0, 512, 0);
	char path[] = "/tmp/emu-store-XXXXXX";
	struct emu_store_info info;
	struct emu_progress p;
	uint8_t got[8];
	uint64_t bad[1];
	int fd = mkstemp(path);

	if (!rig)
		return SKIPPED;
	CHECK(fd >= 0);
	unlink(path);
	signal(SIGXFSZ, SIG_IGN);
	rig_swap_on(rig, 0, fd, 4 * MIB);
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 512, 7, 1, NULL), 0);
	getrlimit(RLIMIT_FSIZE, &was);
	small.rlim_max = was.rlim_max;
	CHECK_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
	CHECK_EQ(emu_swap_out(rig->r, ALL(512)), 64);
	CHECK_EQ(setrlimit(RLIMIT_FSIZE, &was), 0);
	CHECK_EQ(emu_swap_info(rig->r, &info), 0);
	CHECK_EQ(info.error, EFBIG);
	CHECK_EQ(info.file_bytes, 64 * EMU_FRAME_SIZE);
	rig_check_books(rig);
	/* somebody cuts the file: an error in reading, which may be tried again, and no loss */
	CHECK_EQ(emu_guest_read(rig->r, 0, got, 8, &p), 0);
	CHECK_EQ(ftruncate(fd, 0), 0);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(emu_guest_read(rig->r, 60 << 12, got, 8, &p), -EIO);
		CHECK_EQ(p.bad_gfn, 60);
	}
	CHECK(rig_stat(rig, "nr_preserved") > 0);
	CHECK_EQ(rig_stat(rig, "nr_lost"), 0);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 64, 448, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	rig_check_books(rig);
	rig_close(rig);
	close(fd);
	return 0;
}

static int wrong_bytes_are_never_handed_out(void)
{
	int ran = 0;

	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, 64, 0);
		int fd = file_of();
		struct emu_progress p;
		uint8_t got[8], byte;
		uint64_t bad[1];

		if (!rig)
			continue;
		rig_swap_on(rig, MIB / 16, fd, MIB); /* noise goes to the file, and a page that compresses to the pool */
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
		for (int k = 0; k < 4096; k += 64)
			CHECK_EQ(emu_guest_write(rig->r, (2 << 12) + (uint64_t)k, "a line that compresses, sixty-four bytes of it, again and again.", 64, &p), 0);
		CHECK_EQ(rig_run(rig, EMU_SET, 3, 1, 9, 1, NULL), 0);
		CHECK_EQ(emu_swap_out(rig->r, ALL(64)), 64);
		CHECK_EQ(emu_swap_corrupt(rig->r, 2, 77), 0);
		CHECK_EQ(emu_swap_corrupt(rig->r, 3, 0), 0); /* the one word */
		CHECK_EQ(pread(fd, &byte, 1, 5000), 1);
		byte ^= 1;
		CHECK_EQ(pwrite(fd, &byte, 1, 5000), 1);
		for (uint64_t gfn = 2; gfn < 4; gfn++)
			for (int again = 0; again < 2; again++) {
				CHECK_EQ(emu_guest_read(rig->r, gfn << 12, got, 8, &p), -EHWPOISON);
				CHECK_EQ(p.bad_gfn, gfn);
			}
		CHECK_EQ(rig_stat(rig, "swap_corrupt"), 2);
		/* one page of the file, found where it is met; all the others are right */
		for (uint64_t gfn = 0; gfn < 64; gfn++)
			if (gfn != 2 && gfn != 3) {
				int err = rig_run(rig, EMU_VERIFY, gfn, 1, 7, 1, bad);

				CHECK(err == -EHWPOISON || (!err && !bad[0]));
			}
		CHECK_EQ(rig_stat(rig, "swap_corrupt"), 3);
		CHECK_EQ(rig_stat(rig, "nr_lost"), 3);
		rig_check_books(rig);
		CHECK_EQ(emu_unpoison(rig->r, ALL(64)), 3);
		rig_close(rig);
		close(fd);
		ran++;
	}
	return ran ? 0 : SKIPPED;
}

static int the_worker_takes_what_is_idle(void)
{
	struct rig *rig = rig_open_nth(0, 2048, 0);
	uint64_t ages[256], bad[1];
	uint8_t *states = malloc(2048);

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	rig_swap_on(rig, 16 * MIB, -1, 0);
	CHECK_EQ(emu_swapd_kick(rig->r, 1), -EOPNOTSUPP);
	CHECK_EQ(emu_swapd_start(rig->r), 0);
	CHECK_EQ(emu_swapd_start(rig->r), 0);
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 2048, 7, 1, NULL), 0);
	CHECK_EQ(emu_access_scan(rig->r, ages), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 1024, 7, 1, NULL), 0);
	CHECK_EQ(emu_access_scan(rig->r, ages), 0);
	CHECK_EQ(ages[0], 1024);
	CHECK_EQ(ages[1], 1024);
	CHECK_EQ(emu_swapd_kick(rig->r, 1000), 0);
	CHECK_EQ(emu_swapd_drain(rig->r), 0);
	CHECK_EQ(rig_stat(rig, "nr_preserved"), 1000);
	CHECK_EQ(emu_states_copy(rig->r, 0, 2048, states), 0);
	for (int i = 0; i < 1024; i++)
		CHECK_EQ(states[i], EMU_RESIDENT);
	rig_check_books(rig);
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 2048, 7, 1, bad), 0);
	CHECK_EQ(bad[0], 0);
	free(states);
	rig_close(rig);
	return 0;
}

const struct test swap_tests[] = {
	{ "swap: out and in, by every way and tier", out_and_in },
	{ "swap: without lz4", without_lz4 },
	{ "swap: a full store", a_full_store },
	{ "swap: a failing file", a_failing_file },
	{ "swap: wrong bytes are never handed out", wrong_bytes_are_never_handed_out },
	{ "swap: the worker takes what is idle", the_worker_takes_what_is_idle },
	{ NULL, NULL },
};
