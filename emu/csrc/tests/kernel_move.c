/* SPDX-License-Identifier: MIT */
/*
 * UFFDIO_MOVE by itself, without the core: what the kernel says that it moved against what it did.
 *
 * One thread moves runs of pages between two regions, another reads them, a third clears accessed bits as page aging does.
 * Each page is looked for in pagemap after each call.  On 6.18 some calls have moved a batch and say EEXIST (move.c has the
 * reason); that is counted and printed.  Anything else that doesn't fit is a failure: a page in both places or in none, an
 * error that isn't that one, a wrong byte.  `STORM=10 build/test-O2 kernel:` looks for 10 s.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 512, LONGEST = 32 };

static struct places {
	uint8_t *page[2]; /* both regions */
	int uffd, pagemap;
	_Atomic int stop;
} p;
static _Thread_local sigjmp_buf hole;

static void on_hole(int sig)
{
	(void)sig;
	siglongjmp(hole, 1);
}

EMU_GUEST_BYTES static void read_or_not(const volatile uint8_t *byte)
{
	if (!sigsetjmp(hole, 1))
		(void)*byte;
}

static void *reads(void *arg)
{
	uint64_t at = (uintptr_t)arg;

	while (!atomic_load_explicit(&p.stop, memory_order_relaxed)) {
		at = at * 6364136223846793005u + 1442695040888963407u;
		read_or_not(p.page[0] + (at >> 33) % PAGES * EMU_FRAME_SIZE);
	}
	return NULL;
}

static void *ages(void *arg)
{
	int clear_refs = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);

	(void)arg;
	while (!atomic_load(&p.stop))
		CHECK_EQ(pwrite(clear_refs, "1", 1, 0), 1);
	close(clear_refs);
	return NULL;
}

static bool is_at(int side, int page)
{
	uint64_t entry;

	CHECK_EQ(pread(p.pagemap, &entry, 8, (off_t)(((uintptr_t)p.page[side] >> EMU_FRAME_SHIFT) + (uint64_t)page) * 8), 8);
	return entry >> 62; /* present or swapped (Documentation/admin-guide/mm/pagemap.rst) */
}

/* Pages [first, first + n) from one side to the other; how many were moved by calls that said they weren't. */
static int move(int from, int first, int n)
{
	int unsaid = 0, done = 0;

	while (done < n) {
		const uint64_t at = (uint64_t)(first + done) * EMU_FRAME_SIZE;
		struct uffdio_move m = { .dst = (uintptr_t)p.page[!from] + at, .src = (uintptr_t)p.page[from] + at,
			                 .len = (uint64_t)(n - done) * EMU_FRAME_SIZE };
		const int err = ioctl(p.uffd, UFFDIO_MOVE, &m) ? errno : 0;
		int there = 0;

		while (done + there < n && is_at(!from, first + done + there))
			there++;
		for (int i = done; i < n; i++)
			CHECK_EQ(is_at(from, first + i), i >= done + there);
		if (!err || err == EAGAIN) {
			CHECK(err || m.move == (int64_t)m.len);
			/* what comes behind the counted ones is met again at once, as EEXIST */
			CHECK(there >= (m.move > 0 ? m.move >> EMU_FRAME_SHIFT : 0));
			unsaid += there - (m.move > 0 ? (int)(m.move >> EMU_FRAME_SHIFT) : 0);
		} else {
			CHECK_EQ(err, EEXIST);
			CHECK(there > 0);
			unsaid += there;
		}
		done += there;
	}
	return unsaid;
}

static int what_a_move_says(void)
{
	struct sigaction former, action = { .sa_handler = on_hole };
	const char *seconds = getenv("STORM");
	const uint64_t until = emu_now_ns() + (uint64_t)((seconds ? atof(seconds) : 0.5) * 1e9);
	struct emu_uffd_info info;
	uint64_t features, ioctls, rng = 1;
	long runs = 0, miscounted = 0, unsaid = 0;
	pthread_t threads[3];

	p = (struct places){ .uffd = emu_uffd_open(EMU_RUNG_FULL, 0, &info) };
	if (p.uffd < 0)
		return SKIPPED;
	if (emu_uffd_api(p.uffd, UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MOVE, &features, &ioctls)) {
		close(p.uffd);
		return SKIPPED;
	}
	p.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	for (int side = 0; side < 2; side++) {
		p.page[side] = mmap(NULL, PAGES * EMU_FRAME_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(p.page[side] != MAP_FAILED);
		CHECK_EQ(madvise(p.page[side], PAGES * EMU_FRAME_SIZE, MADV_NOHUGEPAGE), 0);
		CHECK_EQ(emu_uffd_register(p.uffd, (uintptr_t)p.page[side], PAGES * EMU_FRAME_SIZE,
		                           UFFDIO_REGISTER_MODE_MISSING, &ioctls), 0);
	}
	for (int i = 0; i < PAGES; i++) {
		uint64_t words[EMU_FRAME_SIZE / 8];
		int64_t done;

		emu_content_words(3, (uint64_t)i, words);
		CHECK_EQ(emu_uffd_copy(p.uffd, (uintptr_t)p.page[0] + (uint64_t)i * EMU_FRAME_SIZE, (uintptr_t)words,
		                       EMU_FRAME_SIZE, 0, &done), 0);
	}
	sigaction(SIGBUS, &action, &former);
	CHECK_EQ(pthread_create(&threads[0], NULL, ages, NULL), 0);
	for (uintptr_t i = 1; i < 3; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, reads, (void *)i), 0);
	while (emu_now_ns() < until) {
		rng = rng * 6364136223846793005u + 1442695040888963407u;
		const int first = (int)((rng >> 33) % PAGES), room = PAGES - first;
		const int n = 1 + (int)((rng >> 50) % (unsigned)(room < LONGEST ? room : LONGEST));

		for (int from = 0; from < 2; from++) {
			const int pages = move(from, first, n);

			runs++;
			unsaid += pages;
			miscounted += pages > 0;
		}
	}
	atomic_store(&p.stop, 1);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	sigaction(SIGBUS, &former, NULL);
	for (int i = 0; i < PAGES; i++) {
		uint64_t want[EMU_FRAME_SIZE / 8];

		emu_content_words(3, (uint64_t)i, want);
		CHECK_EQ(memcmp(p.page[0] + (uint64_t)i * EMU_FRAME_SIZE, want, sizeof(want)), 0);
	}
	fprintf(stderr, "  %ld runs moved; %ld of them, %ld pages, in part or whole by calls that said EEXIST\n", runs, miscounted,
	        unsaid);
	for (int side = 0; side < 2; side++)
		munmap(p.page[side], PAGES * EMU_FRAME_SIZE);
	close(p.pagemap);
	close(p.uffd);
	return 0;
}

const struct test kernel_move_tests[] = {
	{ "kernel: what a move says", what_a_move_says },
	{ NULL, NULL },
};
