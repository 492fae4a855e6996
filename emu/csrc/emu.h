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
	EMU_ASIDE,    /* moved out of the guest, kept for a while: any touch brings it back */
	EMU_PRESERVED, /* in the store: any touch brings it back */
	EMU_DISCARDED, /* taken while its owner can make it anew: an access fails, and is told so (ENODATA) */
	EMU_NR_STATES
};

/*
 * What the guest says of a frame's content (CMM2; usage.c). It shares the byte with the state: usage << EMU_USAGE_SHIFT |
 * state.
 */
enum emu_usage {
	EMU_STABLE,    /* needed: the host must keep it. Frames that nobody says anything of */
	EMU_UNUSED,    /* worthless: the host may drop it */
	EMU_VOLATILE,  /* the guest can have it again: the host may discard it, and an access is told (ENODATA) */
	EMU_POTENTIAL, /* the same, while it is clean; dirty, it must be kept */
	EMU_NR_USAGES
};
#define EMU_USAGE_SHIFT 4
#define EMU_STATE_MASK 15

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
#define EMU_NO_MOVE (1u << 5)
#define EMU_NO_WP (1u << 6)
#define EMU_NO_LZ4 (1u << 7)
#define EMU_NO_MEMBARRIER (1u << 8)
#define EMU_NO_PAGEMAP (1u << 9)

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
int emu_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int emu_uffd_read(int fd, void *msgs, size_t bytes); /* bytes read or -errno */

/* ---- region.c ---------------------------------------------------------------------------------------------- */

struct emu_region;

struct emu_region_options {
	int uffd; /* handshaken and registered over the range; -1 with EMU_SERVICE_OFF */
	int service;
	int poison;       /* the uffd has UFFD_FEATURE_POISON */
	int move;         /* it has UFFD_FEATURE_MOVE */
	int wp;           /* the range is registered for write protection, without WP_ASYNC; not with move */
	int wp_async;     /* or with it: the kernel notes writes; only with move, see aside.c */
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
void emu_region_forked(struct emu_region *r); /* in a child, which has no tables: closed there */
/* Where the frames' bytes are, for who measures what changing one costs. To write there breaks the books. */
uint8_t *emu_region_bytes(struct emu_region *r);

/* ---- state.c, stats.c -------------------------------------------------------------------------------------- */

int emu_states_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret);
/*
 * Count all frames by cell, owner and state: ret[cell][EMU_NR_OWNERS][EMU_NR_TALLIES], zeroed by the caller, cells of
 * cell_frames each. A range's key is its owner; the ranges ascend and don't overlap. Frames in no range are whose m says.
 * Those in memory that the guest calls volatile, or potentially so, are counted as EMU_TALLY_VOLATILE, not by their state.
 */
#define EMU_TALLY_VOLATILE EMU_NR_STATES
#define EMU_NR_TALLIES (EMU_NR_STATES + 1)
struct emu_memmap;
int emu_states_tally(struct emu_region *r, const struct emu_memmap *m, const struct emu_range *ranges, size_t n,
                     uint64_t cell_frames, uint32_t *ret);
int emu_stats_count(void);
const char *emu_stats_name(int i);
int emu_stats_read(struct emu_region *r, int64_t *ret); /* emu_stats_count() values */
/* How long faults took, as the faulting thread saw it, since the region was opened. */
enum emu_latency { EMU_LAT_FAULT_WRITE, EMU_LAT_FAULT_READ, EMU_LAT_ASIDE_RETURN, EMU_LAT_SWAP_IN, EMU_NR_LATENCIES };
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

/* ---- usage.c: what the guest says of its frames --------------------------------------------------------------- */

