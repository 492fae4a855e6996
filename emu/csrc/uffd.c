/* SPDX-License-Identifier: MIT */
/*
 * uffd.c - userfaultfd(2): opening one, the handshake, and the bare ioctls.
 *
 * Two layers.  emu_uffd_copy() and its sisters are one ioctl each and return what the kernel said, (bytes, errno)
 * apart: the binding is built on them.  emu_uffd_fill() is the only place that knows what the errors *mean* when a
 * range must become present (Linux 6.18, fs/userfaultfd.c and mm/userfaultfd.c):
 *
 *   done > 0, EAGAIN    a part was done and then a page stood in the way: go on after it, where EEXIST will tell
 *   done = 0, EAGAIN    the mappings are changing (an event is queued unread, a fork is under way): pause, again
 *   EEXIST              the page at dst + done is there already: the caller decides, and wakes whoever sleeps on it
 *   ENOENT              the range isn't registered here, or the mapping changed: final
 *   ESRCH               the process is going away: final
 *   ENOMEM              no memory, or the memcg's limit: final for this try
 *
 * and of a move besides
 *
 *   ENOENT              the source has a hole at src + done
 *   EBUSY               the source page is shared with a forked child, or was until somebody writes it; or pinned
 *   EEXIST              on 6.18 perhaps pages that this very call has moved (move.c)
 */
#include "core.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_userfaultfd
#error "this architecture has no userfaultfd"
#endif

static int default_ioctl(int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg);
}
int (*emu_uffd_ioctl)(int fd, unsigned long request, void *arg) = default_ioctl;

static int open_syscall(int flags)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);

	return fd < 0 ? -errno : fd;
}

static int open_device(void)
{
	int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd;

	if (dev < 0)
		return -errno;
	fd = ioctl(dev, USERFAULTFD_IOC_NEW, (unsigned long)(O_CLOEXEC | O_NONBLOCK));
	if (fd < 0)
		fd = -errno;
	close(dev);
	return fd;
}

/*
 * The privilege ladder: the best rung up to `want`.  Full by system call (CAP_SYS_PTRACE or
 * vm.unprivileged_userfaultfd=1), full by /dev/userfaultfd (file permission), user-mode-only (anybody, 5.11).
 * Returns the descriptor or -errno of the last rung tried; *ret says what was tried and why it wasn't taken.
 */
int emu_uffd_open(int want, unsigned disable, struct emu_uffd_info *ret)
{
	int fd = -EOPNOTSUPP;

	*ret = (struct emu_uffd_info){ .rung = EMU_RUNG_OFF };
	if (want >= EMU_RUNG_FULL && !(disable & EMU_NO_FULL)) {
		fd = disable & EMU_NO_SYSCALL ? -EOPNOTSUPP : open_syscall(0);
		ret->full_errno = fd < 0 ? -fd : 0;
		if (fd >= 0) {
			ret->rung = EMU_RUNG_FULL;
			ret->door = EMU_DOOR_SYSCALL;
			return fd;
		}
		fd = disable & EMU_NO_DEVICE ? -EOPNOTSUPP : open_device();
		ret->device_errno = fd < 0 ? -fd : 0;
		if (fd >= 0) {
			ret->rung = EMU_RUNG_FULL;
			ret->door = EMU_DOOR_DEVICE;
			return fd;
		}
	}
	if (want >= EMU_RUNG_USER) {
		fd = open_syscall(UFFD_USER_MODE_ONLY);
		ret->user_errno = fd < 0 ? -fd : 0;
		if (fd >= 0) {
			ret->rung = EMU_RUNG_USER;
			ret->door = EMU_DOOR_SYSCALL;
		}
	}
	return fd;
}

int emu_uffd_api(int fd, uint64_t features, uint64_t *features_ret, uint64_t *ioctls_ret)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	if (emu_uffd_ioctl(fd, UFFDIO_API, &api))
		return -errno;
	*features_ret = api.features;
	*ioctls_ret = api.ioctls;
	return 0;
}

int emu_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_ret)
{
	struct uffdio_register reg = { .range = { start, len }, .mode = mode };

	if (emu_uffd_ioctl(fd, UFFDIO_REGISTER, &reg))
		return -errno;
	*ioctls_ret = reg.ioctls;
	return 0;
}

