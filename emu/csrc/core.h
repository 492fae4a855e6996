/* SPDX-License-Identifier: MIT */
/*
 * core.h - what the core's files share among themselves.  Not for callers: those include emu.h.
 *
 * Who owns what: region.c the struct and the registry, state.c the bytes, fault.c the way from a missing frame to a
 * present one, sigbus.c and service.c the two callers of fault.c, guestcopy.c and guestwalk.c every access to guest
 * memory, reclaim.c most ways back, aside.c and swap.c (swapout.c, swapin.c) those by which a frame's content is kept.
 */
#ifndef EMU_CORE_H
#define EMU_CORE_H

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "emu.h"
#include "uapi.h"

/* Kept out of the sanitizer: vCPUs race on guest bytes by design, as real ones do. */
#if defined(__SANITIZE_THREAD__)
#define EMU_GUEST_BYTES __attribute__((no_sanitize_thread))
#define EMU_SAVEMASK 1 /* TSan runs every handler with all signals blocked: the jump must restore the mask */
#else
#define EMU_GUEST_BYTES
#define EMU_SAVEMASK 0
#endif

#define EMU_STRIPES 16
#define EMU_WAITQS 64
#define EMU_LATENCY_EVERY 8 /* faults of a thread, of which one is timed */

/* Counters. The first EMU_NR_STATES are gauges: frames in that state (a BUSY frame counts where it came from). */
#define EMU_STATS(X)                                                                                                  \
	X(nr_zero) X(nr_zeromap) X(nr_resident) X(nr_lazy) X(nr_busy) X(nr_lost) X(nr_aside) X(nr_preserved)          \
	X(nr_discarded)                                                                                               \
	X(pgfault) X(pgfault_write) X(pgfault_read) X(pgfault_lazy) X(pgfault_spurious) X(pgfault_lost)               \
	X(pgfault_failed) X(busy_wait)                                                                                \
	X(vcpu_calls) X(vcpu_frames) X(vcpu_ns)                                                                       \
	X(copy_frames) X(zeropage_frames) X(install_frames)                                                           \
	X(discard_frames) X(discard_zeromap) X(discard_calls)                                                         \
	X(lazyfree_frames) X(lazyfree_calls) X(lazydrop_frames) X(lazydrop_calls)                                     \
	X(aside_frames) X(aside_return) X(aside_restored) X(aside_dropped) X(aside_skipped) X(aside_stale)            \
	X(swap_out_frames) X(swap_in_frames) X(swap_readahead) X(swap_same) X(swap_raw) X(swap_cancelled)             \
	X(swap_failed) X(swap_corrupt) X(swap_dropped) X(swap_file_read) X(swap_file_written) X(pgfault_discarded)    \
	X(gate_throttled) X(gate_failed) X(pool_frames)                                                                              \
	X(steal_unused) X(steal_volatile) X(steal_potential) X(steal_preserved)                                       \
	X(poison_frames) X(unpoison_frames)                                                                           \
	X(uffd_eagain) X(uffd_eexist) X(uffd_miscounted) X(service_batches) X(service_messages)                       \
	X(sigbus_rechained) X(ring_overflow)

enum emu_stat {
#define X(name) EMU_STAT_##name,
	EMU_STATS(X)
#undef X
	EMU_NR_STATS
};

struct emu_stripe {
	_Atomic int64_t n[EMU_NR_STATS];
} __attribute__((aligned(128)));

/* A histogram that many threads add to; stats.c. */
struct emu_latencies {
	_Atomic uint64_t count, sum, max;
	_Atomic uint64_t bucket[EMU_HIST_BUCKETS];
};

struct emu_waitq {
	_Atomic uint32_t seq;
	_Atomic uint32_t waiters;
} __attribute__((aligned(64)));

struct emu_ring;
struct emu_swap;
struct emu_access;
struct emu_usages;

/* A table of ours in a mapping of its own, lazily populated. */
struct emu_table {
	uint8_t *p;
	size_t len;
};

#define EMU_STALE_RING 256
/* What exists once a side region was lent: aside.c. */
struct emu_aside {
	struct emu_table table;
	_Atomic uint16_t *stamp; /* by frame: when it was set aside, by the caller's count; changed under BUSY */
	_Atomic uint8_t *stale;  /* by frame: its side page is a copy left behind; changed under BUSY */
	_Atomic int64_t nr_stale;
	_Atomic uint32_t stale_head, sweeping;
	_Atomic uint64_t stale_ring[EMU_STALE_RING]; /* gfn + 1 */
};

