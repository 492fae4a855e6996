/* SPDX-License-Identifier: MIT */
/*
 * disk.c - opening a file of a guest's disk: below a directory of the host, and nowhere else.
 *
 * openat2() with RESOLVE_BENEATH (Linux 5.6) is the kernel's own check that a path doesn't lead out, by `..`, an absolute
 * name or a symbolic link; a check of the text would have a race between the look and the open.  statx() then says what
 * O_DIRECT wants of this file (STATX_DIOALIGN, 6.1): alignment of the buffer and of the offset, or that it can't be had.
 */
#define _GNU_SOURCE
#include "emu.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uapi.h"

int emu_file_open(int dirfd, const char *path, int flags, int mode, struct emu_file_info *ret)
{
	struct emu_open_how how = { .flags = (uint64_t)(unsigned)flags | O_CLOEXEC,
		                .mode = flags & O_CREAT ? (uint64_t)(unsigned)mode : 0,
		                .resolve = EMU_RESOLVE_BENEATH | EMU_RESOLVE_NO_MAGICLINKS };
	struct emu_statx stx;
	int fd = (int)syscall(SYS_openat2, dirfd, path, &how, sizeof(how));

	*ret = (struct emu_file_info){ 0 };
	if (fd < 0)
		return -errno;
	_Static_assert(sizeof(stx) == 256, "struct statx");
	memset(&stx, 0, sizeof(stx));
	if (!syscall(SYS_statx, fd, "", AT_EMPTY_PATH, EMU_STATX_DIOALIGN, &stx) && stx.mask & EMU_STATX_DIOALIGN) {
		ret->dio_mem_align = stx.dio_mem_align;
		ret->dio_offset_align = stx.dio_offset_align;
	}
	return fd;
}
