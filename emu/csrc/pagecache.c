/* SPDX-License-Identifier: MIT */
/*
 * pagecache.c - which frame is which page of which file (struct address_space, mm/filemap.c).
 *
 * A space is one array of 32-bit slots, indexed by page: a frame's number + 1, a shadow that an evicted page left behind,
 * or nothing.  Linux has an xarray there, for files of any shape; an array is smaller and faster for files that are read,
 * and a large one lies in lazily populated memory, so that a sparse terabyte costs what was touched of it.
 *
 * A page is in the cache if and only if its slot names its frame and the frame's descriptor names space and index; every
 * function here keeps both sides.  Nothing here allocates or frees a frame: frames come in as ranges and go out as numbers.
 */
#define _GNU_SOURCE
#include "memmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define BIG (64u << 10) /* bytes of slots from which on they get a mapping of their own */

static void slots_free(struct emu_space *s)
{
	if (s->len)
		munmap(s->slot, s->len);
	else
		free(s->slot);
}

/* Room for `pages` slots, the first ones as they are. Room is never given back: a file that grows again is common. */
static int slots_resize(struct emu_space *s, uint64_t pages)
{
	size_t bytes = pages * sizeof(*s->slot), old = s->nr_slots * sizeof(*s->slot);
	void *slot;

	if (bytes <= old)
		return 0;
	if (s->len >= bytes) { /* a file that was cut: its mapping is as long as it was, and what was cut off is zeros */
		s->nr_slots = pages;
		return 0;
	}
	if (bytes < BIG) {
		slot = realloc(s->slot, bytes);
		if (!slot)
			return -ENOMEM;
		memset((uint8_t *)slot + old, 0, bytes - old);
	} else {
		size_t len = (bytes * 2 + 4095) & ~(size_t)4095; /* doubled, since a log grows by a page at a time */

		if (s->len) {
			slot = mremap(s->slot, s->len, len, MREMAP_MAYMOVE);
			if (slot == MAP_FAILED)
				return -ENOMEM;
		} else {
			slot = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
			if (slot == MAP_FAILED)
				return -ENOMEM;
			if (old)
				memcpy(slot, s->slot, old);
			free(s->slot);
		}
		s->len = len;
	}
	s->slot = slot;
	s->nr_slots = pages;
	return 0;
}

/* Zero the slots from `first` on. Of a mapping, whole pages are given back instead: a sparse one would come into being. */
static void zero(struct emu_space *s, uint64_t first)
{
	uintptr_t from = (uintptr_t)(s->slot + first), end = (uintptr_t)(s->slot + s->nr_slots);
	uintptr_t page = (from + 4095) & ~(uintptr_t)4095;

	if (!s->len || page >= end) {
		memset(s->slot + first, 0, end - from);
		return;
	}
	memset(s->slot + first, 0, page - from);
	if (madvise((void *)page, (end - page + 4095) & ~(uintptr_t)4095, MADV_DONTNEED))
		memset((void *)page, 0, end - page);
}

/* No page is at or after `first`: forget the shadows there. */
static void forget(struct emu_space *s, uint64_t first)
{
	for (uint64_t i = first; i < s->nr_slots && s->nr_shadows; i++)
		s->nr_shadows -= s->slot[i] != 0;
	zero(s, first);
}

int emu_space_create(struct emu_memmap *m, uint64_t pages, struct emu_space **ret)
{
	struct emu_space *s = calloc(1, sizeof(*s));
	int err;

	*ret = NULL;
	if (!s)
		return -ENOMEM;
	err = pages < UINT32_MAX ? slots_resize(s, pages) : -EFBIG;
	if (!err && m->t.nr_free_ids) {
		s->id = m->t.free_id[--m->t.nr_free_ids];
	} else if (!err) {
		size_t n = m->t.nr_spaces + 1;
		struct emu_space **space = realloc(m->t.space, n * sizeof(*space));
		uint32_t *ids = realloc(m->t.free_id, n * sizeof(*ids));

		if (space)
			m->t.space = space;
		if (ids)
			m->t.free_id = ids;
		if (space && ids)
			s->id = m->t.nr_spaces++;
		else
			err = -ENOMEM;
	}
	if (err) {
		slots_free(s);
		free(s);
		return err;
	}
	m->t.space[s->id] = s;
	*ret = s;
	return 0;
}

