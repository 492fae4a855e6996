/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "harness.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define FOR_EACH_SERVICE(rig, frames, around)                                                                         \
	for (int s_ = 0, ran_ = 0; s_ <= 3; s_++)                                                                     \
		if (s_ == 3) {                                                                                        \
			if (ran_ < 2)                                                                                 \
				return SKIPPED;                                                                       \
		} else if ((rig = rig_open(frames, services[s_], around, 0)) && ++ran_)

static int a_read_costs_no_memory_and_a_write_one_page(void)
{
	struct rig *rig;

	FOR_EACH_SERVICE (rig, 1024, 1) {
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 100, 0, 1, NULL), 0);
		CHECK_EQ(rig_rss(rig), 0);
		CHECK_EQ(rig_stat(rig, "nr_zeromap"), 100);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 50, 100, 0, 1, NULL), 0);
		CHECK_EQ(rig_rss(rig), 100);
		CHECK_EQ(rig_stat(rig, "nr_zeromap"), 50);
		CHECK_EQ(rig_stat(rig, "nr_resident"), 100);
		CHECK_EQ(rig_stat(rig, "pgfault_read"), 100);
		CHECK_EQ(rig_stat(rig, "pgfault_write"), 50); /* the other 50 were copy-on-write: no fault of ours */
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

static int content_survives_and_a_torn_frame_is_found(void)
{
	struct rig *rig;
	uint64_t bad;

	FOR_EACH_SERVICE (rig, 2048, 1) {
		uint64_t word;
		struct emu_progress p;

		CHECK_EQ(rig_run(rig, EMU_FILL, 10, 1500, 7, 3, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 10, 1500, 7, 3, &bad), 0);
		CHECK_EQ(bad, 0);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 10, 1500, 8, 1, &bad), 0);
		CHECK_EQ(bad, 1500);
		CHECK_EQ(emu_guest_read(rig->r, 700 * 4096 + 4088, &word, 8, &p), 0);
		word ^= 1;
		CHECK_EQ(emu_guest_write(rig->r, 700 * 4096 + 4088, &word, 8, &p), 0);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 10, 1500, 7, 2, &bad), 0);
		CHECK_EQ(bad, 1);
		CHECK_EQ(rig_rss(rig), 1500);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

static int fault_around_fills_its_aligned_window_only(void)
{
	struct rig *rig;

	for (int s = 1; s < 3; s++) {
		rig = rig_open(1000, services[s], 16, 0);
		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 37, 1, 0, 1, NULL), 0);
		CHECK_EQ(rig_rss(rig), 16);
		CHECK_EQ(emu_state_load(rig->r, 32), EMU_RESIDENT);
		CHECK_EQ(emu_state_load(rig->r, 47), EMU_RESIDENT);
		CHECK_EQ(emu_state_load(rig->r, 31), EMU_ZERO);
		CHECK_EQ(emu_state_load(rig->r, 48), EMU_ZERO);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 999, 1, 0, 1, NULL), 0); /* the last window is cut by the end */
		CHECK_EQ(rig_rss(rig), 16 + 8);
		CHECK_EQ(rig_stat(rig, "pgfault"), 2);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

static int missing_frames_are_installed_not_faulted(void)
{
	struct rig *rig;
	uint8_t *buf = malloc(64 * 4096), *back = malloc(64 * 4096);
	uint64_t gfns[64];

	for (int i = 0; i < 64 * 4096; i++)
		buf[i] = (uint8_t)(i * 7 + i / 4096);
	for (int i = 0; i < 64; i++)
		gfns[i] = (uint64_t)(i < 32 ? 100 + i : 300 - i); /* a run, and 32 single ones in descending order */
	FOR_EACH_SERVICE (rig, 512, 1) {
		struct emu_progress p;

		CHECK_EQ(rig_run(rig, EMU_FILL, 110, 5, 1, 1, NULL), 0); /* some are there already */
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 120, 5, 1, 1, NULL), 0);
		CHECK_EQ(emu_guest_install(rig->r, gfns, 64, buf, &p), 0);
		CHECK_EQ(p.done, 64);
		CHECK_EQ(rig_rss(rig), 64);
		for (int i = 0; i < 64; i++) {
			CHECK_EQ(emu_guest_read(rig->r, gfns[i] * 4096, back, 4096, &p), 0);
			CHECK_EQ(memcmp(back, buf + i * 4096, 4096), 0);
		}
		if (rig->uffd >= 0) {
			CHECK_EQ(rig_stat(rig, "install_frames"), 54);
			CHECK_EQ(rig_stat(rig, "pgfault"), 10);
		}
		gfns[63] = 512;
		CHECK_EQ(emu_guest_install(rig->r, gfns, 64, buf, &p), -ERANGE);
		gfns[63] = 300 - 63;
		rig_check_books(rig);
		rig_close(rig);
	}
	free(buf);
	free(back);
	return 0;
}