int emu_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range range = { start, len };

	return emu_uffd_ioctl(fd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

int emu_uffd_wake(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range range = { start, len };

	return emu_uffd_ioctl(fd, UFFDIO_WAKE, &range) ? -errno : 0;
}

int emu_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
	struct uffdio_copy copy = { .dst = dst, .src = src, .len = len, .mode = mode };
	int err = emu_uffd_ioctl(fd, UFFDIO_COPY, &copy) ? -errno : 0;

	*done = copy.copy > 0 ? copy.copy : 0;
	return err;
}

int emu_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
	struct uffdio_zeropage zero = { .range = { start, len }, .mode = mode };
	int err = emu_uffd_ioctl(fd, UFFDIO_ZEROPAGE, &zero) ? -errno : 0;

	*done = zero.zeropage > 0 ? zero.zeropage : 0;
	return err;
}

int emu_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
	struct uffdio_poison poison = { .range = { start, len }, .mode = mode };
	int err = emu_uffd_ioctl(fd, UFFDIO_POISON, &poison) ? -errno : 0;

	*done = poison.updated > 0 ? poison.updated : 0;
	return err;
}

int emu_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
	struct uffdio_move move = { .dst = dst, .src = src, .len = len, .mode = mode };
	int err = emu_uffd_ioctl(fd, UFFDIO_MOVE, &move) ? -errno : 0;

	*done = move.move > 0 ? move.move : 0;
	return err;
}

int emu_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffdio_writeprotect wp = { .range = { start, len }, .mode = mode };

	return emu_uffd_ioctl(fd, UFFDIO_WRITEPROTECT, &wp) ? -errno : 0;
}

int emu_uffd_read(int fd, void *msgs, size_t bytes)
{
	ssize_t n = read(fd, msgs, bytes);

	return n < 0 ? -errno : (int)n;
}

/*
 * Make [dst, dst + len) present, poisoned or zero-mapped, or move src there.  Returns 0 when all is done, else the error of the page at
 * dst + *done; *done bytes before it were done by us.  *eagain counts pauses.  Async-signal-safe.
 */
int emu_uffd_fill(int fd, enum emu_fill how, uint64_t dst, const void *src, uint64_t len, bool wake, uint64_t *done,
                  unsigned *eagain)
{
	const uint64_t mode = wake ? 0 : 1; /* DONTWAKE is bit 0 of all three */
	_Static_assert(UFFDIO_COPY_MODE_DONTWAKE == 1 && UFFDIO_ZEROPAGE_MODE_DONTWAKE == 1 &&
	               UFFDIO_POISON_MODE_DONTWAKE == 1 && UFFDIO_MOVE_MODE_DONTWAKE == 1, "one mode bit for all");
	unsigned pauses = 0;

	*done = 0;
	while (*done < len) {
		int64_t n = 0;
		int err;

		switch (how) {
		case EMU_FILL_COPY:
			err = emu_uffd_copy(fd, dst + *done, (uint64_t)(uintptr_t)src + *done, len - *done, mode, &n);
			break;
		case EMU_FILL_ZEROPAGE:
			err = emu_uffd_zeropage(fd, dst + *done, len - *done, mode, &n);
			break;
		case EMU_FILL_MOVE:
			err = emu_uffd_move(fd, dst + *done, (uint64_t)(uintptr_t)src + *done, len - *done, mode, &n);
			break;
		default:
			err = emu_uffd_poison(fd, dst + *done, len - *done, mode, &n);
			break;
		}
		*done += (uint64_t)n;
		if (!err)
			break;
		if (err != -EAGAIN)
			return err;
		if (n > 0)
			continue; /* the next try starts at the page in the way */
		/*
		 * Changing mappings: the other side needs the processor, so give it up; a busy loop here
		 * starved the reader of the event in more than one page server.  10 s of it is a hang.
		 */
		if (++pauses > 10000)
			return -EAGAIN;
		++*eagain;
		if (pauses < 10)
			sched_yield();
		else
			nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
	return 0;
}
