/* What Python calls of the core: emu.h without what only C needs. cffi checks every layout against the compiler. */

/* uapi.h */
#define UFFD_API ...
#define UFFD_FEATURE_PAGEFAULT_FLAG_WP ...
#define UFFD_FEATURE_EVENT_FORK ...
#define UFFD_FEATURE_EVENT_REMAP ...
#define UFFD_FEATURE_EVENT_REMOVE ...
#define UFFD_FEATURE_MISSING_HUGETLBFS ...
#define UFFD_FEATURE_MISSING_SHMEM ...
#define UFFD_FEATURE_EVENT_UNMAP ...
#define UFFD_FEATURE_SIGBUS ...
#define UFFD_FEATURE_THREAD_ID ...
#define UFFD_FEATURE_MINOR_HUGETLBFS ...
#define UFFD_FEATURE_MINOR_SHMEM ...
#define UFFD_FEATURE_EXACT_ADDRESS ...
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM ...
#define UFFD_FEATURE_WP_UNPOPULATED ...
#define UFFD_FEATURE_POISON ...
#define UFFD_FEATURE_WP_ASYNC ...
#define UFFD_FEATURE_MOVE ...
#define UFFD_EVENT_PAGEFAULT ...
#define UFFD_EVENT_FORK ...
#define UFFD_EVENT_REMAP ...
#define UFFD_EVENT_REMOVE ...
#define UFFD_EVENT_UNMAP ...
#define UFFD_PAGEFAULT_FLAG_WRITE ...
#define UFFD_PAGEFAULT_FLAG_WP ...
#define UFFD_PAGEFAULT_FLAG_MINOR ...
#define UFFDIO_REGISTER_MODE_MISSING ...
#define UFFDIO_REGISTER_MODE_WP ...
#define UFFDIO_REGISTER_MODE_MINOR ...
#define UFFDIO_COPY_MODE_DONTWAKE ...
#define UFFDIO_COPY_MODE_WP ...
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE ...
#define UFFDIO_POISON_MODE_DONTWAKE ...
#define MAP_NORESERVE ...
#define MADV_DONTFORK ...
#define MADV_NOHUGEPAGE ...

int mprotect(void *addr, size_t len, int prot);
int munlock(const void *addr, size_t len);

/* emu.h */
#define EMU_FRAME_SIZE ...
#define EMU_BLOCK_FRAMES ...
#define EMU_HIST_BUCKETS ...
#define EMU_NO_PROCESS_MADVISE ...
#define EMU_NO_POISON ...
#define EMU_NO_FULL ...
#define EMU_NO_DEVICE ...
#define EMU_NO_SYSCALL ...
#define EMU_NO_MOVE ...
#define EMU_NO_WP ...
#define EMU_NO_LZ4 ...
#define EMU_NO_MEMBARRIER ...
#define EMU_NO_PAGEMAP ...
#define EMU_STAMP_MAX ...
#define EMU_ACCESSED ...
#define EMU_DIRTIED ...
#define EMU_SEEN ...
#define EMU_GATE_SLOTS ...
#define EMU_STATES_LIGHT ...
#define EMU_STATES_PER_MAPPING ...
#define EMU_STATES_MINOR ...
#define EMU_STATES_BUFFERS ...
enum emu_state { EMU_ZERO, EMU_ZEROMAP, EMU_RESIDENT, EMU_LAZY, EMU_BUSY, EMU_LOST, EMU_ASIDE, EMU_PRESERVED, EMU_DISCARDED,
	EMU_NR_STATES, ... };
#define EMU_NR_TALLIES ...
#define EMU_USAGE_SHIFT ...
enum emu_usage { EMU_STABLE, EMU_UNUSED, EMU_VOLATILE, EMU_POTENTIAL, EMU_NR_USAGES, ... };
enum emu_cause { EMU_CAUSE_FREE, EMU_CAUSE_ALLOC, EMU_CAUSE_READ, EMU_CAUSE_WRITEBACK, EMU_CAUSE_LOOKUP, EMU_CAUSE_PUT,
	EMU_CAUSE_SINK, EMU_CAUSE_MAP, EMU_CAUSE_MKWRITE, EMU_CAUSE_UNMAP, EMU_CAUSE_PIN, EMU_CAUSE_COW, EMU_CAUSE_DISCARDED,
	EMU_CAUSE_OTHER, EMU_NR_CAUSES, ... };