/* Why the guest said it: where its kernel did (mm/page_alloc.c, filemap.c, memory.c ... of the patches of 2009). */
enum emu_cause {
	EMU_CAUSE_FREE,      /* arch_free_page(): into the allocator */
	EMU_CAUSE_ALLOC,     /* arch_alloc_page() */
	EMU_CAUSE_READ,      /* unlock_page() after it was read from the disk */
	EMU_CAUSE_WRITEBACK, /* end_page_writeback() */
	EMU_CAUSE_LOOKUP,    /* find_get_page() */
	EMU_CAUSE_PUT,       /* put_page(): but the cache's, the last reference */
	EMU_CAUSE_SINK,      /* from the active list to the inactive one */
	EMU_CAUSE_MAP,       /* a page-table entry, for reading */
	EMU_CAUSE_MKWRITE,   /* the first one for writing */
	EMU_CAUSE_UNMAP,     /* and the last one gone */
	EMU_CAUSE_PIN,       /* follow_page(), mlock */
	EMU_CAUSE_COW,       /* do_wp_page(), do_cow_fault() */
	EMU_CAUSE_DISCARDED, /* a discard fault: out of the cache */
	EMU_CAUSE_OTHER,     /* said by hand */
	EMU_NR_CAUSES
};
/* Frames, by cause: from one usage to another; refused, by what was asked for; and those found gone when made stable. */
struct emu_usage_counts {
	int64_t moved[EMU_NR_CAUSES][EMU_NR_USAGES][EMU_NR_USAGES];
	int64_t refused[EMU_NR_CAUSES][EMU_NR_USAGES];
	int64_t gone[EMU_NR_CAUSES];
};
int emu_usage_tracked(struct emu_region *r);
int emu_usage_track(struct emu_region *r); /* from now on usages may be said. -EOPNOTSUPP: a lost page can't be told here */
/*
 * Say `usage` of frames; how many changed, or -errno. EMU_STABLE: up to `cap` of those that were discarded meanwhile are in
 * `gone`, *nr_gone is how many there were: they stay so until they are called unused, or wholly overwritten. Must not be said
 * of a frame by two threads at once.
 */
int64_t emu_usage_set(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage, int cause, uint64_t *gone,
                      size_t cap, size_t *nr_gone);
int64_t emu_usage_set_frames(struct emu_region *r, const uint32_t *gfns, size_t n, int usage, int cause, uint64_t *gone,
                             size_t cap, size_t *nr_gone);
/*
 * Of one frame: enum emu_said, or -errno. For who can't batch. The frame's number is where the sayer points, since from
 * Python a second argument takes longer than all of the call's work.
 */
enum emu_said {
	EMU_SAID,         /* it changed */
	EMU_SAID_ALREADY, /* it was so */
	EMU_SAID_REFUSED,
	EMU_SAID_GONE, /* EMU_STABLE: it can't be, since it was discarded */
};
struct emu_sayer { struct emu_region *region; const uint64_t *gfn; int usage, cause; };
int emu_usage_one(const struct emu_sayer *s);
int emu_usage_counts(struct emu_region *r, struct emu_usage_counts *ret);
int emu_usage_matrix(struct emu_region *r, int64_t *ret); /* frames: ret[EMU_NR_USAGES][EMU_NR_STATES] */
int emu_usage_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret);

/* ---- steal.c: what the host takes, by what the guest says --------------------------------------------------------- */

/*
 * Frames of that usage (not EMU_STABLE) that hold memory, among these; how many were taken, or -errno. EMU_POTENTIAL needs
 * the side region and access bits (-EOPNOTSUPP), and for dirty ones a store: without it they stay.
 */
int64_t emu_steal(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage);
enum emu_steal_policy { EMU_STEAL_BY_AGE, EMU_STEAL_ROUND, EMU_STEAL_AT_RANDOM };
/* Up to `want` frames, of the usages in the set (a bit each), unused ones first; how many were taken. */
int64_t emu_steal_some(struct emu_region *r, uint64_t want, unsigned usages, int policy, uint64_t seed);

/* ---- aside.c ------------------------------------------------------------------------------------------------- */

/*
 * Lend the side region: as large as the RAM, mapped alike (private, anonymous, no huge pages), registered with the same
 * uffd, empty.  Once; it may be unmapped after emu_region_close().
 */
int emu_region_lend_side(struct emu_region *r, void *base);
int emu_region_aside_how(struct emu_region *r); /* 2: UFFDIO_MOVE, 1: write-protect and copy, 0: neither */
#define EMU_STAMP_MAX 65534
/* Take RESIDENT frames out of the guest, stamped with a number up to EMU_STAMP_MAX; the count, or -errno. */
int64_t emu_set_aside(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp);
/* Put those with that stamp (-1: any) back without a touch; the count. */
int64_t emu_bring_back(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp);
/* Those of the frames still aside with that stamp (-1: any) are dropped: ZERO, or with evict DISCARDED. The count. */
int64_t emu_aside_drop(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp, int evict);
int64_t emu_aside_sweep(struct emu_region *r); /* drop copies that are left in the side region of frames that came back */

/* ---- store.c, swap.c ------------------------------------------------------------------------------------------ */

