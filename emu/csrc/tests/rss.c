/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "harness.h"

#include <sys/mman.h>

static struct emu_look look(struct rig *rig, bool everything, uint64_t rotate)
{
	const uint64_t before = emu_rss_rotate;
	struct emu_look ret;

	emu_rss_rotate = rotate;
	CHECK_EQ(emu_rss_look(rig->r, everything, &ret), 0);
	emu_rss_rotate = before;
	return ret;
}

static int64_t discard_range(struct rig *rig, uint64_t gfn, uint64_t count)
{
	return emu_discard(rig->r, &(struct emu_range){ gfn, count, 0 }, 1);
}

/* Only what changed is asked about, and the sum is the kernel's. */
static int a_look_asks_where_something_changed(void)
{
	for (int s = 0; s < 3; s++) {
		struct rig *rig = rig_open(100 * 512 + 7, services[s], 1, 0);

		if (!rig)
			return SKIPPED;
		CHECK_EQ(look(rig, false, 0).rss, 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, rig->frames, 0, 2, NULL), 0);
		CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames);
		CHECK_EQ(look(rig, false, 0).asked, 0);
		CHECK_EQ(discard_range(rig, 512 * 40, 500), 500);
		CHECK_EQ(discard_range(rig, 512 * 50, 512), 512);
		CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames - 1012);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 512 * 50, 512, 0, 1, NULL), 0); /* zero pages aren't resident */
		CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames - 1012);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 512 * 50, 12, 0, 1, NULL), 0); /* and become so without a fault */
		CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames - 1000);
		CHECK_EQ(look(rig, false, 0).asked, 0);
		CHECK(!look(rig, false, 0).whole);
		CHECK(look(rig, true, 0).whole);
		CHECK_EQ(look(rig, true, 0).asked, (int64_t)rig->frames - 500); /* 500 of block 50 are zero pages: present, too */
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

/* What nobody told us of is found by the rotation, a part at a time, and by a look at everything at once. */
static int what_happens_behind_our_back_shows(void)
{
	struct rig *rig = rig_open(64 * 512, EMU_SERVICE_OFF, 1, 0);
	int looks = 0;

	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, rig->frames, 0, 1, NULL), 0);
	CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames);
	CHECK_EQ(madvise(emu_frame(rig->r, 512 * 60), 512 * EMU_FRAME_SIZE, MADV_DONTNEED), 0);
	CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames);
	while (look(rig, false, 8 * 512).rss == (int64_t)rig->frames)
		CHECK(++looks < 8);
	CHECK(looks >= 6);
	CHECK_EQ(look(rig, false, 0).rss, (int64_t)rig->frames - 512);
	CHECK_EQ(madvise(emu_frame(rig->r, 512 * 3), 100 * EMU_FRAME_SIZE, MADV_DONTNEED), 0);
	CHECK_EQ(look(rig, true, 0).rss, (int64_t)rig->frames - 612);
	/* a rotation that gets round says so, a part of one doesn't, and wherever it starts it comes round the end */
	CHECK(look(rig, false, rig->frames).whole);
	for (int i = 0; i < 200; i++) {
		struct emu_look part = look(rig, false, 5000), whole;

		CHECK(!part.whole && part.asked < 5000 + 512);
		CHECK_EQ(madvise(emu_frame(rig->r, 512 * 10 + (uint64_t)i), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
		whole = look(rig, false, rig->frames);
		CHECK(whole.whole);
		CHECK_EQ(whole.rss, rig_rss(rig));
	}
	/* what came behind our back shows, too, though all that was known is gone */
	CHECK_EQ(discard_range(rig, 0, rig->frames) > 0, 1);
	CHECK_EQ(look(rig, false, rig->frames).rss, 0);
	for (uint64_t gfn = 512 * 20; gfn < 512 * 21; gfn++)
		*(volatile uint8_t *)emu_frame(rig->r, gfn) = 1;
	CHECK_EQ(look(rig, false, rig->frames).rss, 512);
	CHECK_EQ(look(rig, false, rig->frames).whole, 1);
	rig_close(rig);
	return 0;
}

const struct test rss_tests[] = {
	{ "rss: a look asks where something changed", a_look_asks_where_something_changed },
	{ "rss: what happens behind our back shows", what_happens_behind_our_back_shows },
	{ NULL, NULL },
};
