/* SPDX-License-Identifier: MIT */
/*
 * advise.c - asking the kernel to take pages, in as few system calls as it allows, and what it did when it refused.
 *
 * process_madvise(2) takes many ranges in one call, and a process may give itself DONTNEED and FREE since 6.13.  Whether
 * this kernel lets it is found by doing it.  The other way is one madvise(2) a range.
 *
 * Also here: what LOST and DISCARDED rest on besides the byte, so that an access fails where no page is.
 */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Atomic int self = PIDFD_SELF_THREAD_GROUP;

/* In a forked child: the descriptor is its parent's, and so would be the pages. */
void emu_advise_forked(void)
{
	int pidfd = atomic_exchange(&self, PIDFD_SELF_THREAD_GROUP);

	if (pidfd >= 0)
		close(pidfd);
}

static long advise_vectored(const struct iovec *iov, size_t n, int advice)
{
	long done = syscall(SYS_process_madvise, atomic_load(&self), iov, n, advice, 0);

	if (done < 0 && errno == EBADF && atomic_load(&self) == PIDFD_SELF_THREAD_GROUP) {
		/* a kernel that doesn't know the name: a descriptor of ours, one for the process */
		int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
		int expected = PIDFD_SELF_THREAD_GROUP;

		if (pidfd < 0)
			return -1;
		if (!atomic_compare_exchange_strong(&self, &expected, pidfd))
			close(pidfd);
		done = syscall(SYS_process_madvise, atomic_load(&self), iov, n, advice, 0);
	}
	return done;
}

/* Whether this kernel lets a process discard many ranges of its own in one call (6.13): found by doing it. */
static int vectored_works;

static void vectored_probe(void)
{
	uint8_t *p = mmap(NULL, 2 * EMU_FRAME_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec iov[2] = { { p, EMU_FRAME_SIZE }, { p + EMU_FRAME_SIZE, EMU_FRAME_SIZE } };

	if (p == MAP_FAILED)
		return;
	p[0] = p[EMU_FRAME_SIZE] = 1;
	vectored_works = advise_vectored(iov, 2, MADV_DONTNEED) == 2 * EMU_FRAME_SIZE &&
	                 !*(volatile uint8_t *)p && !*(volatile uint8_t *)(p + EMU_FRAME_SIZE);
	munmap(p, 2 * EMU_FRAME_SIZE);
}

bool emu_advise_vectored_probe(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, vectored_probe);
	return vectored_works;
}

/*
 * Advise runs in order. *done is the number of runs finished: all of them, or up to the one that failed, whose -errno is
 * returned.  Each system call is counted under `calls`.
 */
int emu_advise(struct emu_region *r, const struct iovec *run, size_t n, int advice, enum emu_stat calls, size_t *done_runs)
{
	size_t i = 0;

	if (n > 1 && r->vectored) {
		uint64_t len = 0, whole = 0;
		long done;

		for (size_t k = 0; k < n; k++)
			len += run[k].iov_len;
		done = advise_vectored(run, n, advice);
		emu_stat_add(r, calls, 1);
		if (done == (long)len) {
			*done_runs = n;
			return 0;
		}
		/* A part, or none: the bare call finishes from the first unfinished run on, and tells the errno. */
		while (done > 0 && i < n && whole + run[i].iov_len <= (uint64_t)done)
			whole += run[i++].iov_len;
	}
	for (; i < n; i++) {
		emu_stat_add(r, calls, 1);
		while (madvise(run[i].iov_base, run[i].iov_len, advice))
			if (errno != EAGAIN && errno != EINTR) {
				*done_runs = i;
				return -errno;
			}
	}
	*done_runs = n;
	return 0;
}

/* Whether an access to a frame without a page can be made to fail, rather than sleep or find zeros, and be survived. */
bool emu_can_lose(const struct emu_region *r)
{
	return r->service == EMU_SERVICE_INLINE || (r->service == EMU_SERVICE_THREAD && r->have_poison);
}

/* Frames held BUSY with no page behind them: from now on an access fails. What LOST rests on besides the byte. */
int emu_lose(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	const uint64_t start = (uintptr_t)emu_frame(r, gfn), len = count << EMU_FRAME_SHIFT;
	uint64_t at = 0, done;
	unsigned eagain = 0;
	int err = 0;

	if (r->service == EMU_SERVICE_INLINE) /* missing raises SIGBUS, and the handler reads LOST */
		return 0;
	if (r->service == EMU_SERVICE_THREAD && r->have_poison) {
		for (; at < len && (!err || err == -EEXIST); at += done + (err ? EMU_FRAME_SIZE : 0)) /* EEXIST: has one */
			err = emu_uffd_fill(r->uffd, EMU_FILL_POISON, start + at, NULL, len - at, true, &done, &eagain);
		if (!err || err == -EEXIST)
			return 0;
	}
	/* before 6.6, or without userfaultfd, or no memory for the marker: an access dies by SIGSEGV instead */
	if (mprotect((void *)(uintptr_t)start, len, PROT_NONE))
		return -errno;
	if (r->uffd >= 0)
		emu_uffd_wake(r->uffd, start, len);
	return 0;
}

/* The undoing, for frames held BUSY whose pages MADV_DONTNEED has just taken. */
int emu_find(struct emu_region *r, uint64_t gfn, uint64_t count)
{
	if (r->service == EMU_SERVICE_INLINE)
		return 0;
	/* the MADV_DONTNEED has dropped a marker; an inaccessible frame becomes accessible, an accessible one stays so */
	return mprotect(emu_frame(r, gfn), count << EMU_FRAME_SHIFT, PROT_READ | PROT_WRITE) ? -errno : 0;
}

/* Where the pages from `at` on are (enum emu_there). For frames held BUSY. */
void emu_pages_there(struct emu_region *r, const uint8_t *at, uint64_t count, uint8_t *ret)
{
	enum { PART = 512 };
	uint64_t page = (uintptr_t)at >> EMU_FRAME_SHIFT, entry[PART];
	unsigned char vec[PART];

	for (; count > PART; at += PART * EMU_FRAME_SIZE, page += PART, ret += PART, count -= PART)
		emu_pages_there(r, at, PART, ret);
	if (r->pagemap_fd >= 0 && pread(r->pagemap_fd, entry, count * 8, (off_t)(page * 8)) == (ssize_t)(count * 8)) {
		for (uint64_t i = 0; i < count; i++)
			ret[i] = entry[i] & PAGEMAP_PRESENT ? EMU_THERE : entry[i] & PAGEMAP_SWAP ? EMU_THERE_SWAP : EMU_NOWHERE;
		return;
	}
	/* Without /proc only what is present can be known for sure; on a host with swap, "nowhere" may be swapped. */
	memset(ret, EMU_THERE, count);
	if (!mincore((void *)(uintptr_t)at, count << EMU_FRAME_SHIFT, vec))
		for (uint64_t i = 0; i < count; i++)
			ret[i] = vec[i] & 1 ? EMU_THERE : EMU_NOWHERE;
}