struct emu_store_options {
	uint64_t memory; /* bytes of the pool in memory; 0: none */
	int fd;          /* of the file tier; -1: none. Stays the caller's, who closes it after the region */
	uint64_t file;   /* bytes that it may grow to */
	uint32_t readahead; /* pages, 1..32, brought back with a missing one where they were stored after it */
	uint32_t disable;   /* EMU_NO_LZ4 */
};
struct emu_store_info {
	int64_t pages, same, raw; /* stored now; of those a word each, and of those uncompressed */
	int64_t object_bytes;     /* of the others, together, in memory and in the file */
	int64_t pool_bytes;       /* memory that the pool has taken for them, in slabs */
	int64_t pool_resident;    /* of it, by the kernel */
	int64_t file_bytes;       /* of the file in use */
	int error;                /* the last errno of a page that couldn't be stored, or read; 0 */
	int lz4;
};
int emu_swap_on(struct emu_region *r, const struct emu_store_options *options); /* needs the side region */
/* Out of the guest into the store: those that went, which may be fewer (it is full, or fails: emu_store_info.error). */
int64_t emu_swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_swap_back(struct emu_region *r, const struct emu_range *ranges, size_t n); /* into the guest, without a touch */
int emu_swap_info(struct emu_region *r, struct emu_store_info *ret);
int emu_swap_corrupt(struct emu_region *r, uint64_t gfn, uint64_t byte); /* for tests: flip a bit of what is stored */
/* The worker: takes the frames idle longest, as many as were asked for in emu_swapd_kick(), and when a gate is at its max. */
int emu_swapd_start(struct emu_region *r);
int emu_swapd_kick(struct emu_region *r, uint64_t frames);
int emu_swapd_drain(struct emu_region *r); /* until it has done what it was asked for, or can't */

/* ---- gate.c: a budget that several processes share --------------------------------------------------------------- */

#define EMU_GATE_SLOTS 64
struct emu_gate_slot {
	int64_t charged;   /* frames */
	int64_t stock;     /* of those, not yet used: the region's to take, and anybody's who waits */
	int64_t throttled; /* charges that had to wait */
	int64_t throttled_ns;
	int64_t failed; /* those that waited in vain */
	int64_t waiting; /* threads that wait now */
	uint64_t pad[2];
};
struct emu_gate {
	uint64_t magic;
	int64_t max; /* frames; charges wait above it */
	int64_t peak; /* the most that was charged at once */
	uint32_t seq, waiters; /* a futex: something was given back */
	uint64_t pad[4];
	struct emu_gate_slot slot[EMU_GATE_SLOTS];
};
int emu_gate_init(struct emu_gate *g, int64_t max); /* in memory that is shared, zeroed */
void emu_gate_set_max(struct emu_gate *g, int64_t max);
int64_t emu_gate_charged(struct emu_gate *g); /* frames, all slots */
int64_t emu_gate_slot_read(struct emu_gate *g, int slot, struct emu_gate_slot *ret);
int64_t emu_gate_release(struct emu_gate *g, int slot); /* its process is dead: give back what it had; frames */
/* Charge this region's frames from now on, those that it has among them. deadline_ms: how long a charge waits. */
int emu_gate_attach(struct emu_region *r, struct emu_gate *g, int slot, int deadline_ms);

/* ---- access.c --------------------------------------------------------------------------------------------------- */

#define EMU_ACCESSED 1
#define EMU_DIRTIED 2
#define EMU_SEEN 4 /* as ACCESSED, which a scan clears: for who harvests by himself */
int emu_access_track(struct emu_region *r, int on);
/*
 * Read and clear bits: ret[i] = those of `bits` that frame gfn + i had. An access that is under way leaves its bits set, so
 * that what it stores after this isn't missed by the next harvest.
 */
int emu_access_harvest(struct emu_region *r, uint64_t gfn, uint64_t count, int bits, uint8_t *ret);
/* One scan: frames in memory (RESIDENT, LAZY) not accessed since the last one get a scan older. ret[age], of 256, is cleared. */
int emu_access_scan(struct emu_region *r, uint64_t *ret);
/* Frames of these usages (a bit each) that might be taken, by age: ret[256]; all are 0 where nobody looks at accessed bits. */
int emu_access_ages(struct emu_region *r, unsigned usages, uint64_t *ret);
/*
 * Up to `want` RESIDENT frames of the usages in the set (a bit each), oldest first as of the last scan, none younger than
 * min_age, in ranges. min_age -1: of any age, as a hand that goes round meets them.
 */