struct emu_region {
	uint8_t *base;
	uint64_t frames;
	int uffd;
	int service;
	bool have_poison;  /* UFFD_FEATURE_POISON negotiated */
	bool vectored;     /* process_madvise works on ourselves */
	bool have_move, have_wp, have_wp_async;
	_Atomic(uint8_t *) side; /* frame gfn's place aside is at side + gfn * 4096 */
	struct emu_aside *aside;
	_Atomic(struct emu_swap *) swap;
	_Atomic(struct emu_access *) access;
	_Atomic(struct emu_usages *) usages;
	atomic_bool telling; /* the guest says what its frames are worth: nothing but steal.c takes what isn't its own to give */
	_Atomic uint64_t hand; /* where the search for victims goes on */
	uint32_t disable;
	_Atomic(struct emu_gate *) gate;
	int gate_slot, gate_deadline_ms;
	pthread_mutex_t setup; /* of the above, one at a time */
	uint32_t fault_around;
	int pagemap_fd;
	int slot; /* in the registry */

	uint8_t *tables; /* one lazily populated mapping: states, summary words, ring */
	size_t tables_len;
	_Atomic uint8_t *state;
	_Atomic uint32_t *summary; /* a block's frames that aren't ZERO */
	struct emu_ring *ring;
	struct emu_latencies *latencies; /* [EMU_STRIPES][EMU_NR_LATENCIES] */

	/* rss.c: per block, whether its pages may have changed since the kernel was asked, and what it said then */
	_Atomic uint8_t *changed;
	uint16_t *block_rss;
	pthread_mutex_t look_lock;
	int64_t looked_rss;
	uint64_t look_cursor; /* block */

	pthread_t thread;
	bool have_thread;
	int stop_fd;
	_Atomic int dead;

	_Atomic uint32_t calls;  /* under way */
	_Atomic uint32_t closed; /* 0 open, 1 closing, 2 closed */

	struct emu_waitq waitq[EMU_WAITQS];
	struct emu_stripe stripe[EMU_STRIPES];
};

/*
 * A guard stands around each access to guest memory: where the handler goes when the frame can't be served.  It
 * belongs to one thread and lives on its stack; nothing that a guarded section holds survives the jump, because a
 * guarded section holds nothing but a promise, which whoever armed the guard keeps (guestaccess.h).
 */
struct emu_guard {
	sigjmp_buf env;
	struct emu_region *region;
	volatile int err;
	volatile uint64_t gfn;
	volatile bool elsewhere; /* gfn is another region's */
	/* the books already say what an access to this frame is about to do; EMU_NO_PROMISE: no such frame */
	volatile uint64_t promised;
	volatile bool promised_write;
};
#define EMU_NO_PROMISE UINT64_MAX

/*
 * initial-exec: the SIGBUS handler reads it, and the default model of a dlopen'ed object may call malloc at a
 * thread's first access.
 */
struct emu_thread {
	struct emu_guard *_Atomic guard;
	unsigned stripe; /* 0 = not chosen yet */
	unsigned faults; /* met by its accesses */
	bool impatient; /* a charge that would wait fails instead */
	unsigned access_slot; /* access.c: its line + 1, during a call on a region that is tracked */
	/* sigbus.c */
	uint64_t last_addr;
	unsigned same_addr;
	int chaining;
	uint64_t chain_sp;
	int let_go;
};
extern _Thread_local struct emu_thread emu_thread __attribute__((tls_model("initial-exec")));

/* region.c */
int emu_region_enter(struct emu_region *r);
int emu_region_enter_at(struct emu_region *r, const struct emu_range *ranges, size_t n);
void emu_region_leave(struct emu_region *r);
bool emu_registry_overlaps(uint64_t start, uint64_t len);
struct emu_region *emu_registry_get(uint64_t addr, uint64_t *gfn_ret);
void emu_registry_put(struct emu_region *r);
const uint8_t *emu_zero_source(void); /* EMU_BLOCK_FRAMES frames of zeros */
static inline uint8_t *emu_frame(const struct emu_region *r, uint64_t gfn)
{
	return r->base + (gfn << EMU_FRAME_SHIFT);
}
static inline uint8_t *emu_side(const struct emu_region *r, uint64_t gfn)
{
	return atomic_load_explicit(&r->side, memory_order_acquire) + (gfn << EMU_FRAME_SHIFT);
}
static inline bool emu_in_side(const struct emu_region *r, const void *p)
{
	const uint8_t *side = atomic_load_explicit(&r->side, memory_order_acquire);

	return side && (uintptr_t)p - (uintptr_t)side < r->frames << EMU_FRAME_SHIFT;
}
int emu_table_map(struct emu_table *t, size_t len);
void emu_table_unmap(struct emu_table *t);
int64_t emu_table_bytes(const struct emu_table *t); /* resident */
static inline bool emu_range_ok(const struct emu_region *r, uint64_t gfn, uint64_t count)
{
	return gfn <= r->frames && count <= r->frames - gfn;
}
static inline int emu_ranges_check(const struct emu_region *r, const struct emu_range *ranges, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (!emu_range_ok(r, ranges[i].gfn, ranges[i].count))
			return -ERANGE;
	return 0;
}

