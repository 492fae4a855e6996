/* SPDX-License-Identifier: MIT */
/* main.c - runs every test, or those whose name contains argv[1]; a test aborts with both values when it fails. */
#include "harness.h"

#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	const struct test *const all[] = { state_tests, uffd_fill_tests, fault_tests, reclaim_tests,
		                           rss_tests, ring_tests, pagecache_tests, aside_tests, swap_tests, gate_tests,
		                           access_tests, usage_tests, page_states_tests, kernel_move_tests, move_tests,
		                           host_hard_cases_tests, storm_tests, host_storm_tests };
	int passed = 0, skipped = 0;

	alarm(600); /* a hang is a failure */
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		for (const struct test *t = all[i]; t->name; t++) {
			if (argc > 1 && !strstr(t->name, argv[1]))
				continue;
			fprintf(stderr, "%s\n", t->name);
			if (t->run() == SKIPPED) {
				fprintf(stderr, "  skipped: no userfaultfd here\n");
				skipped++;
			} else {
				passed++;
			}
		}
	}
	printf("%d passed, 0 failed, %d skipped\n", passed, skipped);
	return passed ? 0 : 1;
}
