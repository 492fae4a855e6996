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
                         ring_tests[], pagecache_tests[], aside_tests[], swap_tests[], gate_tests[], access_tests[], usage_tests[], page_states_tests[],
                         kernel_move_tests[], move_tests[], host_hard_cases_tests[], storm_tests[], host_storm_tests[];

struct rig {
	struct emu_region *r;
	uint8_t *map;
	size_t map_len;
	uint8_t *side_map; /* NULL: none was lent */
	uint64_t frames;
	int uffd;
};

#define RIG_WP_ASYNC (1u << 30) /* in disable: the kernel notes writes */
#define RIG_HUGE (1u << 31)     /* in disable: huge pages may be collapsed to */

/* A region of `frames`, mapped as emu/ram.py maps one; NULL when the machine has no userfaultfd for `service`. */
struct rig *rig_open(uint64_t frames, int service, uint32_t fault_around, uint32_t disable);
void rig_lend_side(struct rig *rig);
void rig_swap_on(struct rig *rig, uint64_t memory, int fd, uint64_t file);
void rig_close(struct rig *rig);
int64_t rig_stat(struct rig *rig, const char *name);
int64_t rig_rss(struct rig *rig); /* pages, by the kernel */
int64_t rig_side_rss(struct rig *rig);
void rig_check_books(struct rig *rig); /* gauges = states = kernel; no frame BUSY */
int rig_run(struct rig *rig, int op, uint64_t gfn, uint64_t count, uint64_t arg, int threads, uint64_t *bad);
/* The two ways out of the guest that there are, and the services: 4 combinations. */
#define RIGS 4
struct rig *rig_open_nth(int n, uint64_t frames, uint32_t disable); /* with a side region; NULL: not here */
extern const int services[3];
extern const char *const service_names[3];

#endif
