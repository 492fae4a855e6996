/* SPDX-License-Identifier: MIT */
/* The charge gate: what is charged is what is there; nobody gets over the max; who waits gets on, or fails in time. */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct emu_gate *gate_of(int64_t max)
{
	struct emu_gate *g = mmap(NULL, sizeof(*g), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(g != MAP_FAILED);
	CHECK_EQ(emu_gate_init(g, max), 0);
	return g;
}

static int what_is_charged_is_what_is_there(void)
{
	int ran = 0;

	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, 1024, 0);
		struct emu_gate *g = gate_of(100000);
		uint8_t page[3 * EMU_FRAME_SIZE] = { 1 };
		struct emu_progress p;
		uint64_t bad[1];

		if (!rig)
			continue;
		rig_swap_on(rig, 1 << 24, -1, 0);
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 100, 7, 1, NULL), 0); /* before */
		CHECK_EQ(emu_gate_attach(rig->r, g, 5, 1000), 0);
		CHECK_EQ(emu_gate_attach(rig->r, g, 6, 1000), -EBUSY);
		rig_check_books(rig);
		CHECK_EQ(rig_run(rig, EMU_FILL, 100, 400, 7, 2, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 600, 100, 7, 1, NULL), 0);
		CHECK_EQ(emu_guest_write(rig->r, 700 << 12, page, sizeof(page), &p), 0);
		rig_check_books(rig);
		CHECK_EQ(emu_set_aside(rig->r, &(struct emu_range){ 0, 200, 0 }, 1, 1), 200);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 100, 7, 1, bad), 0);
		rig_check_books(rig);
		CHECK_EQ(emu_swap_out(rig->r, &(struct emu_range){ 50, 300, 0 }, 1), 200); /* not what is aside for others */
		rig_check_books(rig);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 500, 7, 1, bad), 0);
		CHECK_EQ(bad[0], 0);
		rig_check_books(rig);
		CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 10, 10, 0 }, 1), 10);
		CHECK(emu_discard(rig->r, &(struct emu_range){ 100, 800, 0 }, 1) > 0);
		rig_check_books(rig);
		CHECK_EQ(emu_gate_charged(g), g->slot[5].charged);
		CHECK_EQ(g->peak >= 603, 1);
		rig_close(rig);
		CHECK_EQ(emu_gate_charged(g), 0);
		munmap(g, sizeof(*g));
		ran++;
	}
	return ran ? 0 : SKIPPED;
}

static void *give_back(void *arg)
{
	struct rig *rig = arg;

	nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
	CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 0, 64, 0 }, 1), 64);
	return NULL;
}

static int who_waits_gets_on_or_fails(void)
{
	for (int i = 0; i < 2; i++) {
		struct rig *rig = rig_open_nth(i, 1024, 0), *other = rig_open_nth(i, 1024, 0);
		struct emu_gate *g = gate_of(256);
		struct emu_gate_slot slot;
		pthread_t thread;
		uint64_t t0;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(emu_gate_attach(rig->r, g, 0, 5000), 0);
		CHECK_EQ(emu_gate_attach(other->r, g, 1, 100), 0);
		CHECK_EQ(rig_run(other, EMU_TOUCH_WRITE, 0, 100, 0, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 120, 0, 1, NULL), 0);
		CHECK_EQ(pthread_create(&thread, NULL, give_back, other), 0);
		t0 = emu_now_ns();
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 120, 70, 0, 1, NULL), 0);
		CHECK(emu_now_ns() - t0 > 30000000); /* it waited */
		CHECK_EQ(pthread_join(thread, NULL), 0);
		CHECK_EQ(emu_gate_slot_read(g, 0, &slot), 0);
		CHECK(slot.throttled > 0 && slot.throttled_ns > 0 && !slot.failed);
		/* and nobody gives back: an error in time, and the frame can be had later */
		CHECK_EQ(rig_run(other, EMU_TOUCH_WRITE, 200, 300, 0, 1, NULL), -ENOMEM);
		CHECK_EQ(rig_stat(other, "nr_lost"), 0);
		CHECK(emu_gate_charged(g) <= 256 && g->peak <= 256);
		CHECK_EQ(emu_gate_slot_read(g, 1, &slot), 0);
		CHECK(slot.failed >= 1);
		rig_check_books(rig);
		rig_check_books(other);
		emu_gate_set_max(g, 2000);
		CHECK_EQ(rig_run(other, EMU_TOUCH_WRITE, 500, 300, 0, 1, NULL), 0);
		rig_close(rig);
		rig_close(other);
		CHECK_EQ(emu_gate_charged(g), 0);
		munmap(g, sizeof(*g));
	}
	return 0;
}

/* Four processes at a gate that is too small for them; each has a worker, so that all get on. One is killed. */
static int processes_at_a_gate(void)
{
	enum { N = 4, MAX = 6000 };
	struct emu_gate *g = gate_of(MAX);
	struct rig *probe = rig_open_nth(0, 8, 0);
	pid_t pid[N];

	if (!probe)
		return SKIPPED;
	rig_close(probe);
	for (int i = 0; i < N; i++) {
		pid[i] = fork();
		CHECK(pid[i] >= 0);
		if (!pid[i]) {
			struct rig *rig = rig_open_nth(0, 4096, 0);
			uint64_t bad[1];

			CHECK_EQ(emu_gate_attach(rig->r, g, i, 20000), 0);
			rig_swap_on(rig, 64 << 20, -1, 0);
			CHECK_EQ(emu_swapd_start(rig->r), 0);
			for (int round = 0; round < 3; round++) {
				CHECK_EQ(rig_run(rig, EMU_SET, 0, 3000, (uint64_t)(round + i), 2, NULL), 0);
				CHECK_EQ(rig_run(rig, EMU_FILL, 3000, 500, (uint64_t)(round + i), 2, NULL), 0);
				CHECK_EQ(rig_run(rig, EMU_VERIFY, 3000, 500, (uint64_t)(round + i), 2, bad), 0);
				CHECK_EQ(bad[0], 0);
				if (i == 0 && round == 1)
					raise(SIGKILL);
			}
			CHECK_EQ(emu_swapd_drain(rig->r), 0);
			rig_check_books(rig);
			rig_close(rig);
			_exit(0);
		}
	}
	for (int i = 0; i < N; i++) {
		int status;

		CHECK_EQ(waitpid(pid[i], &status, 0), pid[i]);
		CHECK_EQ(status, i ? 0 : SIGKILL);
		if (!i)
			CHECK(emu_gate_release(g, i) > 0);
	}
	CHECK_EQ(emu_gate_charged(g), 0);
	CHECK(g->peak <= MAX + N * (EMU_STALE_RING + 16 * 16)); /* forced charges only */
	munmap(g, sizeof(*g));
	return 0;
}

const struct test gate_tests[] = {
	{ "gate: what is charged is what is there", what_is_charged_is_what_is_there },
	{ "gate: who waits gets on, or fails in time", who_waits_gets_on_or_fails },
	{ "gate: processes at a gate", processes_at_a_gate },
	{ NULL, NULL },
};
