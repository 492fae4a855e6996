/* SPDX-License-Identifier: MIT */
/* Hard cases of taking memory from a running guest: each was wrong once. */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AT(first, n) (&(struct emu_range){ first, n, 0 }), 1

static struct emu_gate *gate_of(int64_t max)
{
	struct emu_gate *g = aligned_alloc(64, sizeof(*g));

	CHECK_EQ(emu_gate_init(g, max), 0);
	return g;
}

static void verify(struct rig *rig, uint64_t first, uint64_t n)
{
	uint64_t bad;

	CHECK_EQ(rig_run(rig, EMU_VERIFY, first, n, 7, 1, &bad), 0);
	CHECK_EQ(bad, 0);
}

/* A locked page in the middle: what lies before it may be gone when the kernel refuses, and isn't lost. */
static int a_locked_page(void)
{
	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, 1024, 0);

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 1024, 7, 1, NULL), 0);
		CHECK_EQ(syscall(SYS_mlock, emu_frame(rig->r, 500), 3 * EMU_FRAME_SIZE), 0); /* TSan's own does nothing */
		CHECK_EQ(emu_set_aside(rig->r, AT(0, 1024), 1), 1021);
		rig_check_books(rig);
		verify(rig, 0, 1024);
		rig_check_books(rig);
		CHECK_EQ(syscall(SYS_munlock, emu_frame(rig->r, 500), 3 * EMU_FRAME_SIZE), 0);
		rig_close(rig);
	}
	return 0;
}

/* A page that was taken behind our back: whoever sets its neighbours aside neither waits for it nor takes it for one. */
static int a_hole(void)
{
	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, 64, 0);

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
		CHECK_EQ(madvise(emu_frame(rig->r, 5), EMU_FRAME_SIZE, MADV_DONTNEED), 0);
		CHECK_EQ(emu_set_aside(rig->r, AT(0, 64), 1), 63);
		verify(rig, 0, 5);
		verify(rig, 6, 58);
		CHECK(rig_run(rig, EMU_TOUCH_READ, 5, 1, 0, 1, NULL) < 0); /* lost, and says so */
		rig_close(rig);
	}
	return 0;
}

struct swapping {
	struct rig *rig;
	_Atomic int stop;
};

static void *swap_all(void *arg)
{
	struct swapping *s = arg;

	while (!atomic_load(&s->stop))
		CHECK(emu_swap_out(s->rig->r, AT(0, 2048)) >= 0);
	return NULL;
}

/* What the swapper has on its way isn't anybody else's to drop. */
static int dropping_any_doesnt_drop_what_is_swapped(void)
{
	struct swapping s = { .rig = rig_open_nth(0, 2048, 0) };
	pthread_t thread;

	if (!s.rig)
		return SKIPPED;
	rig_swap_on(s.rig, 64 << 20, -1, 0);
	CHECK_EQ(rig_run(s.rig, EMU_FILL, 0, 2048, 7, 1, NULL), 0);
	CHECK_EQ(emu_aside_drop(s.rig->r, AT(0, 8), EMU_STAMP_SWAP, 0), -EINVAL);
	CHECK_EQ(pthread_create(&thread, NULL, swap_all, &s), 0);
	for (int round = 0; round < 40; round++) {
		CHECK_EQ(emu_aside_drop(s.rig->r, AT(0, 2048), -1, round & 1), 0);
		verify(s.rig, 0, 2048);
	}
	atomic_store(&s.stop, 1);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	rig_check_books(s.rig);
	rig_close(s.rig);
	return 0;
}

/* A read error, then the frame is given back: the next access finds an empty frame, not the error's marker for ever. */
static int a_read_error_is_over_when_the_frame_is_given_back(void)
{
	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = rig_open_nth(i, 64, 0);
		int fd = memfd_create("emu-test", MFD_CLOEXEC);

		if (!rig)
			return SKIPPED;
		rig_swap_on(rig, 0, fd, 1 << 20);
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
		CHECK_EQ(emu_swap_out(rig->r, AT(0, 64)), 64);
		CHECK_EQ(ftruncate(fd, 0), 0);
		for (uint64_t gfn = 3; gfn < 7; gfn++)
			CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, gfn, 1, 0, 1, NULL), -EIO);
		CHECK_EQ(emu_discard(rig->r, AT(0, 64)), 64);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 3, 2, 0, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 5, 2, 0, 1, NULL), 0);
		rig_check_books(rig);
		rig_close(rig);
		close(fd);
	}
	return 0;
}