/* state.c */
bool emu_state_legal(uint8_t from, uint8_t to, bool uffd);
static inline uint8_t emu_byte_state(uint8_t byte)
{
	return byte & EMU_STATE_MASK;
}
static inline uint8_t emu_byte_usage(uint8_t byte)
{
	return byte >> EMU_USAGE_SHIFT;
}
#define EMU_ANY_USAGE 15u
/* A frame's byte, whole. acquire: pairs with the release in publish; the page is installed before the byte says so */
static inline uint8_t emu_byte_load(const struct emu_region *r, uint64_t gfn)
{
	return atomic_load_explicit(&r->state[gfn], memory_order_acquire);
}
static inline uint8_t emu_state_load(const struct emu_region *r, uint64_t gfn)
{
	return emu_byte_state(emu_byte_load(r, gfn));
}
bool emu_state_try(struct emu_region *r, uint64_t gfn, uint8_t from, uint8_t to);
void emu_state_publish(struct emu_region *r, uint64_t gfn, uint8_t to); /* from BUSY, which the caller holds */
void emu_state_publish_as(struct emu_region *r, uint64_t gfn, uint8_t to, uint8_t usage);
uint64_t emu_state_claim(struct emu_region *r, uint64_t gfn, uint64_t most, uint8_t from); /* into BUSY; how many */
/* The same, of those alone whose usage is in a set of them, a bit each. */
uint64_t emu_state_claim_used(struct emu_region *r, uint64_t gfn, uint64_t most, uint8_t from, unsigned usages);
void emu_state_publish_run(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t to);
/* Whether the eight frames from gfn on, a multiple of 8, all have this byte. */
static inline bool emu_byte_alike8(const struct emu_region *r, uint64_t gfn, uint8_t byte)
{
	return __atomic_load_n((const uint64_t *)(const void *)(r->state + gfn), __ATOMIC_ACQUIRE) == byte * 0x0101010101010101u;
}
/* The states of the eight frames from gfn on, a multiple of 8, if they are all the same; else EMU_NR_STATES. */
static inline uint8_t emu_state_load8(const struct emu_region *r, uint64_t gfn)
{
	uint64_t word = __atomic_load_n((const uint64_t *)(const void *)(r->state + gfn), __ATOMIC_ACQUIRE);

	word &= EMU_STATE_MASK * 0x0101010101010101u;
	return word == (word & 0xff) * 0x0101010101010101u ? (uint8_t)word : EMU_NR_STATES;
}
void emu_state_wake(struct emu_region *r, uint64_t gfn, uint64_t count);
void emu_state_wait(struct emu_region *r, uint64_t gfn);
bool emu_state_awaited(struct emu_region *r, uint64_t gfn); /* whether somebody waits for a frame of gfn's block, or near */
/* Not there, and a touch brings it: what a fault takes time for. */
static inline bool emu_state_missing(uint8_t state)
{
	return state == EMU_ZERO || state == EMU_ASIDE || state == EMU_PRESERVED;
}
/* Whether a frame in that state holds memory of the host's, page by page. */
static inline bool emu_state_held(uint8_t state)
{
	return state == EMU_ZEROMAP || state == EMU_RESIDENT || state == EMU_LAZY || state == EMU_ASIDE;
}
void emu_state_moved(struct emu_region *r, uint8_t from, uint8_t to, int64_t frames); /* the gauges */
long emu_futex(_Atomic uint32_t *word, int op, uint32_t val);

/* stats.c */
void emu_stat_add(struct emu_region *r, enum emu_stat which, int64_t n);
void emu_hist_add(struct emu_hist *h, uint64_t ns);
void emu_hist_merge(struct emu_hist *into, const struct emu_hist *from);
size_t emu_latencies_bytes(void);
void emu_latency_add(struct emu_region *r, enum emu_latency which, uint64_t ns);
uint64_t emu_now_ns(void);

