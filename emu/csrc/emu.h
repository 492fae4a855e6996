/* SPDX-License-Identifier: MIT */
/*
 * emu.h - the native core as its callers see it: Python through cffi, and the C tests.
 *
 * Every function returns 0 (or a count) or -errno; the result, where there is one, is the last argument.  No call
 * needs Python, takes a lock that Python can hold, or calls back into it.  A region is lent its mapping: whoever
 * mapped the memory unmaps it, after emu_region_close().
 */
#ifndef EMU_H
#define EMU_H

#include <stddef.h>
#include <stdint.h>

#define EMU_FRAME_SHIFT 12
#define EMU_FRAME_SIZE 4096
#define EMU_BLOCK_FRAMES 512 /* 2 MiB: the unit of a summary word */

/* What a frame holds, as the host knows it.  One byte a frame; see state.c for the legal transitions. */
enum emu_state {
	EMU_ZERO,     /* never touched, or given back: no memory behind it, reads as zero */
	EMU_ZEROMAP,  /* the shared zero page is mapped: a write makes it resident without a fault */
	EMU_RESIDENT, /* a page of its own */
	EMU_LAZY,     /* MADV_FREE'd once: the kernel may drop it without an event; a write cancels silently */
	EMU_BUSY,     /* in transition: whoever meets it waits and then reads it again */
	EMU_LOST,     /* poisoned: an access fails, and never sees zeros */
	EMU_NR_STATES
};

enum emu_service {
	EMU_SERVICE_OFF,    /* no userfaultfd: the kernel zero-fills */
	EMU_SERVICE_INLINE, /* SIGBUS in the faulting thread */
	EMU_SERVICE_THREAD, /* a thread of ours reads messages */
};

/* Switched off by EMU_DISABLE or --disable: each rung of a ladder is tested with the higher one off. */
#define EMU_NO_PROCESS_MADVISE (1u << 0)
#define EMU_NO_POISON (1u << 1)
#define EMU_NO_FULL (1u << 2)   /* open user-mode-only at best */
#define EMU_NO_DEVICE (1u << 3) /* not through /dev/userfaultfd */
#define EMU_NO_SYSCALL (1u << 4)

/* Frames [gfn, gfn + count).  key seeds the content of the first one in fill and verify; the others count on. */
struct emu_range {
	uint64_t gfn;
	uint64_t count;
	uint64_t key;
};

/* ---- uffd.c ------------------------------------------------------------------------------------------------ */

enum emu_rung { EMU_RUNG_OFF, EMU_RUNG_USER, EMU_RUNG_FULL };
enum emu_door { EMU_DOOR_NONE, EMU_DOOR_SYSCALL, EMU_DOOR_DEVICE };

struct emu_uffd_info {
	int rung;
	int door;
	int full_errno; /* why the syscall didn't give a full one */
	int device_errno;
	int user_errno;
};

int emu_uffd_open(int want_rung, unsigned disable, struct emu_uffd_info *ret);
int emu_uffd_api(int fd, uint64_t features, uint64_t *features_ret, uint64_t *ioctls_ret);
int emu_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_ret);
int emu_uffd_unregister(int fd, uint64_t start, uint64_t len);
int emu_uffd_wake(int fd, uint64_t start, uint64_t len);
/* One bare ioctl each: *done is the kernel's own count (0 where it gave none), the return its errno. */
int emu_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_read(int fd, void *msgs, size_t bytes); /* bytes read or -errno */

/* ---- region.c ---------------------------------------------------------------------------------------------- */

struct emu_region;

struct emu_region_options {
	int uffd; /* handshaken and registered over the range; -1 with EMU_SERVICE_OFF */
	int service;
	int poison;       /* the uffd has UFFD_FEATURE_POISON */
	int service_cpu;  /* pin the service thread there; -1 = anywhere */
	uint32_t fault_around; /* frames, a power of two, 1..512 */
	uint32_t disable; /* EMU_NO_* */
};

int emu_region_open(void *base, uint64_t frames, const struct emu_region_options *options, struct emu_region **ret);
/*
 * Refuse new calls (-ESHUTDOWN), wait for those under way, stop the service, unregister; then the memory may be unmapped.
 * Any number of threads may call it, also at once: each returns when it is done. The struct stays until emu_region_free(),
 * so that a late call finds it closed and not gone.
 */
int emu_region_close(struct emu_region *r);
void emu_region_free(struct emu_region *r); /* closes it first, if need be */
int emu_region_dead(struct emu_region *r);  /* errno that killed the service thread, or 0 */
int64_t emu_region_table_bytes(struct emu_region *r); /* resident bytes of our own tables */
int emu_region_vectored(struct emu_region *r); /* discards many ranges in one system call */

/* ---- state.c, stats.c -------------------------------------------------------------------------------------- */

int emu_states_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret);
/*
 * Count all frames by cell, owner and state: ret[cell][owner][state], zeroed by the caller, cells of cell_frames each.
 * A range's key is its owner, 1 .. owners - 1; frames in no range are owner 0's. The ranges ascend and don't overlap.
 */
int emu_states_tally(struct emu_region *r, const struct emu_range *ranges, size_t n, uint64_t cell_frames,
                     int owners, uint32_t *ret);