/* Bytes that can't be read of a neighbour that is read ahead are no error of the page that was wanted. */
static int readahead_into_a_hole(void)
{
	struct rig *rig = rig_open_nth(0, 256, 0);
	struct emu_store_options o = { .fd = memfd_create("emu-test", MFD_CLOEXEC), .file = 4 << 20, .readahead = 32,
		                       .disable = EMU_NO_LZ4 };

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_swap_on(rig->r, &o), 0);
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 7, 1, NULL), 0);
	CHECK_EQ(emu_swap_out(rig->r, AT(0, 64)), 64);
	CHECK_EQ(ftruncate(o.fd, 40 * EMU_FRAME_SIZE), 0);
	for (uint64_t gfn = 0; gfn < 40; gfn++)
		verify(rig, gfn, 1);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 40, 1, 0, 1, NULL), -EIO);
	rig_close(rig);
	close(o.fd);
	return 0;
}

struct waiter {
	struct rig *rig;
	int err;
	uint64_t ns;
};

static void *write_at_the_gate(void *arg)
{
	struct waiter *w = arg;
	uint64_t t0 = emu_now_ns();

	w->err = rig_run(w->rig, EMU_TOUCH_WRITE, 300, 1, 0, 1, NULL);
	w->ns = emu_now_ns() - t0;
	return NULL;
}

/* Who waits for memory keeps nobody else from what needs none; waits once; and finds its frame as it was. */
static int waiting_at_the_gate(void)
{
	for (int i = 0; i < 2; i++) {
		struct rig *rig = rig_open_nth(i, 1024, 0);
		struct emu_gate *g = gate_of(200);
		struct waiter w = { .rig = rig };
		pthread_t thread;
		uint64_t t0;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(emu_gate_attach(rig->r, g, 0, 1000), 0);
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 200, 7, 1, NULL), 0);
		CHECK_EQ(emu_set_aside(rig->r, AT(0, 10), 1), 10);
		CHECK_EQ(pthread_create(&thread, NULL, write_at_the_gate, &w), 0);
		usleep(100000);
		t0 = emu_now_ns();
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 3, 1, 0, 1, NULL), 0);
		CHECK(emu_now_ns() - t0 < 500000000);
		CHECK_EQ(pthread_join(thread, NULL), 0);
		CHECK_EQ(w.err, -ENOMEM);
		CHECK(w.ns > 900000000 && w.ns < 1800000000);
		CHECK_EQ(rig_stat(rig, "gate_failed"), 1);
		CHECK_EQ(emu_state_load(rig->r, 300), EMU_ZERO);
		CHECK_EQ(emu_discard(rig->r, AT(100, 90)), 90);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 300, 1, 0, 1, NULL), 0);
		rig_check_books(rig);
		rig_close(rig);
		free(g);
	}
	return 0;
}

/* A long write needs what is missing of it, and no more; and can be had a little at a time. */
static int a_write_is_charged_for_what_is_missing(void)
{
	struct rig *rig = rig_open_nth(0, 2048, 0);
	struct emu_gate *g = gate_of(400);
	uint8_t *buf = calloc(512, EMU_FRAME_SIZE);
	struct emu_progress p;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(rig_run(rig, EMU_FILL, 1, 200, 7, 1, NULL), 0);
	CHECK_EQ(emu_gate_attach(rig->r, g, 0, 300), 0);
	CHECK_EQ(rig_run(rig, EMU_FILL, 1000, 150, 7, 1, NULL), 0);
	CHECK_EQ(emu_guest_write(rig->r, 0, buf, 201 * EMU_FRAME_SIZE, &p), 0);
	CHECK_EQ(emu_guest_write(rig->r, 210 << 12, buf, 512 * EMU_FRAME_SIZE, &p), -ENOMEM);
	CHECK_EQ(p.done >> 12, 400 - 351);
	rig_check_books(rig);
	rig_close(rig);
	free(buf);
	free(g);
	return 0;
}

static int a_page_that_is_there_already_is_charged(void)
{
	struct rig *rig = rig_open_nth(0, 64, 0);
	struct emu_gate *g = gate_of(1000);
	static uint8_t pages[4 * EMU_FRAME_SIZE] __attribute__((aligned(EMU_FRAME_SIZE)));
	struct emu_progress p;
	int64_t done;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_gate_attach(rig->r, g, 0, 100), 0);
	CHECK_EQ(emu_uffd_copy(rig->uffd, (uintptr_t)emu_frame(rig->r, 2), (uintptr_t)pages, EMU_FRAME_SIZE, 0, &done), 0);
	CHECK_EQ(emu_guest_write(rig->r, 0, pages, sizeof(pages), &p), 0);
	rig_check_books(rig);
	CHECK_EQ(emu_discard(rig->r, AT(0, 64)), 4);
	rig_check_books(rig);
	rig_close(rig);
	free(g);
	return 0;
}