int emu_space_resize(struct emu_memmap *m, struct emu_space *s, uint64_t pages)
{
	(void)m;
	if (pages >= UINT32_MAX)
		return -EFBIG;
	if (pages < s->nr_slots) {
		for (uint64_t i = pages; i < s->nr_slots && s->nr_pages; i++)
			if (s->slot[i] && s->slot[i] < SHADOW)
				return -EBUSY;
		forget(s, pages); /* shadows of what is no longer there */
		if (s->len)
			s->nr_slots = pages;
		return 0;
	}
	return slots_resize(s, pages);
}

int emu_space_destroy(struct emu_memmap *m, struct emu_space *s)
{
	if (s->nr_pages)
		return -EBUSY;
	m->t.space[s->id] = NULL;
	m->t.free_id[m->t.nr_free_ids++] = s->id;
	slots_free(s);
	free(s);
	return 0;
}

/* The frame of a page, or -1. */
static int64_t frame_at(const struct emu_space *s, uint64_t index)
{
	uint32_t slot = index < s->nr_slots ? s->slot[index] : 0;

	return slot && slot < SHADOW ? (int64_t)slot - 1 : -1;
}

static bool joins(const struct emu_range *runs, size_t n, uint32_t pfn, uint64_t index)
{
	return n && runs[n - 1].gfn + runs[n - 1].count == pfn && runs[n - 1].key + runs[n - 1].count == index;
}

/* Append to runs, joined where it can be; false: there is no room. */
static bool append(struct emu_range *runs, size_t cap, size_t *n, uint32_t pfn, uint64_t index)
{
	if (joins(runs, *n, pfn, index)) {
		runs[*n - 1].count++;
		return true;
	}
	if (*n == cap)
		return false;
	runs[(*n)++] = (struct emu_range){ .gfn = pfn, .count = 1, .key = index };
	return true;
}

/* Whether eight pages from `index` on lie in the frames from pfn on. */
static bool in_a_row(const struct emu_space *s, uint64_t index, uint64_t count, uint32_t pfn)
{
	if (pfn % 8 || count < 8 || s->nr_slots - index < 8)
		return false;
	for (uint32_t i = 1; i < 8; i++)
		if (s->slot[index + i] != pfn + 1 + i)
			return false;
	return true;
}

int64_t emu_space_lookup(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t count, unsigned how,
                         struct emu_range *runs, size_t cap, size_t *nr_runs)
{
	const unsigned why = how >> EMU_LOOKUP_WHY;
	const int cause = why ? (int)why : EMU_CAUSE_LOOKUP;
	int64_t pfn, flags = 0;
	uint64_t k = 0, stable = 0; /* pages that are held, and that are stable */

	*nr_runs = 0;
	if (cause >= EMU_NR_CAUSES)
		return -EINVAL;
	if (how & EMU_LOOKUP_BACKWARD) {
		while (k < count && k <= first && frame_at(s, first - k) >= 0)
			k++;
		return (int64_t)k;
	}
	if (how & EMU_LOOKUP_ABSENT) {
		while (k < count && frame_at(s, first + k) < 0)
			k++;
		return (int64_t)k;
	}
	if (how & EMU_LOOKUP_GET)
		emu_states_begin(m);
	for (; k < count && (pfn = frame_at(s, first + k)) >= 0; k++) {
		if (runs && *nr_runs == cap && !joins(runs, *nr_runs, (uint32_t)pfn, first + k))
			break;
		if (how & EMU_LOOKUP_GET && page_of(m, (uint32_t)pfn)->pins == UINT16_MAX) {
			flags = k ? 0 : -EOVERFLOW; /* try_get_page() */
			break;
		}
		if (how & EMU_LOOKUP_GET) {
			if (k == stable && in_a_row(s, first + k, count - k, (uint32_t)pfn) &&
			    emu_pages_make_stable8(m, (uint32_t)pfn, cause))
				stable += 8;
			if ((k == stable && !emu_page_make_stable(m, (uint32_t)pfn, cause)) ||
			    has(page_of(m, (uint32_t)pfn), EMU_PG_DISCARDED)) {
				flags |= EMU_LOOKUP_GONE;
				break;
			}
			stable += k == stable;
			page_of(m, (uint32_t)pfn)->pins++;
		}
		if (runs)
			append(runs, cap, nr_runs, (uint32_t)pfn, first + k);
		if (how & EMU_LOOKUP_SKIP_FIRST && !k)
			stamp(m, page_of(m, (uint32_t)pfn)); /* used, if not once more */
		else if (how & EMU_LOOKUP_MARK)
			emu_lru_accessed(m, (uint32_t)pfn);
		if (how & EMU_LOOKUP_READAHEAD && has(page_of(m, (uint32_t)pfn), EMU_PG_READAHEAD)) {
			flags |= EMU_LOOKUP_MARKER;
			k++;
			break;
		}
	}
	if (stable > k) /* one step too many */
		emu_pages_make_volatile(m, (uint32_t)frame_at(s, first + k), stable - k, EMU_CAUSE_PUT);
	emu_states_end(m);
	if (how & EMU_LOOKUP_MARK)
		m->stats.pgaccess += (int64_t)k;
	return flags < 0 ? flags : (int64_t)k | flags;
}