enum emu_steal_policy { EMU_STEAL_BY_AGE, EMU_STEAL_ROUND, EMU_STEAL_AT_RANDOM, ... };
#define EMU_PG_REFERENCED ...
#define EMU_PG_ACTIVE ...
#define EMU_PG_DIRTY ...
#define EMU_PG_WRITEBACK ...
#define EMU_PG_LOCKED ...
#define EMU_PG_READAHEAD ...
#define EMU_PG_WORKINGSET ...
#define EMU_PG_RECLAIM ...
#define EMU_PG_YOUNG ...
#define EMU_PG_HANDED ...
#define EMU_PG_WRITABLE ...
#define EMU_PG_DISCARDED ...
#define EMU_LOOKUP_MARK ...
#define EMU_LOOKUP_SKIP_FIRST ...
#define EMU_LOOKUP_READAHEAD ...
#define EMU_LOOKUP_BACKWARD ...
#define EMU_LOOKUP_ABSENT ...
#define EMU_LOOKUP_GET ...
#define EMU_LOOKUP_WHY ...
#define EMU_LOOKUP_GONE ...
#define EMU_LOOKUP_MARKER ...
#define EMU_INSERT_DIRTY ...
#define EMU_INSERT_WRITE ...
enum emu_owner { EMU_OWNER_FREE, EMU_OWNER_ANON, EMU_OWNER_SHMEM, EMU_OWNER_ACTIVE, EMU_OWNER_INACTIVE, EMU_OWNER_DIRTY,
	EMU_OWNER_WRITEBACK, EMU_OWNER_BALLOON, EMU_OWNER_HINTED, EMU_OWNER_PCP, EMU_OWNER_REPORTED, EMU_NR_OWNERS, ... };
enum emu_lru { EMU_LRU_INACTIVE_ANON, EMU_LRU_ACTIVE_ANON, EMU_LRU_INACTIVE_FILE, EMU_LRU_ACTIVE_FILE, EMU_LRU_UNEVICTABLE,
	EMU_NR_LRU, ... };
enum emu_remove { EMU_REMOVE_TRUNCATE, EMU_REMOVE_INVALIDATE, EMU_REMOVE_EVICT, ... };
enum emu_service { EMU_SERVICE_OFF, EMU_SERVICE_INLINE, EMU_SERVICE_THREAD, ... };
enum emu_rung { EMU_RUNG_OFF, EMU_RUNG_USER, EMU_RUNG_FULL, ... };
enum emu_door { EMU_DOOR_NONE, EMU_DOOR_SYSCALL, EMU_DOOR_DEVICE, ... };
enum emu_op { EMU_TOUCH_READ, EMU_TOUCH_WRITE, EMU_SET, EMU_FILL, EMU_VERIFY, EMU_COPY, ... };
enum emu_latency { EMU_LAT_FAULT_WRITE, EMU_LAT_FAULT_READ, EMU_LAT_ASIDE_RETURN, EMU_LAT_SWAP_IN, EMU_NR_LATENCIES, ... };
enum emu_event_type { EMU_EV_DISCARD, EMU_EV_LAZY_FREE, EMU_EV_LAZY_DROP, EMU_EV_POISON, EMU_EV_LOST_FAULT,
	EMU_EV_SERVICE_DIED, EMU_EV_ASIDE, EMU_EV_ASIDE_DROP, EMU_EV_SWAP_OUT, EMU_EV_SWAP_FAILED, EMU_EV_SWAP_CORRUPT,
	EMU_EV_STEAL, EMU_EV_FAULT, ... };

struct emu_range { uint64_t gfn; uint64_t count; uint64_t key; };
struct emu_progress { uint64_t done; uint64_t bad_gfn; };
struct emu_uffd_info { int rung; int door; int full_errno; int device_errno; int user_errno; };
struct emu_region_options {
	int uffd; int service; int poison; int move; int wp; int wp_async; int service_cpu; uint32_t fault_around;
	uint32_t disable;
};
struct emu_hist { uint64_t count, sum, max; uint64_t bucket[...]; };
struct emu_vcpu_job {
	int op; int threads; uint64_t arg; struct emu_hist *hist; uint64_t *bad; uint64_t bad_cap, bad_count;
	struct emu_progress progress;
};
struct emu_event { uint64_t ns; uint64_t gfn; uint32_t count; uint16_t type; uint16_t arg; };
struct emu_residency { int64_t present, zeropage, swapped, huge; };
struct emu_look { int64_t rss, asked; int whole; };
struct emu_region;
struct emu_store_options { uint64_t memory; int fd; uint64_t file; uint32_t readahead; uint32_t disable; };
struct emu_store_info {
	int64_t pages, same, raw, object_bytes, pool_bytes, pool_resident, file_bytes; int error; int lz4;
};
struct emu_gate_slot { int64_t charged, stock, throttled, throttled_ns, failed; ...; };
struct emu_gate { int64_t max, peak; ...; };
struct emu_memmap_stats {
	int64_t nr_owner[...]; int64_t nr_lru[...]; int64_t nr_mapped, nonresident_age; uint16_t gen;
	int64_t pgactivate, pgdeactivate, pgrefill, pgrotated;
	int64_t moved[...];
	int64_t workingset_refault, workingset_activate, workingset_restore, pgaccess;
};
struct emu_memmap { struct emu_memmap_stats stats; ...; };
struct emu_page_info { uint32_t space, index, mapcount; uint32_t flags; uint16_t gen, pins; uint8_t owner; };
struct emu_usage_counts { int64_t moved[...][...][...]; int64_t refused[...][...]; int64_t gone[...]; };
struct emu_space { uint32_t id; int64_t nr_pages, nr_dirty, nr_writeback, nr_shadows; int mlocked; ...; };
struct emu_shrink {
	uint64_t nr_to_scan; uint32_t *freed, *mapped;
	uint64_t nr_scanned, nr_freed, nr_mapped, nr_dirty, nr_writeback, nr_activated, nr_kept, nr_deactivated;
};
struct emu_aging { uint16_t sink_after, free_after; int hand_over; uint64_t most; uint32_t *freed; uint64_t nr_scanned, nr_sunk, nr_freed; };
struct emu_file_info { uint32_t dio_mem_align, dio_offset_align; };