int64_t emu_access_victims(struct emu_region *r, int min_age, uint64_t want, unsigned usages, struct emu_range *ret,
                           size_t cap, size_t *n);
/* Pages written since the last call, by the kernel's word (WP_ASYNC), which starts anew. -EOPNOTSUPP. */
int64_t emu_access_written(struct emu_region *r);

/* ---- guestcopy.c ------------------------------------------------------------------------------------------- */

struct emu_progress {
	uint64_t done;    /* frames (or bytes, for read and write) finished; a call can be resumed from there */
	uint64_t bad_gfn; /* where it stopped, if it returned an error */
};

int emu_guest_read(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, struct emu_progress *ret);
int emu_guest_write(struct emu_region *r, uint64_t gpa, const void *buf, uint64_t n, struct emu_progress *ret);
/* Bytes [skip, skip + n) of the ranges' frames, one after another, to or from buf (preadv, pwritev). */
int emu_guest_copyv(struct emu_region *r, const struct emu_range *ranges, size_t n_ranges, uint64_t skip, void *buf,
                    uint64_t n, int write, struct emu_progress *ret);
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
	EMU_EV_ASIDE, EMU_EV_ASIDE_DROP, EMU_EV_SWAP_OUT, EMU_EV_SWAP_FAILED, EMU_EV_SWAP_CORRUPT,
	EMU_EV_STEAL,
	EMU_EV_FAULT /* only while tracing is on */
};
struct emu_event {
	uint64_t ns; /* CLOCK_MONOTONIC */
	uint64_t gfn;
	uint32_t count; /* frames; of a reclaim: those taken, in all its ranges, the first of which starts at gfn */
	uint16_t type;
	uint16_t arg; /* FAULT: 1 = write; SERVICE_DIED, SWAP_FAILED: errno */
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

/* ---- memmap.c: the guest's page descriptors (mem_map), in the guest's kernel's hands -------------------------- */

/* Whose a frame is. PCP and REPORTED are the allocator's to say, and only come in a tally's ranges. */
enum emu_owner {
	EMU_OWNER_FREE,
	EMU_OWNER_ANON,
	EMU_OWNER_SHMEM, /* of files that live in memory alone */
	EMU_OWNER_ACTIVE, /* of the page cache: clean, on the active list */
	EMU_OWNER_INACTIVE,
	EMU_OWNER_DIRTY,
	EMU_OWNER_WRITEBACK,
	EMU_OWNER_BALLOON,
	EMU_OWNER_HINTED, /* held by the balloon driver during a free page hinting run */
	EMU_OWNER_PCP,
	EMU_OWNER_REPORTED,
	EMU_NR_OWNERS
};

enum emu_lru {
	EMU_LRU_INACTIVE_ANON, EMU_LRU_ACTIVE_ANON, EMU_LRU_INACTIVE_FILE, EMU_LRU_ACTIVE_FILE, EMU_LRU_UNEVICTABLE,
	EMU_NR_LRU
};

/* Page flags (PG_*). ACTIVE is read only here: the lists' doing. */
#define EMU_PG_REFERENCED (1u << 0)
#define EMU_PG_ACTIVE (1u << 1)
#define EMU_PG_DIRTY (1u << 2)
#define EMU_PG_WRITEBACK (1u << 3)
#define EMU_PG_LOCKED (1u << 4)
#define EMU_PG_READAHEAD (1u << 5) /* a read that comes here starts the next readahead */
#define EMU_PG_WORKINGSET (1u << 6)
#define EMU_PG_RECLAIM (1u << 7) /* reclaim met it dirty: to the inactive tail once it is written */
#define EMU_PG_YOUNG (1u << 8)   /* accessed through a mapping since reclaim looked: one bit for all PTEs */
#define EMU_PG_HANDED (1u << 9)  /* handed over to the host as inactive, and not accessed since */
#define EMU_PG_WRITABLE (1u << 10) /* some page-table entry may write it (page_states.c) */
#define EMU_PG_DISCARDED (1u << 11) /* the host has taken it */

struct emu_memmap_stats {
	int64_t nr_owner[EMU_NR_OWNERS]; /* frames; FREE isn't kept */
	int64_t nr_lru[EMU_NR_LRU];
	int64_t nr_mapped;      /* pages of the cache that some process maps */
	int64_t nonresident_age; /* evictions and activations so far (mm/workingset.c) */
	uint16_t gen;           /* the generation of now, which accesses stamp: lru.c */
	int64_t pgactivate, pgdeactivate, pgrefill, pgrotated;
	int64_t moved[EMU_NR_OWNERS * EMU_NR_OWNERS]; /* frames that went from one owner to another, by from and to */
	int64_t workingset_refault, workingset_activate, workingset_restore;
	int64_t pgaccess; /* pages that reads found in the cache */
};

/* Begins with its stats; the rest is memmap.h's. */
int emu_memmap_create(uint64_t frames, struct emu_memmap **ret); /* frames < 2^31 */
void emu_memmap_destroy(struct emu_memmap *m);
/* Frames just allocated are somebody's: anonymous and shmem ones go to their lists. -EBUSY: one is somebody's already. */
int emu_pages_use(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int owner);
/* Frames about to be freed: off their lists, nobody's. -EBUSY, and nothing done: one is in the page cache. */
int emu_pages_release(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
/* delta: what is added to mapcounts; young: they are accessed. An unmapped young page counts as accessed (zap_pte_range). */
int emu_pages_map(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int delta, int young);
/* A page's flags and whose it is, by its frame; -ERANGE. */
struct emu_page_info { uint32_t space, index, mapcount; uint32_t flags; uint16_t gen, pins; uint8_t owner; };
int emu_page_look(struct emu_memmap *m, uint64_t pfn, struct emu_page_info *ret);

/* ---- native.c: what a page costs without a guest ---------------------------------------------------------------- */

int emu_native_fault(uint64_t pages, uint64_t *fault_ns, uint64_t *free_ns);
int emu_native_map(int fd, uint64_t pages, uint64_t *ns);
int emu_native_read(int fd, uint64_t bytes, size_t chunk, uint64_t *ns);

/* ---- page_states.c: what the guest's kernel says of its pages (CMM2) ----------------------------------------------- */

#define EMU_STATES_LIGHT 1u       /* only what the allocator says: stable, unused */
#define EMU_STATES_PER_MAPPING 2u /* no dirty bit a page: what may be written through a mapping is stable */
#define EMU_STATES_MINOR 4u       /* a minor fault says nothing, and a discard fault repairs */
#define EMU_STATES_BUFFERS 8u     /* pages that were written have private data (max_buffer_heads isn't 0) */
#define EMU_STATES_ALL 15u
/* From now on its kernel says what its pages are worth. The region must stay until emu_page_states_off(). */
int emu_page_states_on(struct emu_region *r, struct emu_memmap *m, unsigned how);
int64_t emu_page_states_off(struct emu_memmap *m, uint32_t *gone, size_t cap); /* pages of the cache that the host has taken */
int emu_pages_allocated(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_put(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_mlock(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_writable(struct emu_memmap *m, const struct emu_range *ranges, size_t n);

/* ---- pagecache.c: spaces, which know the page of each index (address_space) ----------------------------------- */

struct emu_space {
	uint32_t id;
	uint32_t *slot;
	uint64_t nr_slots;
	size_t len; /* of the slots' mapping; 0: malloc'ed */
	int64_t nr_pages, nr_dirty, nr_writeback, nr_shadows;
	int mlocked; /* some page of it was, once: none is called volatile from then on (page_states.c) */
};
int emu_space_create(struct emu_memmap *m, uint64_t pages, struct emu_space **ret);
int emu_space_resize(struct emu_memmap *m, struct emu_space *s, uint64_t pages); /* -EBUSY: pages are there beyond it */
int emu_space_destroy(struct emu_memmap *m, struct emu_space *s); /* -EBUSY: it has pages */

#define EMU_LOOKUP_MARK 1u       /* mark them accessed (mark_page_accessed) */
#define EMU_LOOKUP_SKIP_FIRST 2u /* but not the first one, of which only the generation is stamped */
#define EMU_LOOKUP_READAHEAD 4u  /* end after a page with PG_readahead */
#define EMU_LOOKUP_BACKWARD 8u   /* only count, from first down */
#define EMU_LOOKUP_ABSENT 16u    /* only count, the pages that aren't there */
#define EMU_LOOKUP_GET 32u       /* take a reference to each, which emu_pages_put() drops; -EOVERFLOW: it has too many */
#define EMU_LOOKUP_WHY 8         /* from this bit on: the cause of making it stable; 0: EMU_CAUSE_LOOKUP */
#define EMU_LOOKUP_GONE (1 << 29) /* in the answer: the page after these is in the cache, but the host has taken it */
#define EMU_LOOKUP_MARKER (1 << 30) /* in the answer: the last page has PG_readahead */
/*
 * How many pages in a row, from `first` on and at most `count`, are there; the first of them as (gfn, count, key = index)
 * in runs, whose number goes to *nr_runs; no more pages than fit.
 */
int64_t emu_space_lookup(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t count, unsigned how,
                         struct emu_range *runs, size_t cap, size_t *nr_runs);
#define EMU_INSERT_DIRTY 1u
#define EMU_INSERT_WRITE 2u /* about to be overwritten: no refault, whatever was there */
/* Frames of the ranges become the pages at their keys. -EEXIST, -EBUSY, and nothing done: a slot, or a frame, is taken. */
int emu_space_insert(struct emu_memmap *m, struct emu_space *s, const struct emu_range *ranges, size_t n, unsigned how);
enum emu_remove {
	EMU_REMOVE_TRUNCATE,   /* all of them, dirty or not; none may be mapped: -EBUSY */
	EMU_REMOVE_INVALIDATE, /* clean, unlocked, unmapped, not under writeback: invalidate_mapping_pages() */
	EMU_REMOVE_EVICT,      /* of those the ones that nobody has referenced; leaves shadows */
};
/* Take pages [first, end) out; their frames go to pfns, as many as fit. Returns how many: call again until it is 0. */
int64_t emu_space_remove(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, int how,
                         uint32_t *pfns, size_t cap);
/* Set and clear flags of the pages there are in [first, end); the count of those that it changed. */
int64_t emu_space_flag(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned set,
                       unsigned clear);
/* The first run of pages in [first, end) with (flags & mask) == value, in runs as of lookup; 0: there is none. */
int64_t emu_space_find(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned mask,
                       unsigned value, struct emu_range *runs, size_t cap, size_t *nr_runs);

/* ---- lru.c ----------------------------------------------------------------------------------------------------- */

/* One look at the cold end of a list of file pages (shrink_list). Frames of `freed` are out of the page cache. */
struct emu_shrink {
	uint64_t nr_to_scan;
	uint32_t *freed, *mapped; /* room for nr_to_scan each; mapped ones stay where they are, for the caller to unmap */
	uint64_t nr_scanned, nr_freed, nr_mapped;
	uint64_t nr_dirty, nr_writeback, nr_activated, nr_kept, nr_deactivated;
};
int emu_lru_shrink(struct emu_memmap *m, int list, struct emu_shrink *ret);
/*
 * Age: file pages not accessed for that many generations sink to the inactive list, and clean unmapped ones are freed; or
 * only listed, to be handed over, each once until it is accessed again.
 */
struct emu_aging {
	uint16_t sink_after, free_after;
	int hand_over;
	uint64_t most; /* pages freed, or listed; 0: no bound */
	uint32_t *freed; /* room for nr_lru[INACTIVE_FILE] + nr_lru[ACTIVE_FILE] */
	uint64_t nr_scanned, nr_sunk, nr_freed;
};
int emu_lru_age(struct emu_memmap *m, struct emu_aging *ret);
/* A list's frames from its head on: the count, at most cap of them written. */
int64_t emu_lru_list(struct emu_memmap *m, int list, uint32_t *pfns, size_t cap);

/* ---- disk.c: opening a file below a directory, and nowhere else ------------------------------------------------ */

struct emu_file_info {
	uint32_t dio_mem_align, dio_offset_align; /* bytes, for O_DIRECT; 0: none, or it can't be told (Linux before 6.1) */
};
/* An fd or -errno; -EXDEV: the path leads out of dirfd, by `..` or a link (openat2, Linux 5.6). */
int emu_file_open(int dirfd, const char *path, int flags, int mode, struct emu_file_info *ret);

/* ---- residency.c: what the kernel says of any range of this process --------------------------------------- */

struct emu_residency {
	int64_t present, zeropage, swapped, huge; /* pages; zeropage is part of present; -1 = can't be told here */
};
int emu_residency_scan(uint64_t start, uint64_t len, struct emu_residency *ret); /* PAGEMAP_SCAN; -ENOTTY before 6.7 */
int64_t emu_residency_mincore(uint64_t start, uint64_t len);                      /* pages, an upper bound */

#endif
