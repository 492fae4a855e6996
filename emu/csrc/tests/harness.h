/* SPDX-License-Identifier: MIT */
/* harness.h - a region to test on, and checks that print both values. */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdio.h>
#include <stdlib.h>

#include "core.h"

#define CHECK_EQ(a, b)                                                                                                \
	do {                                                                                                          \
		long long a_ = (long long)(a), b_ = (long long)(b);                                                   \
		if (a_ != b_) {                                                                                       \
			fprintf(stderr, "%s:%d: %s is %lld, wanted %s = %lld\n", __FILE__, __LINE__, #a, a_, #b, b_); \
			abort();                                                                                      \
		}                                                                                                     \
	} while (0)
#define CHECK(x) CHECK_EQ(!!(x), 1)

struct test {
	const char *name;
	int (*run)(void); /* 0 = passed, SKIPPED */
};
#define SKIPPED 77
extern const struct test state_tests[], uffd_fill_tests[], fault_tests[], reclaim_tests[], rss_tests[],
                         ring_tests[], pagecache_tests[], storm_tests[];

struct rig {
	struct emu_region *r;
	uint8_t *map;
	size_t map_len;
	uint64_t frames;
	int uffd;
};

/* A region of `frames`, mapped as emu/ram.py maps one; NULL when the machine has no userfaultfd for `service`. */
struct rig *rig_open(uint64_t frames, int service, uint32_t fault_around, uint32_t disable);
void rig_close(struct rig *rig);
int64_t rig_stat(struct rig *rig, const char *name);
int64_t rig_rss(struct rig *rig); /* pages, by the kernel */
void rig_check_books(struct rig *rig); /* gauges = states = kernel; no frame BUSY */
int rig_run(struct rig *rig, int op, uint64_t gfn, uint64_t count, uint64_t arg, int threads, uint64_t *bad);
extern const int services[3];
extern const char *const service_names[3];

#endif