static int a_lost_frame_stops_the_call_and_never_reads_as_zero(void)
{
	struct rig *rig;

	FOR_EACH_SERVICE (rig, 256, 1) {
		struct emu_range one = { 40, 1, 0 };
		struct emu_progress p;
		uint8_t buf[3 * 4096];
		uint64_t bad;

		memset(buf, 0xee, sizeof(buf));
		CHECK_EQ(rig_run(rig, EMU_FILL, 30, 20, 3, 1, NULL), 0);
		CHECK_EQ(emu_poison(rig->r, &one, 1), 1);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 30, 20, 3, 1, &bad), -EHWPOISON);
		CHECK_EQ(bad, 40);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 40, 1, 3, 1, &bad), -EHWPOISON);
		CHECK_EQ(emu_guest_read(rig->r, 39 * 4096, buf, sizeof(buf), &p), -EHWPOISON);
		CHECK_EQ(p.done, 4096);
		CHECK_EQ(p.bad_gfn, 40);
		CHECK_EQ(buf[4096], 0xee);
		CHECK_EQ(emu_discard(rig->r, &one, 1), 0); /* never a side effect */
		CHECK_EQ(emu_state_load(rig->r, 40), EMU_LOST);
		CHECK_EQ(rig_stat(rig, "nr_lost"), 1);
		CHECK_EQ(emu_unpoison(rig->r, &one, 1), 1);
		CHECK_EQ(emu_guest_read(rig->r, 40 * 4096, buf, 1, &p), 0);
		CHECK_EQ(buf[0], 0);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

/* Poison lands while the access is under way: the state was fine when note() looked, so only the jump can save it. */
static int a_fault_on_a_lost_frame_jumps_out_of_the_access(void)
{
	struct rig *rig;

	for (volatile int s = 1; s < 3; s++) {
		struct emu_walk w;
		struct emu_range range = { 0, 8, 0 };
		uint64_t bad;

		rig = rig_open(64, services[s], 1, 0);
		if (!rig)
			return SKIPPED;
		CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 5, 1, 0 }, 1), 1);
		/* the guarded raw load, as guestaccess.h would do it after its note() */
		memset(&w, 0, sizeof(w));
		w.guard.region = rig->r;
		if (!sigsetjmp(w.guard.env, EMU_SAVEMASK)) {
			atomic_store(&emu_thread.guard, &w.guard);
			(void)*(volatile uint8_t *)emu_frame(rig->r, 5);
			CHECK(!"the load went through");
		}
		atomic_store(&emu_thread.guard, NULL);
		CHECK_EQ(w.guard.err, -EHWPOISON);
		CHECK_EQ(w.guard.gfn, 5);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, range.gfn, range.count, 0, 1, &bad), -EHWPOISON);
		CHECK_EQ(bad, 5);
		rig_close(rig);
	}
	return 0;
}

static int a_dead_service_fails_loudly(void)
{
	struct rig *rig = rig_open(600, EMU_SERVICE_THREAD, 1, 0);
	uint64_t bad;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(rig_run(rig, EMU_FILL, 0, 10, 1, 1, NULL), 0);
	emu_service_stop(rig->r);
	emu_service_die(rig->r, EIO);
	CHECK_EQ(emu_region_dead(rig->r), EIO);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 20, 1, 0, 1, &bad), -EOWNERDEAD);
	CHECK_EQ(rig_stat(rig, "nr_lost"), 590);
	CHECK_EQ(emu_discard(rig->r, &(struct emu_range){ 0, 600, 0 }, 1), -EOWNERDEAD); /* would leave a reader asleep */
	CHECK_EQ(rig_stat(rig, "nr_resident"), 10);
	rig_close(rig);
	return 0;
}

static sigjmp_buf foreign_env;
static volatile int foreign_seen;
static void foreign(int sig, siginfo_t *si, void *context)
{
	(void)sig, (void)si, (void)context;
	foreign_seen++;
	siglongjmp(foreign_env, 1);
}

