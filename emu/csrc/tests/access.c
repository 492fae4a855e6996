/* SPDX-License-Identifier: MIT */
/* Accessed and dirty bits: exact when nothing else runs, and never lost when something does. */
#include "harness.h"

#include <string.h>

static int bits_are_what_was_done(void)
{
	for (int i = 0; i < 3; i++) {
		struct rig *rig = rig_open(1024, services[i], 1, 0);
		uint8_t bits[1024], page[2 * EMU_FRAME_SIZE] = { 1 };
		struct emu_progress p;

		if (!rig)
			continue;
		CHECK_EQ(emu_access_harvest(rig->r, 0, 8, 3, bits), -EOPNOTSUPP);
		CHECK_EQ(emu_access_track(rig->r, 1), 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 100, 0, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_FILL, 50, 200, 7, 3, NULL), 0);
		CHECK_EQ(emu_guest_write(rig->r, 300 << 12, page, sizeof(page), &p), 0);
		CHECK_EQ(emu_guest_read(rig->r, (400 << 12) + 4000, page, 200, &p), 0);
		CHECK_EQ(emu_access_harvest(rig->r, 0, 1024, EMU_DIRTIED, bits), 0);
		for (int k = 0; k < 1024; k++)
			CHECK_EQ(bits[k], (k >= 50 && k < 250) || k == 300 || k == 301 ? EMU_DIRTIED : 0);
		CHECK_EQ(emu_access_harvest(rig->r, 0, 1024, 3, bits), 0);
		for (int k = 0; k < 1024; k++)
			CHECK_EQ(bits[k], k < 250 || k == 300 || k == 301 || k == 400 || k == 401 ? EMU_ACCESSED : 0);
		CHECK_EQ(emu_access_harvest(rig->r, 0, 1024, 3, bits), 0);
		for (int k = 0; k < 1024; k++)
			CHECK_EQ(bits[k], 0);
		/* resident ones, which are touched in runs */
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 60, 150, 0, 1, NULL), 0);
		CHECK_EQ(emu_access_harvest(rig->r, 0, 1024, 3, bits), 0);
		for (int k = 0; k < 1024; k++)
			CHECK_EQ(bits[k], k >= 60 && k < 210 ? 3 : 0);
		CHECK_EQ(emu_access_harvest(rig->r, 1000, 100, 3, bits), -ERANGE);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

static int ages_and_victims(void)
{
	struct rig *rig = rig_open_nth(0, 2048, 0);
	uint64_t ages[256];
	struct emu_range victim[16];
	size_t n;

	if (!rig)
		return SKIPPED;
	/* without bits all are alike: in turn */
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 1024, 0, 1, NULL), 0);
	CHECK_EQ(emu_access_victims(rig->r, 0, 100, EMU_ANY_USAGE, victim, 16, &n), 100);
	CHECK_EQ(victim[0].gfn, 0);
	CHECK_EQ(emu_access_victims(rig->r, 0, 1000, EMU_ANY_USAGE, victim, 16, &n), 1000);
	CHECK_EQ(victim[0].gfn, 100);
	CHECK_EQ(victim[1].gfn, 0);
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	for (uint64_t k = 0; k < 4; k++) {
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, k * 256, 1024 - k * 256, 0, 1, NULL), 0);
		CHECK_EQ(emu_access_scan(rig->r, ages), 0);
	}
	for (int k = 0; k < 4; k++)
		CHECK_EQ(ages[k], 256);
	CHECK_EQ(emu_access_victims(rig->r, 0, 300, EMU_ANY_USAGE, victim, 16, &n), 300);
	CHECK_EQ(n, 2); /* from where it was, and round */
	CHECK_EQ(victim[0].gfn, 76);
	CHECK_EQ(victim[0].count, 256 - 76 + 44);
	CHECK_EQ(victim[1].gfn, 0);
	CHECK_EQ(emu_access_victims(rig->r, 2, 5000, EMU_ANY_USAGE, victim, 16, &n), 512);
	CHECK_EQ(emu_access_victims(rig->r, 9, 5000, EMU_ANY_USAGE, victim, 16, &n), 0);
	/* an access since the scan is seen */
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 256, 0, 1, NULL), 0);
	CHECK_EQ(emu_access_victims(rig->r, 2, 5000, EMU_ANY_USAGE, victim, 16, &n), 256);
	CHECK_EQ(victim[0].gfn, 256);
	rig_close(rig);
	return 0;
}

