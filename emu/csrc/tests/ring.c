/* SPDX-License-Identifier: MIT */
#include "harness.h"

static int a_full_ring_drops_the_new_and_counts(void)
{
	struct rig *rig = rig_open(16, EMU_SERVICE_OFF, 1, 0);
	struct emu_event *events = calloc(5000, sizeof(*events));

	for (int lap = 0; lap < 3; lap++) {
		for (uint64_t i = 0; i < 4100; i++)
			emu_ring_push(rig->r, EMU_EV_FAULT, i, 1, 0);
		CHECK_EQ(rig_stat(rig, "ring_overflow"), 4 * (lap + 1));
		CHECK_EQ(emu_ring_drain(rig->r, events, 5000), 4096);
		for (uint64_t i = 0; i < 4096; i++)
			CHECK_EQ(events[i].gfn, i);
		CHECK_EQ(emu_ring_drain(rig->r, events, 5000), 0);
	}
	free(events);
	rig_close(rig);
	return 0;
}

static void *writer(void *arg)
{
	for (uint64_t i = 0; i < 50000; i++)
		emu_ring_push(arg, EMU_EV_FAULT, i, 1, (int)emu_thread.stripe);
	return NULL;
}

static int many_writers_lose_nothing_uncounted(void)
{
	struct rig *rig = rig_open(16, EMU_SERVICE_OFF, 1, 0);
	struct emu_event events[256];
	pthread_t writers[3];
	int64_t got = 0;

	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_create(&writers[i], NULL, writer, rig->r), 0);
	while (got + rig_stat(rig, "ring_overflow") < 150000)
		got += (int64_t)emu_ring_drain(rig->r, events, 256);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_join(writers[i], NULL), 0);
	got += (int64_t)emu_ring_drain(rig->r, events, 256);
	CHECK_EQ(got + rig_stat(rig, "ring_overflow"), 150000);
	CHECK(got >= 4096);
	rig_close(rig);
	return 0;
}

const struct test ring_tests[] = {
	{ "ring: a full ring drops the new and counts", a_full_ring_drops_the_new_and_counts },
	{ "ring: many writers lose nothing uncounted", many_writers_lose_nothing_uncounted },
	{ NULL, NULL },
};
