/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const int services[3] = { EMU_SERVICE_OFF, EMU_SERVICE_INLINE, EMU_SERVICE_THREAD };
const char *const service_names[3] = { "off", "inline", "thread" };

struct rig *rig_open(uint64_t frames, int service, uint32_t fault_around, uint32_t disable)
{
	struct rig *rig = calloc(1, sizeof(*rig));
	struct emu_region_options o = { .service = service, .service_cpu = -1, .fault_around = fault_around,
		                        .disable = disable, .uffd = -1 };
	uint64_t features, ioctls;
	struct emu_uffd_info info;
	uint8_t *base;

	rig->frames = frames;
	rig->uffd = -1;
	rig->map_len = (frames + 2 + 512) * EMU_FRAME_SIZE;
	rig->map = mmap(NULL, rig->map_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(rig->map != MAP_FAILED);
	base = (uint8_t *)(((uintptr_t)rig->map + EMU_FRAME_SIZE + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	CHECK_EQ(madvise(base, frames * EMU_FRAME_SIZE, MADV_NOHUGEPAGE), 0);
	if (service != EMU_SERVICE_OFF) {
		uint64_t want = service == EMU_SERVICE_INLINE ? UFFD_FEATURE_SIGBUS : 0;

		rig->uffd = emu_uffd_open(EMU_RUNG_FULL, 0, &info);
		if (rig->uffd < 0 || emu_uffd_api(rig->uffd, want | UFFD_FEATURE_POISON, &features, &ioctls)) {
			if (rig->uffd >= 0)
				close(rig->uffd);
			munmap(rig->map, rig->map_len);
			free(rig);
			return NULL;
		}
		CHECK_EQ(emu_uffd_register(rig->uffd, (uintptr_t)base, frames * EMU_FRAME_SIZE,
		                           UFFDIO_REGISTER_MODE_MISSING, &ioctls), 0);
		o.uffd = rig->uffd;
		o.poison = 1;
	}
	CHECK_EQ(emu_region_open(base, frames, &o, &rig->r), 0);
	return rig;
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

int64_t rig_rss(struct rig *rig)
{
	struct emu_residency res;

	CHECK_EQ(emu_residency_scan((uintptr_t)rig->r->base, rig->frames * EMU_FRAME_SIZE, &res), 0);
	return res.present - res.zeropage;
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
	CHECK_EQ(summary, (int64_t)rig->frames - n[EMU_ZERO]);
	/* the kernel may have dropped lazy ones that nobody has asked for since */
	CHECK(rig_rss(rig) <= n[EMU_RESIDENT] + n[EMU_LAZY]);
	CHECK(rig_rss(rig) >= n[EMU_RESIDENT]);
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
