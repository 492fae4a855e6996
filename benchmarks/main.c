/* SPDX-License-Identifier: MIT */
/*
 * main.c - a coprocess: one line in, one line out, so that `emu bench` can take its own measure and the reference's by
 * turns within one run.
 *
 *   in    NAME pages run threads cpu
 *   out   ns of the timed stretch
 *   in    cpus N[,M...]    run on these cores from now on; a measure's threads are spread over them
 *   in    spin N           a second thread of this process runs on core N from now on; -1: none
 *
 * A second running thread costs every operation that takes pages away a TLB shootdown: an interrupt to its core.
 */
#define _GNU_SOURCE
#include "reference.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
	const char *name;
	measure *run;
} measures[] = {
	{ "fault_inline", fault_inline }, { "fault_thread", fault_thread }, { "fault_kernel", fault_kernel },
	{ "install", install },
};

static pthread_t spinner;
static atomic_bool spinning;

static void *spin(void *arg)
{
	pin(*(int *)arg);
	while (atomic_load_explicit(&spinning, memory_order_relaxed))
		;
	return NULL;
}

static void set_spinner(int cpu)
{
	static int where;

	if (atomic_exchange(&spinning, false))
		pthread_join(spinner, NULL);
	if (cpu < 0)
		return;
	where = cpu;
	atomic_store(&spinning, true);
	if (pthread_create(&spinner, NULL, spin, &where))
		die("pthread_create");
}

int main(void)
{
	char line[256], name[64];

	while (fgets(line, sizeof(line), stdin)) {
		struct args a = { 0 };
		uint64_t ns = 0;
		size_t i;
		int cpu;

		if (!strncmp(line, "cpus ", 5)) {
			pin_list(line + 5);
		} else if (sscanf(line, "spin %d", &cpu) == 1) {
			set_spinner(cpu);
		} else {
			if (sscanf(line, "%63s %lu %lu %d %d", name, &a.pages, &a.run, &a.threads, &a.cpu) != 5)
				goto unknown;
			for (i = 0; i < sizeof(measures) / sizeof(measures[0]); i++)
				if (!strcmp(name, measures[i].name))
					break;
			if (i == sizeof(measures) / sizeof(measures[0]))
				goto unknown;
			ns = measures[i].run(&a);
		}
		printf("%lu\n", ns);
		fflush(stdout);
	}
	return 0;
unknown:
	errno = EINVAL;
	die(line);
}