/* A SIGBUS of a file cut short must reach the handler that was there before us, and the one that came after. */
static int foreign_sigbus_reaches_the_other_handler(void)
{
	FILE *file = tmpfile();
	struct sigaction theirs = { .sa_sigaction = foreign, .sa_flags = SA_SIGINFO | SA_NODEFER }, before;
	volatile uint8_t *cut;

	CHECK_EQ(ftruncate(fileno(file), 4096), 0);
	cut = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fileno(file), 0);
	CHECK_EQ(ftruncate(fileno(file), 0), 0);
	for (int late = 0; late < 2; late++) {
		struct rig *rig;

		if (!late)
			sigaction(SIGBUS, &theirs, &before);
		rig = rig_open(64, EMU_SERVICE_INLINE, 1, 0);
		if (!rig)
			return SKIPPED;
		if (late)
			sigaction(SIGBUS, &theirs, &before);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 64, 0, 1, NULL), 0); /* re-chains if late */
		CHECK(emu_sigbus_is_ours());
		CHECK_EQ(rig_rss(rig), 64);
		foreign_seen = 0;
		if (!sigsetjmp(foreign_env, 1))
			(void)cut[0];
		CHECK_EQ(foreign_seen, 1);
		/* a handler that recovers is asked each time, not given up on */
		for (volatile int i = 0; i < 100; i++)
			if (!sigsetjmp(foreign_env, 1))
				(void)cut[0];
		CHECK_EQ(foreign_seen, 101);
		rig_close(rig);
		CHECK(!emu_sigbus_is_ours());
		if (late)
			sigaction(SIGBUS, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
		else
			sigaction(SIGBUS, &before, NULL);
	}
	munmap((void *)(uintptr_t)cut, 4096);
	fclose(file);
	return 0;
}

static int a_thread_with_sigbus_blocked_is_served(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_INLINE, 1, 0);
	sigset_t bus, now;

	if (!rig)
		return SKIPPED;
	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &bus, NULL);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 64, 0, 2, NULL), 0);
	CHECK_EQ(rig_rss(rig), 64);
	pthread_sigmask(SIG_UNBLOCK, &bus, &now);
	CHECK_EQ(sigismember(&now, SIGBUS), 1); /* left as it was found */
	rig_close(rig);
	return 0;
}

/* Memory taken behind our back must not come back as zeros: raw access dies by SIGBUS, a call returns an error. */
static int a_stray_madvise_is_an_error_not_zeros(void)
{
	uint64_t bad;
	int status;
	pid_t pid;

	for (int s = 1; s < 3; s++) {
		struct rig *rig = rig_open(64, services[s], 1, 0);
		int err;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 64, 1, 1, NULL), 0);
		CHECK_EQ(madvise(emu_frame(rig->r, 7), 4096, MADV_DONTNEED), 0);
		err = rig_run(rig, EMU_VERIFY, 0, 64, 1, 1, &bad);
		CHECK(err == -EFAULT || err == -EHWPOISON);
		CHECK_EQ(bad, 7);
		CHECK_EQ(emu_state_load(rig->r, 7), EMU_LOST);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 8, 56, 1, 1, &bad), 0);
		CHECK_EQ(bad, 0);
		rig_check_books(rig);
		rig_close(rig);
	}
	pid = fork();
	if (!pid) {
		struct rig *mine = rig_open(64, EMU_SERVICE_INLINE, 1, 0);

		if (!mine || rig_run(mine, EMU_FILL, 0, 64, 1, 1, NULL))
			_exit(1);
		madvise(emu_frame(mine->r, 7), 4096, MADV_DONTNEED);
		signal(SIGBUS, SIG_DFL); /* sanitizers have a handler of their own under ours */
		emu_sigbus_ensure(mine->r);
		_exit(*(volatile uint8_t *)emu_frame(mine->r, 7));
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSIGNALED(status));
	CHECK_EQ(WTERMSIG(status), SIGBUS);
	return 0;
}

static int a_buffer_that_overlaps_the_target_is_copied(void)
{
	struct rig *rig;

	FOR_EACH_SERVICE (rig, 64, 1) {
		struct emu_progress p;
		uint8_t buf[4096];

		CHECK_EQ(rig_run(rig, EMU_FILL, 3, 1, 1, 1, NULL), 0);
		CHECK_EQ(emu_guest_write(rig->r, 0, rig->r->base, 8192, &p), 0); /* onto itself, missing */
		CHECK_EQ(emu_guest_write(rig->r, 8192, rig->r->base + 4096, 8192, &p), 0);
		CHECK_EQ(emu_guest_read(rig->r, 0, buf, 4096, &p), 0);
		for (int i = 0; i < 4096; i++)
			CHECK_EQ(buf[i], 0);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

static void *reader(void *arg)
{
	struct rig *rig = arg;

	for (uint64_t gfn = 0; gfn < rig->frames; gfn++)
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, gfn, 1, 0, 1, NULL), 0);
	return NULL;
}