static int what_the_kernel_saw_written(void)
{
	struct rig *rig = rig_open(1024, EMU_SERVICE_INLINE, 1, RIG_WP_ASYNC);
	int64_t n;

	if (!rig)
		return SKIPPED;
	rig_lend_side(rig);
	CHECK_EQ(emu_region_aside_how(rig->r), 2);
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 500, 7, 1, NULL), 0);
	n = emu_access_written(rig->r);
	if (n == -EOPNOTSUPP) {
		rig_close(rig);
		return SKIPPED;
	}
	CHECK_EQ(n, 500);
	CHECK_EQ(emu_access_written(rig->r), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 500, 7, 1, NULL), 0);
	CHECK_EQ(emu_access_written(rig->r), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 100, 50, 7, 1, NULL), 0);
	CHECK_EQ(emu_access_written(rig->r), 50);
	/* what was away counts as written when it is back */
	CHECK_EQ(emu_set_aside(rig->r, &(struct emu_range){ 0, 20, 0 }, 1, 1), 20);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 20, 7, 1, NULL), 0);
	CHECK_EQ(emu_access_written(rig->r), 20);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

/*
 * The race that the lines are for: a writer writes a counter into its page through the core, again and again; a harvester
 * takes the dirty bit and then copies the page ("writeback").  If the bit is gone at the end, the copy is what the page
 * holds.
 */
struct duel {
	struct rig *rig;
	_Atomic int stop;
	uint8_t written[EMU_FRAME_SIZE];
	uint64_t harvests;
};

static void *harvester(void *arg)
{
	struct duel *d = arg;
	struct emu_progress p;
	uint8_t bits;

	while (!atomic_load(&d->stop)) {
		CHECK_EQ(emu_access_harvest(d->rig->r, 0, 1, EMU_DIRTIED, &bits), 0);
		if (bits & EMU_DIRTIED) {
			CHECK_EQ(emu_guest_read(d->rig->r, 0, d->written, EMU_FRAME_SIZE, &p), 0);
			d->harvests++;
		}
	}
	return NULL;
}

static int duel(uint32_t disable)
{
	const char *seconds = getenv("STORM");
	const uint64_t end = emu_now_ns() + (uint64_t)((seconds ? atof(seconds) : 0.4) * 1e9);
	struct rig *rig = rig_open(8, EMU_SERVICE_INLINE, 1, disable);
	struct duel d = { .rig = rig };
	uint64_t round = 0;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	while (emu_now_ns() < end) {
		uint8_t bits, now[EMU_FRAME_SIZE];
		struct emu_progress p;
		pthread_t thread;

		atomic_store(&d.stop, 0);
		CHECK_EQ(pthread_create(&thread, NULL, harvester, &d), 0);
		for (int k = 0; k < 300; k++, round++)
			CHECK_EQ(emu_guest_write(rig->r, 0, &round, sizeof(round), &p), 0);
		atomic_store(&d.stop, 1);
		CHECK_EQ(pthread_join(thread, NULL), 0);
		CHECK_EQ(emu_access_harvest(rig->r, 0, 1, EMU_DIRTIED, &bits), 0);
		CHECK_EQ(emu_guest_read(rig->r, 0, now, sizeof(now), &p), 0);
		if (bits)
			memcpy(d.written, now, sizeof(now));
		CHECK_EQ(memcmp(d.written, now, sizeof(now)), 0);
	}
	CHECK(d.harvests > 0);
	rig_close(rig);
	return 0;
}
static int no_dirty_bit_is_lost(void)
{
	return duel(0);
}
static int nor_without_membarrier(void)
{
	return duel(EMU_NO_MEMBARRIER);
}

const struct test access_tests[] = {
	{ "access: bits are what was done", bits_are_what_was_done },
	{ "access: ages and victims", ages_and_victims },
	{ "access: what the kernel saw written", what_the_kernel_saw_written },
	{ "access: no dirty bit is lost", no_dirty_bit_is_lost },
	{ "access: nor without membarrier", nor_without_membarrier },
	{ NULL, NULL },
};