/* Frames that an idle guest has charged and doesn't use are there for who waits. */
static int an_idle_guest_hoards_nothing(void)
{
	struct rig *a = rig_open_nth(0, 1024, 0), *b = rig_open_nth(0, 1024, 0);
	struct emu_gate *g = gate_of(80);

	if (!a)
		return SKIPPED;
	CHECK_EQ(emu_gate_attach(a->r, g, 0, 300), 0);
	CHECK_EQ(emu_gate_attach(b->r, g, 1, 300), 0);
	CHECK_EQ(rig_run(a, EMU_FILL, 0, 60, 7, 1, NULL), 0);
	CHECK_EQ(emu_discard(a->r, AT(0, 60)), 60);
	CHECK_EQ(rig_run(b, EMU_FILL, 0, 80, 7, 1, NULL), 0);
	rig_check_books(a);
	rig_check_books(b);
	rig_close(a);
	rig_close(b);
	CHECK_EQ(emu_gate_charged(g), 0);
	free(g);
	return 0;
}

static void *lazily(void *arg)
{
	struct swapping *s = arg;

	while (!atomic_load(&s->stop)) {
		CHECK(emu_lazy_free(s->rig->r, AT(0, 1024)) >= 0);
		usleep(50);
	}
	return NULL;
}

/* Copies left aside of frames that were busy when they were to be swept: found when somebody asks. */
static int every_copy_is_swept(void)
{
	struct swapping s = { .rig = rig_open_nth(0, 1024, 0) };
	pthread_t thread;

	if (!s.rig)
		return SKIPPED;
	CHECK_EQ(pthread_create(&thread, NULL, lazily, &s), 0);
	for (int round = 0; round < 60; round++) {
		CHECK_EQ(rig_run(s.rig, EMU_FILL, 0, 1024, 7, 1, NULL), 0);
		CHECK(emu_set_aside(s.rig->r, AT(0, 1024), 1) >= 0);
		CHECK_EQ(rig_run(s.rig, EMU_TOUCH_WRITE, 0, 1024, 7, 1, NULL), 0);
	}
	atomic_store(&s.stop, 1);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(emu_discard(s.rig->r, AT(0, 1024)) >= 0);
	CHECK_EQ(emu_aside_sweep(s.rig->r), 0);
	CHECK_EQ(rig_stat(s.rig, "aside_stale"), 0);
	CHECK_EQ(rig_side_rss(s.rig), 0);
	rig_check_books(s.rig);
	rig_close(s.rig);
	return 0;
}

static void *fill_long(void *arg)
{
	CHECK_EQ(rig_run(arg, EMU_FILL, 0, 65536, 9, 1, NULL), 0);
	return NULL;
}

/* A call that is under way when tracking begins leaves bits from its next frame on. */
static int tracking_in_the_middle_of_a_call(void)
{
	struct rig *rig = rig_open(65536, EMU_SERVICE_INLINE, 1, 0);
	uint8_t *bits = malloc(65536);
	pthread_t thread;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(pthread_create(&thread, NULL, fill_long, rig), 0);
	usleep(2000);
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK_EQ(emu_access_harvest(rig->r, 0, 65536, EMU_DIRTIED, bits), 0);
	CHECK_EQ(bits[65535], EMU_DIRTIED);
	free(bits);
	rig_close(rig);
	return 0;
}

const struct test host_hard_cases_tests[] = {
	{ "host: a locked page", a_locked_page },
	{ "host: a hole", a_hole },
	{ "host: dropping any doesn't drop what is swapped", dropping_any_doesnt_drop_what_is_swapped },
	{ "host: a read error is over when the frame is given back", a_read_error_is_over_when_the_frame_is_given_back },
	{ "host: readahead into a hole", readahead_into_a_hole },
	{ "host: waiting at the gate", waiting_at_the_gate },
	{ "host: a write is charged for what is missing", a_write_is_charged_for_what_is_missing },
	{ "host: a page that is there already is charged", a_page_that_is_there_already_is_charged },
	{ "host: an idle guest hoards nothing", an_idle_guest_hoards_nothing },
	{ "host: every copy is swept", every_copy_is_swept },
	{ "host: tracking in the middle of a call", tracking_in_the_middle_of_a_call },
	{ NULL, NULL },
};
