/* SPDX-License-Identifier: MIT */
/*
 * loops.c - plain loops over pages that are there, as a library: `emu bench` runs them over the very pages that its own
 * calls work on, in the same process.  In mappings of their own they'd be other pages, and where pages lie in the caches
 * decides by a factor of two what touching them takes; how they came to be decides by some per cent what freeing them
 * takes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#define PAGE 4096ul

void touch_write(uint8_t *p, uint64_t pages);
void touch_write_ahead(uint8_t *p, uint64_t pages);
void touch_read(const uint8_t *p, uint64_t pages);
void touch_list(const uint8_t *p, const uint64_t *pages, size_t n);
int discard(uint8_t *p, const uint64_t *ranges, size_t n);
void exchange(uint8_t *bytes, const uint32_t *at, size_t n, uint8_t value);

void touch_write(uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		__atomic_fetch_or(p + i * PAGE, 0, __ATOMIC_RELAXED);
}

/* The same, asking ahead for lines: an atomic OR waits for its own before the next one starts. */
void touch_write_ahead(uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++) {
		__builtin_prefetch(p + (i + 8) * PAGE, 1);
		__atomic_fetch_or(p + i * PAGE, 0, __ATOMIC_RELAXED);
	}
}

void touch_read(const uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		(void)*(const volatile uint8_t *)(p + i * PAGE);
}

void touch_list(const uint8_t *p, const uint64_t *pages, size_t n)
{
	for (size_t i = 0; i < n; i++)
		(void)*(const volatile uint8_t *)(p + pages[i] * PAGE);
}

/* A madvise a range; a range is (first page, pages, unused). Returns 0 or the errno. */
int discard(uint8_t *p, const uint64_t *ranges, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (madvise(p + ranges[3 * i] * PAGE, ranges[3 * i + 1] * PAGE, MADV_DONTNEED))
			return errno;
	return 0;
}

/* An atomic exchange of the bytes at these places: what a transition can't be cheaper than. */
void exchange(uint8_t *bytes, const uint32_t *at, size_t n, uint8_t value)
{
	for (size_t i = 0; i < n; i++)
		__atomic_exchange_n(bytes + at[i], value, __ATOMIC_ACQ_REL);
}