/* A store can replace a zero page that a reader's fault has mapped and not yet published. */
static int a_write_next_to_a_read_leaves_true_books(void)
{
	for (int round = 0; round < 20; round++) {
		struct rig *rig = rig_open(4096, services[1 + round % 2], round % 4 < 2 ? 1 : 16, 0);
		pthread_t thread;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(pthread_create(&thread, NULL, reader, rig), 0);
		for (uint64_t gfn = 0; gfn < rig->frames; gfn++)
			CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, gfn, 1, 0, 1, NULL), 0);
		CHECK_EQ(pthread_join(thread, NULL), 0);
		rig_check_books(rig);
		rig_close(rig);
	}
	return 0;
}

/* The child forgets its parent's regions: one of its own in the same place is its own. */
static int a_forked_child_has_its_own_regions(void)
{
	struct rig *parent = rig_open(256, EMU_SERVICE_INLINE, 1, 0);
	int status;
	pid_t pid;

	if (!parent)
		return SKIPPED;
	CHECK_EQ(rig_run(parent, EMU_FILL, 0, 10, 1, 1, NULL), 0);
	madvise(parent->r->base, 256 * 4096, MADV_DONTFORK);
	pid = fork();
	if (!pid) {
		unsigned char vec;

		/* the place of the parent's RAM is kept: nothing else can come to lie there */
		if (mincore(parent->r->base, 4096, &vec) || emu_registry_overlaps((uintptr_t)parent->r->base, 1))
			_exit(1);
		for (int i = 0; i < 20; i++) {
			struct rig *mine = rig_open(256, services[1 + i % 2], 1, 0);

			if (!mine || rig_run(mine, EMU_FILL, 0, 256, 2, 2, NULL) || rig_rss(mine) != 256)
				_exit(2);
			if (emu_discard(mine->r, &(struct emu_range){ 0, 256, 0 }, 1) != 256 || rig_rss(mine))
				_exit(3);
		}
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(rig_rss(parent), 10);
	rig_check_books(parent);
	rig_close(parent);
	return 0;
}

/* From frame to frame inside the guest, either missing or not; what it copies onto keeps nothing of its own. */
static int frames_are_copied_wherever_they_are(void)
{
	for (int s = 0; s < 3; s++) {
		struct rig *rig = rig_open(2048, services[s], 1, 0);
		struct emu_range ranges[] = { { 1000, 100, 0 }, { 1500, 10, 990 }, { 3, 1, 3 } };
		struct emu_vcpu_job job = { .op = EMU_COPY, .threads = 2 };
		uint8_t byte;
		struct emu_progress progress;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 100, 7, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_SET, 1000, 50, 0xaa, 1, NULL), 0);
		CHECK_EQ(emu_vcpu_run(rig->r, ranges, 3, &job), 0);
		CHECK_EQ(job.progress.done, 111);
		for (uint64_t i = 0; i < 100; i++) {
			struct emu_range one = { 1000 + i, 1, i };
			struct emu_vcpu_job verify = { .op = EMU_VERIFY, .threads = 1, .arg = 7 };

			CHECK_EQ(emu_vcpu_run(rig->r, &one, 1, &verify), 0);
			CHECK_EQ(verify.bad_count, 0);
		}
		CHECK_EQ(emu_guest_read(rig->r, 1505ull << EMU_FRAME_SHIFT, &byte, 1, &progress), 0);
		CHECK_EQ(byte, 0); /* of a frame that nobody had written: its zero page */
		CHECK_EQ(rig_stat(rig, "nr_zeromap"), 10);
		rig_check_books(rig);
		ranges[0].key = 2000;
		CHECK_EQ(emu_vcpu_run(rig->r, ranges, 1, &job), -ERANGE);
		/* a source that is lost stops the copy at its number */
		CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 20, 1, 0 }, 1), 1);
		ranges[0].key = 0;
		job.threads = 1;
		CHECK(emu_vcpu_run(rig->r, ranges, 1, &job) < 0);
		CHECK_EQ(job.progress.bad_gfn, 20);
		CHECK_EQ(job.progress.done, 20);
		rig_close(rig);
	}
	return 0;
}