/* ring.c */
size_t emu_ring_bytes(void);
void emu_ring_init(struct emu_ring *ring);
void emu_ring_push(struct emu_region *r, int type, uint64_t gfn, uint64_t count, int arg);
bool emu_ring_traces_faults(const struct emu_region *r);

/* uffd.c */
enum emu_fill { EMU_FILL_COPY, EMU_FILL_ZEROPAGE, EMU_FILL_POISON, EMU_FILL_MOVE };
int emu_uffd_fill(int fd, enum emu_fill how, uint64_t dst, const void *src, uint64_t len, bool wake, uint64_t *done,
                  unsigned *eagain);
/* The ioctl that emu_uffd_fill() calls; a test puts a kernel of its own here. */
extern int (*emu_uffd_ioctl)(int fd, unsigned long request, void *arg);

/* move.c */
int emu_move(struct emu_region *r, uint64_t gfn, uint64_t n, bool back, uint64_t *done);

/* fault.c */
int emu_fault_resolve(struct emu_region *r, uint64_t gfn, bool write, int how);
void emu_fault_unmark(struct emu_region *r, uint64_t gfn);
int emu_fault_vanished(struct emu_region *r, uint64_t gfn, bool signalled);
int emu_fault_fill(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t prior, bool write, const void *src,
                   uint64_t *done);
bool emu_fault_forget(struct emu_region *r, uint64_t gfn, uint8_t usage);
int64_t emu_fault_install(struct emu_region *r, uint64_t gfn, uint64_t count, const void *src);

/* sigbus.c */
void emu_sigbus_ensure(struct emu_region *r);
void emu_sigbus_release(void);
void emu_sigbus_forked(void);
void emu_sigbus_watch(bool on);
bool emu_sigbus_unblock(void); /* was blocked */
void emu_sigbus_block(void);

/* service.c */
int emu_service_start(struct emu_region *r, int cpu);
int emu_thread_start(pthread_t *ret, void *(*body)(void *), void *arg, const char *name);
void emu_service_stop(struct emu_region *r);
void emu_service_die(struct emu_region *r, int err);
void emu_service_refuse(struct emu_region *r, uint64_t gfn, uint64_t count);

/* guestwalk.c */
struct emu_walk {
	struct emu_guard guard;
	struct emu_region *r;
	const struct emu_range *ranges;
	size_t n;
	int op;
	uint64_t arg;
	struct emu_hist *hist;
	uint64_t skip, left; /* frames, in the ranges' order */
	uint64_t *bad;
	uint64_t bad_cap, bad_count;
	uint64_t done;
};
int emu_guest_walk(struct emu_walk *w);

/* rss.c */
extern uint64_t emu_rss_rotate;
/* After a page of the block changed, and a full barrier. A mark that is there isn't written: vCPUs share its line. */
static inline void emu_rss_mark(struct emu_region *r, uint64_t block)
{
	if (!atomic_load_explicit(&r->changed[block], memory_order_relaxed))
		atomic_store_explicit(&r->changed[block], 1, memory_order_relaxed);
}

/* steal.c */
uint64_t emu_steal_held(struct emu_region *r, uint64_t gfn, uint64_t n, uint64_t *keep);

/* reclaim.c */
int64_t emu_reclaim_steal(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage);

/* advise.c */
bool emu_advise_vectored_probe(void);
void emu_advise_forked(void);
int emu_advise(struct emu_region *r, const struct iovec *run, size_t n, int advice, enum emu_stat calls, size_t *done_runs);
enum emu_there {
	EMU_NOWHERE,
	EMU_THERE_SWAP, /* pagemap's bit 62: swapped, under migration, or a marker (poison) */
	EMU_THERE,      /* present */
};
void emu_pages_there(struct emu_region *r, const uint8_t *at, uint64_t count, uint8_t *ret);
bool emu_can_lose(const struct emu_region *r);
int emu_lose(struct emu_region *r, uint64_t gfn, uint64_t count); /* empty frames held BUSY: make accesses fail */
int emu_find(struct emu_region *r, uint64_t gfn, uint64_t count);