int emu_stats_count(void);
const char *emu_stats_name(int i);
int emu_stats_read(struct emu_region *r, int64_t *ret); /* emu_stats_count() values */
/* How long faults took, as the faulting thread saw it, since the region was opened. */
enum emu_latency { EMU_LAT_FAULT_WRITE, EMU_LAT_FAULT_READ, EMU_NR_LATENCIES };
struct emu_hist;
int emu_latency_read(struct emu_region *r, int which, struct emu_hist *ret);

/* ---- reclaim.c --------------------------------------------------------------------------------------------- */

/*
 * Give frames back: the count of those that held memory (for lazy_free: that are lazily freed, anew or again), or -errno.
 * The ranges must not overlap. On an error, what was done before it stays done, and the books know.
 */
int64_t emu_discard(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_lazy_free(struct emu_region *r, const struct emu_range *ranges, size_t n);
/* Pressure on demand: MADV_PAGEOUT on the lazy frames; the count of those the kernel dropped. */
int64_t emu_lazy_drop(struct emu_region *r, const struct emu_range *ranges, size_t n);
/* A memory error in guest RAM: content is gone, accesses fail. And its explicit undoing. */
int64_t emu_poison(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_unpoison(struct emu_region *r, const struct emu_range *ranges, size_t n);

/* ---- guestcopy.c ------------------------------------------------------------------------------------------- */

struct emu_progress {
	uint64_t done;    /* frames (or bytes, for read and write) finished; a call can be resumed from there */
	uint64_t bad_gfn; /* where it stopped, if it returned an error */
};

int emu_guest_read(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, struct emu_progress *ret);
int emu_guest_write(struct emu_region *r, uint64_t gpa, const void *buf, uint64_t n, struct emu_progress *ret);
/* Whole frames from buf, in the order of the gfns: missing ones are installed, not faulted. -EEXIST: one comes twice. */
int emu_guest_install(struct emu_region *r, const uint64_t *gfns, size_t n, const void *buf,
                      struct emu_progress *ret);

/* ---- vcpu.c ------------------------------------------------------------------------------------------------ */

enum emu_op {
	EMU_TOUCH_READ,  /* load one byte */
	EMU_TOUCH_WRITE, /* atomic OR 0: dirties, changes nothing */
	EMU_SET,         /* every byte = arg */
	EMU_FILL,        /* 512 words seeded by (arg, key) */
	EMU_VERIFY,      /* compare with EMU_FILL's */
	EMU_COPY,        /* the bytes of the frame whose number is the key */
	EMU_NR_OPS
};

/* Latencies in ns: 8 buckets an octave. */
#define EMU_HIST_BUCKETS 320
struct emu_hist {
	uint64_t count, sum, max;
	uint64_t bucket[EMU_HIST_BUCKETS];
};
uint64_t emu_hist_floor(int bucket); /* the smallest ns that falls into it */

struct emu_vcpu_job {
	int op;
	int threads;
	uint64_t arg;
	struct emu_hist *hist; /* or NULL: no clock is read */
	uint64_t *bad;         /* verify: the frames that differ, ascending within a thread */
	uint64_t bad_cap, bad_count;
	struct emu_progress progress;
};
int emu_vcpu_run(struct emu_region *r, const struct emu_range *ranges, size_t n, struct emu_vcpu_job *job);
void emu_content_words(uint64_t seed, uint64_t key, uint64_t *ret); /* the 512 words of a filled frame */

/* ---- ring.c ------------------------------------------------------------------------------------------------ */

enum emu_event_type {
	EMU_EV_DISCARD = 1, EMU_EV_LAZY_FREE, EMU_EV_LAZY_DROP, EMU_EV_POISON, EMU_EV_LOST_FAULT, EMU_EV_SERVICE_DIED,
	EMU_EV_FAULT /* only while tracing is on */
};
struct emu_event {
	uint64_t ns; /* CLOCK_MONOTONIC */
	uint64_t gfn;
	uint32_t count; /* frames; of a reclaim: those taken, in all its ranges, the first of which starts at gfn */
	uint16_t type;
	uint16_t arg; /* FAULT: 1 = write; SERVICE_DIED: errno */
};
int64_t emu_ring_drain(struct emu_region *r, struct emu_event *ret, size_t cap); /* events */
int emu_ring_trace_faults(struct emu_region *r, int on);

/* ---- sigbus.c ---------------------------------------------------------------------------------------------- */

int emu_sigbus_is_ours(void);

/* ---- rss.c: what the kernel says of a region, asked again only where something may have changed --------------- */

struct emu_look {
	int64_t rss;   /* pages of its own (present and not the shared zero page) */
	int64_t asked; /* present pages that the kernel was asked about just now; some may have been asked twice */
	int whole;     /* all of the RAM was: rss is all of now */
};
int emu_rss_look(struct emu_region *r, int everything, struct emu_look *ret); /* -ENOTTY before 6.7 */

/* ---- residency.c: what the kernel says of any range of this process --------------------------------------- */

struct emu_residency {
	int64_t present, zeropage, swapped, huge; /* pages; zeropage is part of present; -1 = can't be told here */
};
int emu_residency_scan(uint64_t start, uint64_t len, struct emu_residency *ret); /* PAGEMAP_SCAN; -ENOTTY before 6.7 */
int64_t emu_residency_mincore(uint64_t start, uint64_t len);                      /* pages, an upper bound */

#endif
