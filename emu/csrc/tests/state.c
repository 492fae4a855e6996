/* SPDX-License-Identifier: MIT */
#include "harness.h"

#include <string.h>

/* The legal transitions, written down a second time: Z zero, M zeromap, R resident, L lazy, B busy, X lost, A aside,
 * P preserved, D discarded. */
static int transitions_are_the_table(void)
{
	static const char *const legal[] = { "ZB", "MB", "MR", "RB", "LB", "BZ", "BM", "BR", "BL", "BX", "XB",
		                             "BA", "AB", "BP", "PB", "BD", "DB", NULL };
	static const char names[] = "ZMRLBXAPD";

	for (int from = 0; from < EMU_NR_STATES; from++)
		for (int to = 0; to < EMU_NR_STATES; to++) {
			int want = 0;

			for (int i = 0; legal[i]; i++)
				want |= legal[i][0] == names[from] && legal[i][1] == names[to];
			CHECK_EQ(emu_state_legal((uint8_t)from, (uint8_t)to, true), want);
			want |= from == EMU_ZERO && (to == EMU_RESIDENT || to == EMU_ZEROMAP);
			CHECK_EQ(emu_state_legal((uint8_t)from, (uint8_t)to, false), want);
		}
	CHECK(!emu_state_legal(EMU_NR_STATES, 0, true));
	return 0;
}

static int a_claim_is_won_once_and_the_summary_follows(void)
{
	struct rig *rig = rig_open(1024, EMU_SERVICE_OFF, 1, 0);

	CHECK(emu_state_try(rig->r, 600, EMU_ZERO, EMU_RESIDENT));
	CHECK_EQ(atomic_load(&rig->r->summary[1]), 1);
	CHECK(emu_state_try(rig->r, 600, EMU_RESIDENT, EMU_BUSY));
	CHECK(!emu_state_try(rig->r, 600, EMU_RESIDENT, EMU_BUSY));
	emu_state_publish(rig->r, 600, EMU_ZERO);
	CHECK_EQ(atomic_load(&rig->r->summary[1]), 0);
	CHECK_EQ(atomic_load(&rig->r->summary[0]), 0);
	rig_close(rig);
	return 0;
}

/* By words where they fit and by bytes elsewhere, and never past a frame that is in another state. */
static int runs_are_claimed_up_to_what_differs(void)
{
	for (uint64_t start = 500; start < 510; start++)
		for (uint64_t other = start; other < start + 30; other++) {
			struct rig *rig = rig_open(1024, EMU_SERVICE_OFF, 1, 0);
			const uint64_t n = other - start < 25 ? other - start : 25;

			CHECK(emu_state_try(rig->r, other, EMU_ZERO, EMU_RESIDENT));
			CHECK_EQ(emu_state_claim(rig->r, start, 25, EMU_ZERO), n);
			for (uint64_t g = 490; g < 550; g++) {
				bool ours = g >= start && g < start + n;

				CHECK_EQ(emu_state_load(rig->r, g), ours ? EMU_BUSY : g == other ? EMU_RESIDENT : EMU_ZERO);
			}
			CHECK_EQ(atomic_load(&rig->r->summary[0]) + atomic_load(&rig->r->summary[1]), n + 1);
			emu_state_publish_run(rig->r, start, n, EMU_ZERO);
			CHECK_EQ(atomic_load(&rig->r->summary[0]) + atomic_load(&rig->r->summary[1]), 1);
			CHECK_EQ(atomic_load(&rig->r->summary[other / 512]), 1);
			rig_close(rig);
		}
	return 0;
}