int emu_space_insert(struct emu_memmap *m, struct emu_space *s, const struct emu_range *ranges, size_t n, unsigned how)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	for (size_t i = 0; i < n; i++) {
		if (ranges[i].key > s->nr_slots || ranges[i].count > s->nr_slots - ranges[i].key)
			return -ERANGE;
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			if (frame_at(s, ranges[i].key + k) >= 0)
				return -EEXIST;
			if (m->t.owner[ranges[i].gfn + k] != EMU_OWNER_FREE)
				return -EBUSY;
		}
	}
	emu_states_begin(m);
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			uint32_t pfn = (uint32_t)(ranges[i].gfn + k), index = (uint32_t)(ranges[i].key + k);
			struct emu_page *p = page_of(m, pfn);
			uint32_t shadow = s->slot[index];

			*p = (struct emu_page){ .space = s->id, .index = index, .gen = m->stats.gen };
			s->slot[index] = pfn + 1;
			s->nr_pages++;
			s->nr_shadows -= shadow != 0;
			if (how & EMU_INSERT_DIRTY) {
				p->flags |= EMU_PG_DIRTY;
				s->nr_dirty++;
			}
			/* a page that is rewritten tells nothing of a working set (filemap_add_folio) */
			if (shadow && !(how & EMU_INSERT_WRITE))
				emu_lru_refault(m, pfn, shadow);
			if (how & EMU_INSERT_DIRTY && m->states.how & EMU_STATES_BUFFERS)
				p->flags |= PG_PRIVATE;
			emu_lru_add(m, pfn);
			emu_page_classify(m, pfn);
		}
	for (size_t i = 0; i < n; i++)
		emu_pages_make_volatile(m, (uint32_t)ranges[i].gfn, ranges[i].count, EMU_CAUSE_READ);
	emu_states_end(m);
	return 0;
}

void emu_space_drop(struct emu_memmap *m, uint32_t pfn, uint32_t slot)
{
	struct emu_page *p = page_of(m, pfn);
	struct emu_space *s = m->t.space[p->space];

	emu_lru_del(m, pfn);
	s->slot[p->index] = slot;
	s->nr_pages--;
	s->nr_shadows += slot != 0;
	s->nr_dirty -= has(p, EMU_PG_DIRTY);
	s->nr_writeback -= has(p, EMU_PG_WRITEBACK);
	p->flags = 0;
	p->space = NO_SPACE;
	emu_page_own(m, pfn, EMU_OWNER_FREE);
}

