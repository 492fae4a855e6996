/* SPDX-License-Identifier: MIT */
/*
 * memmap.c - one descriptor a frame (struct page), and one byte that says whose the frame is.
 *
 * The byte is what a picture of the machine is made from: emu_states_tally() lays it over the frame states, eight frames
 * at a time, and so every frame is in one stage.  It follows from the flags (dirty, under writeback, on which list), and
 * is rewritten where those change; the number of frames of each owner is kept with it, so that no figure of the guest's
 * needs a walk.
 *
 * Everything here is lazily populated: a 1 TiB guest has 7 GiB of descriptors, and pays for the ones that it uses.
 */
#define _GNU_SOURCE
#include "memmap.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

int emu_memmap_create(uint64_t frames, struct emu_memmap **ret)
{
	struct emu_memmap *m;
	size_t pages = (frames + EMU_NR_LRU) * sizeof(struct emu_page);
	size_t blocks = (frames / EMU_BLOCK_FRAMES + 1) * sizeof(uint16_t);
	uint8_t *tables;

	*ret = NULL;
	if (!frames || frames >= SHADOW)
		return -ERANGE;
	m = calloc(1, sizeof(*m));
	if (!m)
		return -ENOMEM;
	m->t.len = pages + blocks + frames;
	tables = mmap(NULL, m->t.len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	m->t.space = calloc(1, sizeof(*m->t.space)); /* id 0 is no space */
	if (tables == MAP_FAILED || !m->t.space) {
		if (tables != MAP_FAILED)
			munmap(tables, m->t.len);
		free(m->t.space);
		free(m);
		return -ENOMEM;
	}
	m->t.frames = frames;
	m->t.page = (struct emu_page *)(void *)tables;
	m->t.block = (uint16_t *)(void *)(tables + pages);
	m->t.owner = tables + pages + blocks;
	m->t.nr_spaces = 1;
	for (uint32_t list = 0; list < EMU_NR_LRU; list++) {
		uint32_t head = (uint32_t)frames + list;

		m->t.page[head].next = m->t.page[head].prev = head;
	}
	*ret = m;
	return 0;
}

void emu_memmap_destroy(struct emu_memmap *m)
{
	if (!m)
		return;
	for (uint32_t id = 1; id < m->t.nr_spaces; id++) {
		struct emu_space *s = m->t.space[id];

		if (!s)
			continue;
		if (s->len)
			munmap(s->slot, s->len);
		else
			free(s->slot);
		free(s);
	}
	munmap(m->t.page, m->t.len);
	free(m->t.space);
	free(m->t.free_id);
	free(m);
}

bool emu_memmap_ranges_ok(const struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (ranges[i].gfn > m->t.frames || ranges[i].count > m->t.frames - ranges[i].gfn)
			return false;
	return true;
}

void emu_page_own(struct emu_memmap *m, uint32_t pfn, uint8_t owner)
{
	uint8_t before = m->t.owner[pfn];

	if (before == owner)
		return;
	m->stats.moved[before * EMU_NR_OWNERS + owner]++;
	m->stats.nr_owner[before]--;
	m->stats.nr_owner[owner]++;
	m->t.block[pfn / EMU_BLOCK_FRAMES] += (owner != EMU_OWNER_FREE) - (before != EMU_OWNER_FREE);
	m->t.owner[pfn] = owner;
}

void emu_page_classify(struct emu_memmap *m, uint32_t pfn)
{
	const struct emu_page *p = page_of(m, pfn);

	emu_page_own(m, pfn,
	             has(p, EMU_PG_WRITEBACK) ? EMU_OWNER_WRITEBACK
	             : has(p, EMU_PG_DIRTY)   ? EMU_OWNER_DIRTY
	             : has(p, EMU_PG_ACTIVE)  ? EMU_OWNER_ACTIVE
	                                      : EMU_OWNER_INACTIVE);
}

int emu_pages_use(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int owner)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	if (owner != EMU_OWNER_ANON && owner != EMU_OWNER_SHMEM && owner != EMU_OWNER_BALLOON && owner != EMU_OWNER_HINTED)
		return -EINVAL;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++)
			if (m->t.owner[ranges[i].gfn + k] != EMU_OWNER_FREE)
				return -EBUSY;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			uint32_t pfn = (uint32_t)(ranges[i].gfn + k);
			struct emu_page *p = page_of(m, pfn);

			emu_page_own(m, pfn, (uint8_t)owner);
			if (owner == EMU_OWNER_ANON || owner == EMU_OWNER_SHMEM) {
				p->flags = owner == EMU_OWNER_ANON ? PG_SWAPBACKED : PG_UNEVICTABLE;
				stamp(m, p);
				emu_lru_add(m, pfn);
			}
		}
	return 0;
}

int emu_pages_release(struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++)
			if (m->t.owner[ranges[i].gfn + k] && page_of(m, (uint32_t)(ranges[i].gfn + k))->space != NO_SPACE)
				return -EBUSY;
	emu_states_begin(m);
	for (size_t i = 0; i < n; i++) {
		emu_pages_freed(m, (uint32_t)ranges[i].gfn, ranges[i].count);
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			uint32_t pfn = (uint32_t)(ranges[i].gfn + k);

			if (!m->t.owner[pfn])
				continue; /* nobody's: its descriptor may never have been written, and stays so */
			if (has(page_of(m, pfn), PG_LRU))
				emu_lru_del(m, pfn);
			page_of(m, pfn)->flags = 0;
			emu_page_own(m, pfn, EMU_OWNER_FREE);
		}
	}
	emu_states_end(m);
	return 0;
}

int emu_pages_map(struct emu_memmap *m, const struct emu_range *ranges, size_t n, int delta, int young)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	if (delta < 0)
		emu_states_begin(m);
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			uint32_t pfn = (uint32_t)(ranges[i].gfn + k);
			struct emu_page *p = page_of(m, pfn);
			bool was = p->mapcount != 0;

			if (delta < 0 && p->mapcount < (uint32_t)-delta) {
				emu_states_end(m);
				return -EINVAL;
			}
			p->mapcount += (uint32_t)delta;
			m->stats.nr_mapped += (p->mapcount != 0) - was;
			if (young) {
				p->flags |= EMU_PG_YOUNG;
				stamp(m, p);
			}
			if (delta < 0 && has(p, EMU_PG_YOUNG)) {
				p->flags &= ~(uint32_t)EMU_PG_YOUNG;
				emu_lru_accessed(m, pfn);
			}
			if (was && !p->mapcount) {
				const bool writable = has(p, EMU_PG_WRITABLE);

				/* whoever could write it has told by now whether it is dirty (filemap.py) */
				p->flags &= ~EMU_PG_WRITABLE;
				if (writable || !(m->states.how & EMU_STATES_MINOR))
					emu_page_make_volatile(m, pfn, EMU_CAUSE_UNMAP);
			}
		}
	emu_states_end(m);
	return 0;
}

int emu_page_look(struct emu_memmap *m, uint64_t pfn, struct emu_page_info *ret)
{
	const struct emu_page *p;

	if (pfn >= m->t.frames)
		return -ERANGE;
	p = page_of(m, (uint32_t)pfn);
	*ret = (struct emu_page_info){ .space = p->space, .index = p->index, .mapcount = p->mapcount,
		                       .flags = p->flags, .gen = p->gen, .pins = p->pins, .owner = m->t.owner[pfn] };
	return 0;
}