/* uffd.c */
int emu_uffd_open(int want_rung, unsigned disable, struct emu_uffd_info *ret);
int emu_uffd_api(int fd, uint64_t features, uint64_t *features_ret, uint64_t *ioctls_ret);
int emu_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls_ret);
int emu_uffd_unregister(int fd, uint64_t start, uint64_t len);
int emu_uffd_wake(int fd, uint64_t start, uint64_t len);
int emu_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int emu_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
int emu_uffd_read(int fd, void *msgs, size_t bytes);

/* region.c */
int emu_region_open(void *base, uint64_t frames, const struct emu_region_options *options, struct emu_region **ret);
int emu_region_close(struct emu_region *r);
void emu_region_free(struct emu_region *r);
int emu_region_dead(struct emu_region *r);
int emu_region_vectored(struct emu_region *r);
int64_t emu_region_table_bytes(struct emu_region *r);

/* state.c, stats.c, ring.c, sigbus.c */
int emu_states_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret);
int emu_states_tally(struct emu_region *r, const struct emu_memmap *m, const struct emu_range *ranges, size_t n,
	uint64_t cell_frames, uint32_t *ret);
int emu_stats_count(void);
const char *emu_stats_name(int i);
int emu_stats_read(struct emu_region *r, int64_t *ret);
int emu_latency_read(struct emu_region *r, int which, struct emu_hist *ret);
uint64_t emu_hist_floor(int bucket);
int64_t emu_ring_drain(struct emu_region *r, struct emu_event *ret, size_t cap);
int emu_ring_trace_faults(struct emu_region *r, int on);
int emu_sigbus_is_ours(void);

