/* SPDX-License-Identifier: MIT */
/*
 * reference.h - what emu is measured against: the bare system calls, in the shortest C that does the job.
 *
 * Each measure makes its own mapping, prepares it outside the clock, times one stretch, and gives everything back.
 * Nothing of emu is linked in: no books, no guard, no registry, no histogram.
 */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096ul

/* Arguments of a measure, as the protocol's line gives them; what one doesn't use is 0. */
struct args {
	uint64_t pages;
	uint64_t run; /* pages of one call */
	int threads;
	int cpu; /* of the service thread; -1 = anywhere */
};

/* Returns ns of the timed stretch. */
typedef uint64_t measure(const struct args *a);

measure fault_inline, fault_thread, fault_kernel;                 /* faults.c */
measure install;                                 /* install.c */

/* common.c */
uint64_t now_ns(void);
void die(const char *what);
uint8_t *map(uint64_t pages);
void unmap(uint8_t *p, uint64_t pages);
int uffd_open(uint64_t features);
void uffd_register(int fd, uint8_t *p, uint64_t pages);
void pin(int cpu); /* this thread; -1: no change */
void pin_list(const char *cpus);

#endif
