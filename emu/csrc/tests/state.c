/* SPDX-License-Identifier: MIT */
#include "harness.h"

/* The legal transitions, written down a second time: Z zero, M zeromap, R resident, L lazy, B busy, X lost. */
static int transitions_are_the_table(void)
{
	static const char *const legal[] = { "ZB", "MB", "MR", "RB", "LB", "BZ", "BM", "BR", "BL", "BX", "XB", NULL };
	static const char names[] = "ZMRLBX";

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
	{ "state: a waiter on BUSY is woken", a_waiter_on_busy_is_woken },
	{ "stats: histogram buckets are an eighth of an octave", histogram_buckets_are_an_eighth_of_an_octave },
	{ NULL, NULL },
};
