/* SPDX-License-Identifier: MIT */
/*
 * loops.c - plain loops over pages that are there, as a library: `emu bench` runs them over the very pages that its own
 * loop touches.  In mappings of their own they'd be other pages, and where pages lie in the caches decides by a factor of
 * two what touching them takes.
 */
#include <stdint.h>

#define PAGE 4096ul

void touch_write(uint8_t *p, uint64_t pages);
void touch_read(const uint8_t *p, uint64_t pages);

void touch_write(uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		__atomic_fetch_or(p + i * PAGE, 0, __ATOMIC_RELAXED);
}

void touch_read(const uint8_t *p, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		(void)*(const volatile uint8_t *)(p + i * PAGE);
}