/* The note says RESIDENT before the store; the store's other side is lost; the page must be there all the same. */
static int a_promise_is_kept_when_the_other_side_is_lost(void)
{
	static const int kinds[] = { EMU_SERVICE_INLINE, EMU_SERVICE_THREAD }; /* else a poisoned frame is a SIGSEGV */

	for (int s = 0; s < 2; s++) {
		struct rig *rig = rig_open(64, kinds[s], 1, 0), *other = rig_open(64, kinds[s], 1, 0);
		struct emu_progress progress;

		if (!rig || !other)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 8, 0, 1, NULL), 0);
		CHECK_EQ(rig_stat(rig, "nr_zeromap"), 8);
		CHECK_EQ(emu_poison(other->r, &(struct emu_range){ 3, 1, 0 }, 1), 1);
		/* the buffer is guest memory, and its second frame can't be read */
		CHECK(emu_guest_write(rig->r, 0, emu_frame(other->r, 2), 3 * EMU_FRAME_SIZE, &progress) < 0);
		CHECK_EQ(progress.done, EMU_FRAME_SIZE);
		CHECK_EQ(progress.bad_gfn, 3);
		CHECK_EQ(rig_stat(rig, "nr_resident"), 2);
		CHECK_EQ(rig_rss(rig), 2);
		rig_check_books(rig);
		rig_close(rig);
		rig_close(other);
	}
	return 0;
}

/* One in eight, each thread's first among them; resident frames aren't faults. */
static int what_faults_cost_is_sampled(void)
{
	for (int s = 0; s < 3; s++) {
		struct rig *rig = rig_open(8192, services[s], 1, 0);
		struct emu_hist h;
		uint64_t reads, t0;
		int64_t before;

		if (!rig)
			return SKIPPED;
		CHECK_EQ(rig_run(rig, EMU_FILL, 0, 800, 1, 1, NULL), 0);
		CHECK_EQ(emu_latency_read(rig->r, EMU_LAT_FAULT_WRITE, &h), 0);
		CHECK_EQ(h.count, 100);
		CHECK(h.max >= h.sum / h.count && h.sum / h.count > 50);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 0, 800, 1, 1, NULL), 0);
		CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 800, 1, 1, NULL), 0);
		CHECK_EQ(emu_latency_read(rig->r, EMU_LAT_FAULT_WRITE, &h), 0);
		CHECK_EQ(h.count, 100);
		CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 1000, 800, 1, 4, NULL), 0); /* three new threads */
		CHECK_EQ(emu_latency_read(rig->r, EMU_LAT_FAULT_READ, &h), 0);
		reads = h.count;
		CHECK_EQ(reads, 25 * 4);
		CHECK_EQ(emu_latency_read(rig->r, EMU_NR_LATENCIES, &h), -EINVAL);
		/* what the loops took is ns: no more than the wall's, and most of it */
		before = rig_stat(rig, "vcpu_ns");
		t0 = emu_now_ns();
		CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 2000, 6000, 0, 1, NULL), 0);
		t0 = emu_now_ns() - t0;
		CHECK(rig_stat(rig, "vcpu_ns") - before <= (int64_t)t0 && rig_stat(rig, "vcpu_ns") - before > (int64_t)t0 / 4);
		rig_close(rig);
	}
	return 0;
}

const struct test fault_tests[] = {
	{ "fault: a read costs no memory and a write one page", a_read_costs_no_memory_and_a_write_one_page },
	{ "fault: content survives and a torn frame is found", content_survives_and_a_torn_frame_is_found },
	{ "guestcopy: a promise is kept when the other side is lost", a_promise_is_kept_when_the_other_side_is_lost },
	{ "fault: what faults cost is sampled", what_faults_cost_is_sampled },
	{ "guestwalk: frames are copied wherever they are", frames_are_copied_wherever_they_are },
	{ "fault: fault_around fills its aligned window only", fault_around_fills_its_aligned_window_only },
	{ "fault: missing frames are installed, not faulted", missing_frames_are_installed_not_faulted },
	{ "fault: a lost frame stops the call and never reads as zero", a_lost_frame_stops_the_call_and_never_reads_as_zero },
	{ "fault: a fault on a lost frame jumps out of the access", a_fault_on_a_lost_frame_jumps_out_of_the_access },
	{ "guestcopy: a buffer that overlaps the target is copied", a_buffer_that_overlaps_the_target_is_copied },
	{ "guestcopy: a write next to a read leaves true books", a_write_next_to_a_read_leaves_true_books },
	{ "region: a forked child has its own regions", a_forked_child_has_its_own_regions },
	{ "service: a dead service fails loudly", a_dead_service_fails_loudly },
	{ "sigbus: a foreign SIGBUS reaches the other handler", foreign_sigbus_reaches_the_other_handler },
	{ "sigbus: a thread with SIGBUS blocked is served", a_thread_with_sigbus_blocked_is_served },
	{ "sigbus: a stray madvise is an error, not zeros", a_stray_madvise_is_an_error_not_zeros },
	{ NULL, NULL },
};