/* reclaim.c */
int64_t emu_discard(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_lazy_free(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_lazy_drop(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_poison(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_unpoison(struct emu_region *r, const struct emu_range *ranges, size_t n);

/* aside.c */
int emu_region_lend_side(struct emu_region *r, void *base);
int emu_region_aside_how(struct emu_region *r);
int64_t emu_set_aside(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp);
int64_t emu_bring_back(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp);
int64_t emu_aside_drop(struct emu_region *r, const struct emu_range *ranges, size_t n, int stamp, int evict);
int64_t emu_aside_sweep(struct emu_region *r);

/* swap.c */
int emu_swap_on(struct emu_region *r, const struct emu_store_options *options);
int64_t emu_swap_out(struct emu_region *r, const struct emu_range *ranges, size_t n);
int64_t emu_swap_back(struct emu_region *r, const struct emu_range *ranges, size_t n);
int emu_swap_info(struct emu_region *r, struct emu_store_info *ret);
int emu_swap_corrupt(struct emu_region *r, uint64_t gfn, uint64_t byte);
int emu_swapd_start(struct emu_region *r);
int emu_swapd_kick(struct emu_region *r, uint64_t frames);
int emu_swapd_drain(struct emu_region *r);

/* gate.c */
int emu_gate_init(struct emu_gate *g, int64_t max);
void emu_gate_set_max(struct emu_gate *g, int64_t max);
int64_t emu_gate_charged(struct emu_gate *g);
int64_t emu_gate_slot_read(struct emu_gate *g, int slot, struct emu_gate_slot *ret);
int64_t emu_gate_release(struct emu_gate *g, int slot);
int emu_gate_attach(struct emu_region *r, struct emu_gate *g, int slot, int deadline_ms);

/* usage.c, steal.c */
int emu_usage_tracked(struct emu_region *r);
enum emu_said { EMU_SAID, EMU_SAID_ALREADY, EMU_SAID_REFUSED, EMU_SAID_GONE, ... };
struct emu_sayer { struct emu_region *region; const uint64_t *gfn; int usage, cause; };
int emu_usage_one(const struct emu_sayer *s);
void emu_region_forked(struct emu_region *r);
uint8_t *emu_region_bytes(struct emu_region *r);
int emu_native_fault(uint64_t pages, uint64_t *fault_ns, uint64_t *free_ns);
int emu_native_map(int fd, uint64_t pages, uint64_t *ns);
int emu_native_read(int fd, uint64_t bytes, size_t chunk, uint64_t *ns);
int emu_usage_track(struct emu_region *r);
int64_t emu_usage_set(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage, int cause, uint64_t *gone,
	size_t cap, size_t *nr_gone);
int64_t emu_usage_set_frames(struct emu_region *r, const uint32_t *gfns, size_t n, int usage, int cause, uint64_t *gone,
	size_t cap, size_t *nr_gone);
int emu_usage_counts(struct emu_region *r, struct emu_usage_counts *ret);
int emu_usage_matrix(struct emu_region *r, int64_t *ret);
int emu_usage_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret);
int64_t emu_steal(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage);
int64_t emu_steal_some(struct emu_region *r, uint64_t want, unsigned usages, int policy, uint64_t seed);

/* access.c */
int emu_access_track(struct emu_region *r, int on);
int emu_access_harvest(struct emu_region *r, uint64_t gfn, uint64_t count, int bits, uint8_t *ret);
int emu_access_scan(struct emu_region *r, uint64_t *ret);
int emu_access_ages(struct emu_region *r, unsigned usages, uint64_t *ret);
int64_t emu_access_victims(struct emu_region *r, int min_age, uint64_t want, unsigned usages, struct emu_range *ret,
                           size_t cap, size_t *n);
int64_t emu_access_written(struct emu_region *r);

/* guestcopy.c, guestwalk.c, vcpu.c */
int emu_guest_read(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, struct emu_progress *ret);
int emu_guest_write(struct emu_region *r, uint64_t gpa, const void *buf, uint64_t n, struct emu_progress *ret);
int emu_guest_copyv(struct emu_region *r, const struct emu_range *ranges, size_t n_ranges, uint64_t skip, void *buf,
	uint64_t n, int write, struct emu_progress *ret);
int emu_guest_install(struct emu_region *r, const uint64_t *gfns, size_t n, const void *buf, struct emu_progress *ret);
int emu_vcpu_run(struct emu_region *r, const struct emu_range *ranges, size_t n, struct emu_vcpu_job *job);
void emu_content_words(uint64_t seed, uint64_t key, uint64_t *ret);

/* rss.c, residency.c */
int emu_rss_look(struct emu_region *r, int everything, struct emu_look *ret);
int emu_residency_scan(uint64_t start, uint64_t len, struct emu_residency *ret);
int64_t emu_residency_mincore(uint64_t start, uint64_t len);

/* page_states.c */
int emu_page_states_on(struct emu_region *r, struct emu_memmap *m, unsigned how);
int64_t emu_page_states_off(struct emu_memmap *m, uint32_t *gone, size_t cap);
int emu_pages_allocated(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_put(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_mlock(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_writable(struct emu_memmap *m, const struct emu_range *ranges, size_t n);

/* memmap.c, pagecache.c, lru.c */
int emu_memmap_create(uint64_t frames, struct emu_memmap **ret);
void emu_memmap_destroy(struct emu_memmap *m);
int emu_pages_use(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int owner);
int emu_pages_release(struct emu_memmap *m, const struct emu_range *ranges, size_t n);
int emu_pages_map(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int delta, int young);
int emu_page_look(struct emu_memmap *m, uint64_t pfn, struct emu_page_info *ret);
int emu_space_create(struct emu_memmap *m, uint64_t pages, struct emu_space **ret);
int emu_space_resize(struct emu_memmap *m, struct emu_space *s, uint64_t pages);
int emu_space_destroy(struct emu_memmap *m, struct emu_space *s);
int64_t emu_space_lookup(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t count, unsigned how,
	struct emu_range *runs, size_t cap, size_t *nr_runs);
int emu_space_insert(struct emu_memmap *m, struct emu_space *s, const struct emu_range *ranges, size_t n, unsigned how);
int64_t emu_space_remove(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, int how,
	uint32_t *pfns, size_t cap);
int64_t emu_space_flag(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned set,
	unsigned clear);
int64_t emu_space_find(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned mask,
	unsigned value, struct emu_range *runs, size_t cap, size_t *nr_runs);
int emu_lru_shrink(struct emu_memmap *m, int list, struct emu_shrink *ret);
int emu_lru_age(struct emu_memmap *m, struct emu_aging *ret);
int64_t emu_lru_list(struct emu_memmap *m, int list, uint32_t *pfns, size_t cap);

/* disk.c */
int emu_file_open(int dirfd, const char *path, int flags, int mode, struct emu_file_info *ret);
