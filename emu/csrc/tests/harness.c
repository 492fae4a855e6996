/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const int services[3] = { EMU_SERVICE_OFF, EMU_SERVICE_INLINE, EMU_SERVICE_THREAD };
const char *const service_names[3] = { "off", "inline", "thread" };

static uint8_t *map(uint64_t frames, bool huge, uint8_t **base, size_t *len)
{
	uint8_t *p;

	*len = (frames + 2 + 512) * EMU_FRAME_SIZE;
	p = mmap(NULL, *len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(p != MAP_FAILED);
	*base = (uint8_t *)(((uintptr_t)p + EMU_FRAME_SIZE + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	CHECK_EQ(madvise(*base, frames * EMU_FRAME_SIZE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE), 0);
	return p;
}

struct rig *rig_open(uint64_t frames, int service, uint32_t fault_around, uint32_t disable)
{
	struct rig *rig = calloc(1, sizeof(*rig));
	struct emu_region_options o = { .service = service, .service_cpu = -1, .fault_around = fault_around,
		                        .disable = disable, .uffd = -1 };
	uint64_t features, ioctls, mode = UFFDIO_REGISTER_MODE_MISSING;
	struct emu_uffd_info info;
	uint8_t *base;

	rig->frames = frames;
	rig->uffd = -1;
	rig->map = map(frames, disable & RIG_HUGE, &base, &rig->map_len);
	if (service != EMU_SERVICE_OFF) {
		uint64_t want = service == EMU_SERVICE_INLINE ? UFFD_FEATURE_SIGBUS : 0;

		if (disable & EMU_NO_MOVE)
			want |= UFFD_FEATURE_PAGEFAULT_FLAG_WP;
		else
			want |= UFFD_FEATURE_MOVE;
		if (disable & RIG_WP_ASYNC)
			want |= UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_PAGEFAULT_FLAG_WP;
		if (want & UFFD_FEATURE_PAGEFAULT_FLAG_WP)
			mode |= UFFDIO_REGISTER_MODE_WP;
		rig->uffd = emu_uffd_open(EMU_RUNG_FULL, 0, &info);
		if (rig->uffd < 0 || emu_uffd_api(rig->uffd, want | UFFD_FEATURE_POISON, &features, &ioctls)) {
			if (rig->uffd >= 0)
				close(rig->uffd);
			munmap(rig->map, rig->map_len);
			free(rig);
			return NULL;
		}
		CHECK_EQ(emu_uffd_register(rig->uffd, (uintptr_t)base, frames * EMU_FRAME_SIZE, mode, &ioctls), 0);
		o.uffd = rig->uffd;
		o.poison = 1;
		o.move = !(disable & EMU_NO_MOVE);
		o.wp = !!(mode & UFFDIO_REGISTER_MODE_WP);
		o.wp_async = !!(disable & RIG_WP_ASYNC);
	}
	CHECK_EQ(emu_region_open(base, frames, &o, &rig->r), 0);
	return rig;
}

void rig_lend_side(struct rig *rig)
{
	uint64_t ioctls;
	uint8_t *base;

	rig->side_map = map(rig->frames, false, &base, &rig->map_len);
	CHECK_EQ(emu_uffd_register(rig->uffd, (uintptr_t)base, rig->frames * EMU_FRAME_SIZE, UFFDIO_REGISTER_MODE_MISSING,
	                           &ioctls), 0);
	CHECK_EQ(emu_region_lend_side(rig->r, base), 0);
	CHECK_EQ(emu_region_lend_side(rig->r, base), -EBUSY);
}

struct rig *rig_open_nth(int n, uint64_t frames, uint32_t disable)
{
	struct rig *rig = rig_open(frames, n & 1 ? EMU_SERVICE_THREAD : EMU_SERVICE_INLINE, 1,
	                           disable | (n & 2 ? EMU_NO_MOVE : 0));

	if (rig)
		rig_lend_side(rig);
	return rig;
}

void rig_swap_on(struct rig *rig, uint64_t memory, int fd, uint64_t file)
{
	struct emu_store_options o = { .memory = memory, .fd = fd, .file = file, .readahead = 32 };

	CHECK_EQ(emu_swap_on(rig->r, &o), 0);
	CHECK_EQ(emu_swap_on(rig->r, &o), -EBUSY);
}

void rig_close(struct rig *rig)
{
	CHECK_EQ(emu_region_close(rig->r), 0);
	CHECK_EQ(emu_region_close(rig->r), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 1, 0, 1, NULL), -ESHUTDOWN);
	emu_region_free(rig->r);
	if (rig->uffd >= 0)
		close(rig->uffd);
	munmap(rig->map, rig->map_len);
	if (rig->side_map)
		munmap(rig->side_map, rig->map_len);
	free(rig);
}

int64_t rig_stat(struct rig *rig, const char *name)
{
	int64_t values[EMU_NR_STATS];

	emu_stats_read(rig->r, values);
	for (int i = 0; i < emu_stats_count(); i++)
		if (!strcmp(emu_stats_name(i), name))
			return values[i];
	fprintf(stderr, "no counter %s\n", name);
	abort();
}

static int64_t resident(const uint8_t *base, uint64_t frames)
{
	struct emu_residency res;

	CHECK_EQ(emu_residency_scan((uintptr_t)base, frames * EMU_FRAME_SIZE, &res), 0);
	return res.present - res.zeropage;
}

int64_t rig_rss(struct rig *rig)
{
	return resident(rig->r->base, rig->frames);
}

int64_t rig_side_rss(struct rig *rig)
{
	return rig->side_map ? resident(atomic_load(&rig->r->side), rig->frames) : 0;
}

void rig_check_books(struct rig *rig)
{
	uint8_t *states = malloc(rig->frames);
	int64_t n[EMU_NR_STATES] = { 0 }, gauges[EMU_NR_STATS], summary = 0;
	const uint64_t rotate = emu_rss_rotate;
	struct emu_look look;

	CHECK_EQ(emu_states_copy(rig->r, 0, rig->frames, states), 0);
	for (uint64_t i = 0; i < rig->frames; i++)
		n[states[i]]++;
	for (uint64_t b = 0; b < (rig->frames + 511) / 512; b++)
		summary += atomic_load(&rig->r->summary[b]);
	emu_stats_read(rig->r, gauges);
	for (int s = 0; s < EMU_NR_STATES; s++)
		CHECK_EQ(gauges[s], n[s]);
	CHECK_EQ(n[EMU_BUSY], 0);
	for (uint64_t i = 0; i < rig->frames; i++)
		CHECK(emu_usage_legal(emu_byte_usage(emu_byte_load(rig->r, i)), states[i]));
	CHECK_EQ(summary, (int64_t)rig->frames - n[EMU_ZERO]);
	/* the kernel may have dropped lazy ones that nobody has asked for since */
	CHECK(rig_rss(rig) <= n[EMU_RESIDENT] + n[EMU_LAZY]);
	CHECK(rig_rss(rig) >= n[EMU_RESIDENT]);
	if (rig->r->aside) {
		int64_t stale = 0;

		for (uint64_t i = 0; i < rig->frames; i++) {
			const bool copy = atomic_load(&rig->r->aside->stale[i]);

			CHECK(!(copy && states[i] == EMU_ASIDE));
			stale += copy;
		}
		CHECK_EQ(atomic_load(&rig->r->aside->nr_stale), stale);
		CHECK_EQ(rig_stat(rig, "aside_stale"), stale);
		CHECK_EQ(rig_side_rss(rig), n[EMU_ASIDE] + stale);
	}
	if (atomic_load(&rig->r->swap)) {
		struct emu_store_info info;

		CHECK_EQ(emu_swap_info(rig->r, &info), 0);
		CHECK_EQ(info.pages, n[EMU_PRESERVED]);
		CHECK_EQ(rig_stat(rig, "pool_frames") * EMU_FRAME_SIZE, info.pool_bytes);
		CHECK(info.object_bytes <= info.pool_bytes + info.file_bytes);
		CHECK(info.pages || (!info.object_bytes && !info.pool_bytes && !info.file_bytes && !info.same && !info.raw));
	}
	if (atomic_load(&rig->r->gate)) {
		struct emu_gate *g = atomic_load(&rig->r->gate);
		struct emu_gate_slot slot;

		CHECK_EQ(emu_gate_slot_read(g, rig->r->gate_slot, &slot), 0);
		CHECK_EQ(slot.charged - slot.stock,
		         n[EMU_ZEROMAP] + n[EMU_RESIDENT] + n[EMU_LAZY] + n[EMU_ASIDE] + rig_stat(rig, "aside_stale") +
		         rig_stat(rig, "pool_frames"));
	}
	/* by marks alone the look knows of every page that came or went, but for those that nobody told us of */
	emu_rss_rotate = 0;
	CHECK_EQ(emu_rss_look(rig->r, 0, &look), 0);
	emu_rss_rotate = rotate;
	CHECK_EQ(look.rss, rig_rss(rig));
	free(states);
}

int rig_run(struct rig *rig, int op, uint64_t gfn, uint64_t count, uint64_t arg, int threads, uint64_t *bad)
{
	struct emu_range range = { gfn, count, gfn };
	struct emu_vcpu_job job = { .op = op, .threads = threads, .arg = arg };
	int err = emu_vcpu_run(rig->r, &range, 1, &job);

	if (bad)
		*bad = err ? job.progress.bad_gfn : job.bad_count;
	return err;
}
