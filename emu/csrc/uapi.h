/* SPDX-License-Identifier: MIT */
/*
 * uapi.h - the kernel's userspace interface, as far as emu uses it.
 *
 * Installed headers are often older than the running kernel (Debian 12 ships 6.1's: no POISON, no MOVE, no
 * PAGEMAP_SCAN), and what a kernel can do is found by asking it, never by what it was compiled against.  So the
 * names stand here, spelled as in include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of Linux 6.18,
 * and neither of these headers is included anywhere.
 */
#ifndef EMU_UAPI_H
#define EMU_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* ---- userfaultfd(2) ---------------------------------------------------------------------------------------- */

#define UFFD_API ((__u64)0xAA)
#define UFFD_USER_MODE_ONLY 1 /* flag of the system call, 5.11 */

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1 << 0)
#define UFFD_FEATURE_EVENT_FORK (1 << 1)
#define UFFD_FEATURE_EVENT_REMAP (1 << 2)
#define UFFD_FEATURE_EVENT_REMOVE (1 << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS (1 << 4)
#define UFFD_FEATURE_MISSING_SHMEM (1 << 5)
#define UFFD_FEATURE_EVENT_UNMAP (1 << 6)
#define UFFD_FEATURE_SIGBUS (1 << 7)
#define UFFD_FEATURE_THREAD_ID (1 << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS (1 << 9)
#define UFFD_FEATURE_MINOR_SHMEM (1 << 10)
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#define UFFD_FEATURE_POISON (1 << 14)
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#define UFFD_FEATURE_MOVE (1 << 16)

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK 0x13
#define UFFD_EVENT_REMAP 0x14
#define UFFD_EVENT_REMOVE 0x15
#define UFFD_EVENT_UNMAP 0x16

#define UFFD_PAGEFAULT_FLAG_WRITE (1 << 0)
#define UFFD_PAGEFAULT_FLAG_WP (1 << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR (1 << 2)

struct uffd_msg {
	__u8 event;
	__u8 reserved1;
	__u16 reserved2;
	__u32 reserved3;
	union {
		struct {
			__u64 flags;
			__u64 address;
			union {
				__u32 ptid;
			} feat;
		} pagefault;
		struct {
			__u32 ufd;
		} fork;
		struct {
			__u64 from;
			__u64 to;
			__u64 len;
		} remap;
		struct {
			__u64 start;
			__u64 end;
		} remove;
		struct {
			__u64 reserved1;
			__u64 reserved2;
			__u64 reserved3;
		} reserved;
	} arg;
} __attribute__((packed));
_Static_assert(sizeof(struct uffd_msg) == 32, "the kernel's message is 32 bytes");

struct uffdio_api {
	__u64 api;
	__u64 features;
	__u64 ioctls;
};

struct uffdio_range {
	__u64 start;
	__u64 len;
};

#define UFFDIO_REGISTER_MODE_MISSING ((__u64)1 << 0)
#define UFFDIO_REGISTER_MODE_WP ((__u64)1 << 1)
#define UFFDIO_REGISTER_MODE_MINOR ((__u64)1 << 2)
struct uffdio_register {
	struct uffdio_range range;
	__u64 mode;
	__u64 ioctls;
};

#define UFFDIO_COPY_MODE_DONTWAKE ((__u64)1 << 0)
#define UFFDIO_COPY_MODE_WP ((__u64)1 << 1)
struct uffdio_copy {
	__u64 dst;
	__u64 src;
	__u64 len;
	__u64 mode;
	__s64 copy; /* bytes done, or -errno: signed, which a wrapper that casts it loses */
};

#define UFFDIO_ZEROPAGE_MODE_DONTWAKE ((__u64)1 << 0)
struct uffdio_zeropage {
	struct uffdio_range range;
	__u64 mode;
	__s64 zeropage;
};

#define UFFDIO_POISON_MODE_DONTWAKE ((__u64)1 << 0)
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};

#define UFFDIO_WRITEPROTECT_MODE_WP ((__u64)1 << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE ((__u64)1 << 1)
struct uffdio_writeprotect {
	struct uffdio_range range;
	__u64 mode;
};

#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1 << 1)
struct uffdio_move {
	__u64 dst;
	__u64 src;
	__u64 len;
	__u64 mode;
	__s64 move;
};

#define UFFDIO 0xAA
#define UFFDIO_API _IOWR(UFFDIO, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(UFFDIO, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(UFFDIO, 0x01, struct uffdio_range)
#define UFFDIO_WAKE _IOR(UFFDIO, 0x02, struct uffdio_range)
#define UFFDIO_COPY _IOWR(UFFDIO, 0x03, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(UFFDIO, 0x04, struct uffdio_zeropage)
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFDIO_WRITEPROTECT _IOWR(UFFDIO, 0x06, struct uffdio_writeprotect)
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#define USERFAULTFD_IOC_NEW _IO(UFFDIO, 0x00) /* on /dev/userfaultfd, 6.1 */

/* ---- /proc/PID/pagemap ------------------------------------------------------------------------------------- */

/* Documentation/admin-guide/mm/pagemap.rst: bits of one 64-bit entry.  Readable by its own process at any rank. */
#define PAGEMAP_PRESENT ((__u64)1 << 63)
#define PAGEMAP_SWAP ((__u64)1 << 62)

/* PAGEMAP_SCAN, 6.7. */
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
#define PAGE_IS_SOFT_DIRTY (1 << 7)

struct page_region {
	__u64 start;
	__u64 end;
	__u64 categories;
};

struct pm_scan_arg {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 end;
	__u64 walk_end;
	__u64 vec;
	__u64 vec_len;
	__u64 max_pages;
	__u64 category_inverted;
	__u64 category_mask;
	__u64 category_anyof_mask;
	__u64 return_mask;
};
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

/* ---- madvise(2), process_madvise(2) ------------------------------------------------------------------------ */

#ifndef MADV_FREE
#define MADV_FREE 8 /* 4.5 */
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21 /* 5.4 */
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440 /* 5.10; a process may give itself DONTNEED and FREE since 6.13 */
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#define PIDFD_SELF_THREAD_GROUP (-10001) /* "this process" without a descriptor, recent; older kernels get a real one */

/* ---- membarrier(2) ------------------------------------------------------------------------------------------- */

#ifndef SYS_membarrier
#define SYS_membarrier 324
#endif
#define MEMBARRIER_CMD_PRIVATE_EXPEDITED (1 << 3) /* 4.14 */
#define MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED (1 << 4)

/* ---- openat2(2), statx(2) ----------------------------------------------------------------------------------- */

#ifndef SYS_openat2
#define SYS_openat2 437 /* 5.6 */
#endif
struct emu_open_how { /* struct open_how */
	__u64 flags;
	__u64 mode;
	__u64 resolve;
};
#define EMU_RESOLVE_NO_MAGICLINKS 0x02
#define EMU_RESOLVE_BENEATH 0x08
#define EMU_STATX_DIOALIGN 0x2000 /* 6.1 */
struct emu_statx { /* struct statx, as far as it's wanted */
	__u32 mask;
	__u32 before[37];
	__u32 dio_mem_align;
	__u32 dio_offset_align;
	__u32 after[24];
};

#endif