/* usage.c */
/* What a call has said; emu_usage_count() adds it to the region's counts. */
struct emu_usage_tally {
	uint32_t moved[EMU_NR_USAGES][EMU_NR_USAGES], refused[EMU_NR_USAGES], gone;
};
bool emu_usage_legal(uint8_t usage, uint8_t state);
int emu_usage_enter(struct emu_region *r);
enum emu_said emu_usage_say(struct emu_region *r, uint64_t gfn, int usage, struct emu_usage_tally *t);
bool emu_usage_say8(struct emu_region *r, uint64_t gfn, uint8_t usage, struct emu_usage_tally *t);
void emu_usage_count(struct emu_region *r, int cause, const struct emu_usage_tally *t);
static inline int64_t emu_usage_changed(const struct emu_usage_tally *t)
{
	int64_t n = 0;

	for (int from = 0; from < EMU_NR_USAGES; from++)
		for (int to = 0; to < EMU_NR_USAGES; to++)
			n += t->moved[from][to];
	return n;
}
void emu_usage_free(struct emu_region *r);

/* aside.c */
static inline int emu_aside_stamp(const struct emu_region *r, uint64_t gfn)
{
	return atomic_load_explicit(&r->aside->stamp[gfn], memory_order_relaxed);
}
int emu_aside_return(struct emu_region *r, uint64_t gfn);
int64_t emu_aside_take(struct emu_region *r, uint64_t gfn, uint64_t end, int stamp, unsigned usages);
int64_t emu_aside_restore(struct emu_region *r, uint64_t gfn, uint64_t end, int stamp);
uint64_t emu_aside_stamped(struct emu_region *r, uint64_t gfn, uint64_t n, int stamp);
void emu_aside_left(struct emu_region *r, uint64_t gfn); /* BUSY, and its side page is a copy of what is elsewhere */
void emu_aside_settle(struct emu_region *r, uint64_t gfn); /* after that, and after it was published */
void emu_aside_free(struct emu_region *r);
#define EMU_STAMP_SWAP 65535

/* swap.c, swapout.c, swapin.c */
int emu_swap_in(struct emu_region *r, uint64_t gfn);
int64_t emu_swap_store(struct emu_region *r, uint64_t gfn, uint64_t end); /* for steal.c */
bool emu_access_may_go(struct emu_region *r, uint64_t gfn, unsigned usages); /* access.c: whether it might be taken */
uint64_t emu_swap_forget(struct emu_region *r, uint64_t gfn, uint64_t count);
bool emu_swap_forget_as(struct emu_region *r, uint64_t gfn, uint8_t usage);
void emu_swapd_stop(struct emu_region *r);
void emu_swap_free(struct emu_region *r);
int64_t emu_swap_table_bytes(struct emu_region *r);

/* gate.c */
int emu_gate_charge_slow(struct emu_region *r, int64_t frames, int how);
void emu_gate_uncharge_slow(struct emu_region *r, int64_t frames);
enum { EMU_GATE_WAIT, EMU_GATE_TRY, EMU_GATE_FORCE };
/* Before memory is taken: 0, or -ENOMEM (WAIT: after the deadline; TRY: at once; FORCE: never). Async-signal-safe. */
static inline int emu_gate_charge(struct emu_region *r, int64_t frames, int how)
{
	return atomic_load_explicit(&r->gate, memory_order_acquire) ? emu_gate_charge_slow(r, frames, how) : 0;
}
static inline void emu_gate_uncharge(struct emu_region *r, int64_t frames)
{
	if (frames && atomic_load_explicit(&r->gate, memory_order_acquire))
		emu_gate_uncharge_slow(r, frames);
}
void emu_gate_parked(struct emu_region *r, uint64_t ns, bool in_vain); /* a charge that waited elsewhere: how long */
void emu_gate_detach(struct emu_region *r);

/* access.c */
void emu_access_enter_slow(struct emu_region *r);
void emu_access_leave_slow(struct emu_region *r);
void emu_access_note_slow(struct emu_region *r, uint64_t gfn, uint64_t count, bool write);
/* Around a call that touches guest memory, and before each touch of frames [gfn, gfn + count), count < 65536. */
static inline void emu_access_enter(struct emu_region *r)
{
	if (atomic_load_explicit(&r->access, memory_order_acquire))
		emu_access_enter_slow(r);
}
static inline void emu_access_leave(struct emu_region *r)
{
	if (emu_thread.access_slot)
		emu_access_leave_slow(r);
}
static inline void emu_access_note(struct emu_region *r, uint64_t gfn, uint64_t count, bool write)
{
	if (atomic_load_explicit(&r->access, memory_order_acquire)) /* also if it was switched on during this call */
		emu_access_note_slow(r, gfn, count, write);
}
void emu_access_peek(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret); /* bits, and none is cleared */
void emu_access_free(struct emu_region *r);
int64_t emu_access_table_bytes(struct emu_region *r);

#endif