static int a_tally_counts_every_frame_once(void)
{
	enum { FREE = EMU_OWNER_FREE, ANON = EMU_OWNER_ANON, SHMEM = EMU_OWNER_SHMEM, PCP = EMU_OWNER_PCP };
	struct rig *rig = rig_open(1300, EMU_SERVICE_OFF, 1, 0);
	/* anonymous: [100, 700) by the descriptors; on per-CPU lists: [700, 701) and [1299, 1300), by the ranges */
	const struct emu_range used = { 100, 600, 0 }, listed[] = { { 700, 1, PCP }, { 1299, 1, PCP } };
	const struct emu_range overlapping[] = { { 5, 2, ANON }, { 6, 1, ANON } };
	const struct emu_range nobodys = { 5, 2, EMU_NR_OWNERS }, outside = { 1299, 2, ANON }, over = { 690, 20, SHMEM };
	uint32_t n[3][EMU_NR_OWNERS][EMU_NR_TALLIES] = { 0 }, all = 0;
	struct emu_memmap *m, *other;

	CHECK_EQ(emu_memmap_create(1300, &m), 0);
	CHECK_EQ(emu_memmap_create(1299, &other), 0);
	CHECK_EQ(emu_pages_use(m, &used, 1, EMU_OWNER_ANON), 0);
	CHECK_EQ(emu_pages_use(m, &over, 1, EMU_OWNER_ANON), -EBUSY);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 90, 30, 0, 1, NULL), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 699, 2, 0, 1, NULL), 0);
	CHECK_EQ(emu_states_tally(rig->r, m, listed, 2, 512, &n[0][0][0]), 0);
	CHECK_EQ(n[0][FREE][EMU_RESIDENT], 10);
	CHECK_EQ(n[0][FREE][EMU_ZERO], 90);
	CHECK_EQ(n[0][ANON][EMU_RESIDENT], 20);
	CHECK_EQ(n[0][ANON][EMU_ZERO], 392);
	CHECK_EQ(n[1][ANON][EMU_ZERO], 187);
	CHECK_EQ(n[1][ANON][EMU_ZEROMAP], 1);
	CHECK_EQ(n[1][PCP][EMU_ZEROMAP], 1);
	CHECK_EQ(n[1][FREE][EMU_ZERO], 323);
	CHECK_EQ(n[2][FREE][EMU_ZERO], 275);
	CHECK_EQ(n[2][PCP][EMU_ZERO], 1);
	for (size_t i = 0; i < sizeof(n) / sizeof(all); i++)
		all += (&n[0][0][0])[i];
	CHECK_EQ(all, 1300);
	/* a range comes before what the descriptors say */
	memset(n, 0, sizeof(n));
	CHECK_EQ(emu_states_tally(rig->r, m, &over, 1, 512, &n[0][0][0]), 0);
	CHECK_EQ(n[1][SHMEM][EMU_ZERO] + n[1][SHMEM][EMU_ZEROMAP], 20);
	CHECK_EQ(n[1][ANON][EMU_ZERO], 690 - 512);
	CHECK_EQ(emu_states_tally(rig->r, other, listed, 2, 512, &n[0][0][0]), -EINVAL);
	CHECK_EQ(emu_states_tally(rig->r, m, overlapping, 2, 512, &n[0][0][0]), -EINVAL);
	CHECK_EQ(emu_states_tally(rig->r, m, &nobodys, 1, 512, &n[0][0][0]), -EINVAL);
	CHECK_EQ(emu_states_tally(rig->r, m, &outside, 1, 512, &n[0][0][0]), -ERANGE);
	emu_memmap_destroy(other);
	emu_memmap_destroy(m);
	rig_close(rig);
	return 0;
}

static void *wait_for_it(void *arg)
{
	struct rig *rig = arg;

	while (emu_state_load(rig->r, 5) == EMU_BUSY)
		emu_state_wait(rig->r, 5);
	return NULL;
}

static int a_waiter_on_busy_is_woken(void)
{
	struct rig *rig = rig_open(16, EMU_SERVICE_OFF, 1, 0);
	pthread_t waiters[4];

	CHECK(emu_state_try(rig->r, 5, EMU_ZERO, EMU_RESIDENT));
	CHECK(emu_state_try(rig->r, 5, EMU_RESIDENT, EMU_BUSY));
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_create(&waiters[i], NULL, wait_for_it, rig), 0);
	while (rig_stat(rig, "busy_wait") < 4)
		;
	emu_state_publish(rig->r, 5, EMU_ZERO);
	emu_state_wake(rig->r, 5, 1);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_join(waiters[i], NULL), 0);
	rig_close(rig);
	return 0;
}

static int histogram_buckets_are_an_eighth_of_an_octave(void)
{
	struct emu_hist h = { 0 };
	static const struct { uint64_t ns; int bucket; } want[] = {
		{ 0, 0 }, { 7, 7 }, { 8, 8 }, { 9, 9 }, { 15, 15 }, { 16, 16 }, { 17, 16 }, { 18, 17 }, { 1024, 64 }, { 1151, 64 },
		{ 1152, 65 },
	};

	for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
		uint64_t before = h.bucket[want[i].bucket];

		emu_hist_add(&h, want[i].ns);
		CHECK_EQ(h.bucket[want[i].bucket], before + 1);
		CHECK(emu_hist_floor(want[i].bucket) <= want[i].ns);
		CHECK(emu_hist_floor(want[i].bucket + 1) > want[i].ns);
	}
	CHECK_EQ(h.count, sizeof(want) / sizeof(want[0]));
	CHECK_EQ(h.max, 1152);
	emu_hist_add(&h, UINT64_MAX);
	CHECK_EQ(h.bucket[EMU_HIST_BUCKETS - 1], 1);
	return 0;
}

const struct test state_tests[] = {
	{ "state: transitions are the table", transitions_are_the_table },
	{ "state: a claim is won once and the summary follows", a_claim_is_won_once_and_the_summary_follows },
	{ "state: runs are claimed up to what differs", runs_are_claimed_up_to_what_differs },
	{ "state: a tally counts every frame once", a_tally_counts_every_frame_once },
	{ "state: a waiter on BUSY is woken", a_waiter_on_busy_is_woken },
	{ "stats: histogram buckets are an eighth of an octave", histogram_buckets_are_an_eighth_of_an_octave },
	{ NULL, NULL },
};