int64_t emu_space_remove(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, int how,
                         uint32_t *pfns, size_t cap)
{
	const unsigned busy = EMU_PG_DIRTY | EMU_PG_WRITEBACK | EMU_PG_LOCKED;
	int64_t taken = 0, pfn;

	if (how < EMU_REMOVE_TRUNCATE || how > EMU_REMOVE_EVICT)
		return -EINVAL;
	if (end > s->nr_slots)
		end = s->nr_slots;
	for (uint64_t i = first; i < end && (s->nr_pages || (how == EMU_REMOVE_INVALIDATE && s->nr_shadows)); i++) {
		struct emu_page *p;

		if ((size_t)taken == cap)
			break;
		pfn = frame_at(s, i);
		if (pfn < 0) {
			if (how == EMU_REMOVE_INVALIDATE && s->slot[i]) { /* invalidate_exceptional_entry() */
				s->slot[i] = 0;
				s->nr_shadows--;
			}
			continue;
		}
		p = page_of(m, (uint32_t)pfn);
		if (how == EMU_REMOVE_TRUNCATE) {
			if (p->mapcount)
				return taken ? taken : -EBUSY;
		} else if (has(p, busy) || p->mapcount || p->pins || (how == EMU_REMOVE_EVICT && has(p, EMU_PG_REFERENCED | EMU_PG_YOUNG))) {
			continue;
		}
		emu_space_drop(m, (uint32_t)pfn, how == EMU_REMOVE_EVICT ? emu_lru_shadow(m, (uint32_t)pfn) : 0);
		pfns[taken++] = (uint32_t)pfn;
	}
	return taken;
}

int64_t emu_space_flag(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned set,
                       unsigned clear)
{
	const unsigned may = EMU_PG_REFERENCED | EMU_PG_DIRTY | EMU_PG_WRITEBACK | EMU_PG_LOCKED | EMU_PG_READAHEAD;
	int64_t changed = 0, pfn;

	if ((set | clear) & ~may || set & clear)
		return -EINVAL;
	if (end > s->nr_slots)
		end = s->nr_slots;
	emu_states_begin(m);
	for (uint64_t i = first; i < end; i++) {
		struct emu_page *p;
		uint32_t before;

		pfn = frame_at(s, i);
		if (pfn < 0)
			continue;
		p = page_of(m, (uint32_t)pfn);
		before = p->flags;
		p->flags = (before | set) & ~clear;
		if (set & EMU_PG_DIRTY)
			stamp(m, p); /* written: nothing to the lists, as in Linux, but an access to who goes by age */
		if (p->flags == before)
			continue;
		changed++;
		s->nr_dirty += has(p, EMU_PG_DIRTY) - !!(before & EMU_PG_DIRTY);
		s->nr_writeback += has(p, EMU_PG_WRITEBACK) - !!(before & EMU_PG_WRITEBACK);
		/* folio_end_writeback(): reclaim wanted it, and can have it now */
		if (before & EMU_PG_WRITEBACK && !has(p, EMU_PG_WRITEBACK | EMU_PG_DIRTY) && has(p, EMU_PG_RECLAIM)) {
			p->flags &= ~(uint32_t)EMU_PG_RECLAIM;
			emu_lru_rotate(m, (uint32_t)pfn);
		}
		if (set & EMU_PG_DIRTY) {
			emu_page_make_stable(m, (uint32_t)pfn, EMU_CAUSE_MKWRITE); /* it was, but for a caller's mistake */
			if (m->states.how & EMU_STATES_BUFFERS)
				p->flags |= PG_PRIVATE;
		}
		emu_page_classify(m, (uint32_t)pfn);
		if (before & clear & (EMU_PG_WRITEBACK | EMU_PG_LOCKED))
			emu_page_make_volatile(m, (uint32_t)pfn, EMU_CAUSE_WRITEBACK);
	}
	emu_states_end(m);
	return changed;
}

int64_t emu_space_find(struct emu_memmap *m, struct emu_space *s, uint64_t first, uint64_t end, unsigned mask,
                       unsigned value, struct emu_range *runs, size_t cap, size_t *nr_runs)
{
	int64_t found = 0, pfn;

	*nr_runs = 0;
	if (end > s->nr_slots)
		end = s->nr_slots;
	for (uint64_t i = first; i < end && s->nr_pages; i++) {
		pfn = frame_at(s, i);
		if (pfn >= 0 && (page_of(m, (uint32_t)pfn)->flags & mask) == value) {
			if (!append(runs, cap, nr_runs, (uint32_t)pfn, i))
				break;
			found++;
		} else if (found) {
			break;
		}
	}
	return found;
}
