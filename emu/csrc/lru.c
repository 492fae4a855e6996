/* SPDX-License-Identifier: MIT */
/*
 * lru.c - which pages to give up first: active and inactive lists, refaults, and age (mm/swap.c, vmscan.c, workingset.c).
 *
 * Two lists.  A new page of a file goes to the head of the inactive list.  Its first access sets Referenced, its second
 * one makes it active: so a file that is read once, however large, can't push out what is used again and again.  Reclaim
 * takes from the inactive tail; when the inactive list gets short, the active tail sinks into it.
 *
 * Refaults.  A page that is used again too late for the inactive list, but would have made it had the list been as long as
 * the active one, shouldn't start over at every eviction.  Each eviction and each activation moves a counter on; a page
 * that is evicted leaves the counter's value in its slot, as a shadow.  When the page comes back, the counter's progress
 * since is how many pages longer the inactive list would have had to be: no more than the active list holds, and the page
 * competes with those, and becomes active at once.  (Without swap: with it, the anonymous lists count, too.)
 *
 * Age.  Lists have an order, and no times.  For those who want to free what nobody has used for a minute, an access stamps
 * the page with the generation of now, a number that somebody (guest/aging.py) moves on; MGLRU's lists of generations, but
 * on the page.  So aging costs a walk of the lists, 5 to 20 ns a page, and an access a store.
 *
 * Deviations: no per-CPU batches before the lists (folio_batch); one accessed bit a page, not one a PTE; a huge page is on
 * the lists as 512 pages; the counter isn't per memory cgroup or node.
 */
#include "memmap.h"

#include <errno.h>

static uint32_t list_of(const struct emu_page *p)
{
	if (has(p, PG_UNEVICTABLE))
		return EMU_LRU_UNEVICTABLE;
	return (has(p, PG_SWAPBACKED) ? EMU_LRU_INACTIVE_ANON : EMU_LRU_INACTIVE_FILE) + has(p, EMU_PG_ACTIVE);
}

static uint32_t head_of(const struct emu_memmap *m, uint32_t list)
{
	return (uint32_t)m->t.frames + list;
}

static void link_after(struct emu_memmap *m, uint32_t pfn, uint32_t before)
{
	struct emu_page *page = m->t.page;
	uint32_t after = page[before].next;

	page[pfn].prev = before;
	page[pfn].next = after;
	page[before].next = page[after].prev = pfn;
}

static void add(struct emu_memmap *m, uint32_t pfn, bool tail)
{
	struct emu_page *p = page_of(m, pfn);
	uint32_t list = list_of(p), head = head_of(m, list);

	link_after(m, pfn, tail ? m->t.page[head].prev : head);
	p->flags |= PG_LRU;
	m->stats.nr_lru[list]++;
}

void emu_lru_add(struct emu_memmap *m, uint32_t pfn)
{
	add(m, pfn, false);
}

void emu_lru_del(struct emu_memmap *m, uint32_t pfn)
{
	struct emu_page *p = page_of(m, pfn);

	m->t.page[p->prev].next = p->next;
	m->t.page[p->next].prev = p->prev;
	m->stats.nr_lru[list_of(p)]--;
	p->flags &= ~(uint32_t)PG_LRU;
}

/* To the head of the list that it belongs to with these flags (or the tail). */
static void move(struct emu_memmap *m, uint32_t pfn, unsigned set, unsigned clear, bool tail)
{
	struct emu_page *p = page_of(m, pfn);

	emu_lru_del(m, pfn);
	p->flags = (p->flags | set) & ~clear;
	add(m, pfn, tail);
	if (p->space != NO_SPACE)
		emu_page_classify(m, pfn);
}

void emu_lru_rotate(struct emu_memmap *m, uint32_t pfn)
{
	m->stats.pgrotated++;
	move(m, pfn, 0, EMU_PG_ACTIVE, true);
}

void emu_lru_unevictable(struct emu_memmap *m, uint32_t pfn)
{
	if (!has(page_of(m, pfn), PG_UNEVICTABLE))
		move(m, pfn, PG_UNEVICTABLE, EMU_PG_ACTIVE, false);
}

void emu_lru_putback(struct emu_memmap *m, uint32_t pfn)
{
	const struct emu_page *p = page_of(m, pfn);

	if (has(p, PG_UNEVICTABLE) && p->space != NO_SPACE)
		move(m, pfn, 0, PG_UNEVICTABLE, false);
}

/* mark_page_accessed(): inactive -> inactive, referenced -> active -> active, referenced */
void emu_lru_accessed(struct emu_memmap *m, uint32_t pfn)
{
	struct emu_page *p = page_of(m, pfn);

	stamp(m, p);
	if (!has(p, EMU_PG_REFERENCED)) {
		p->flags |= EMU_PG_REFERENCED;
	} else if (!has(p, EMU_PG_ACTIVE) && has(p, PG_LRU) && !has(p, PG_UNEVICTABLE)) {
		move(m, pfn, EMU_PG_ACTIVE, EMU_PG_REFERENCED, false);
		m->stats.pgactivate++;
		m->stats.nonresident_age++; /* workingset_activation() */
	}
}

/* workingset_refault(): of a page that comes in where a shadow is */
void emu_lru_refault(struct emu_memmap *m, uint32_t pfn, uint32_t shadow)
{
	struct emu_page *p = page_of(m, pfn);
	uint32_t distance = ((uint32_t)m->stats.nonresident_age - shadow) & SHADOW_AGE;

	m->stats.workingset_refault++;
	if (distance > (uint64_t)m->stats.nr_lru[EMU_LRU_ACTIVE_FILE])
		return;
	p->flags |= EMU_PG_ACTIVE;
	m->stats.nonresident_age++;
	m->stats.workingset_activate++;
	if (shadow & SHADOW_WORKINGSET) {
		p->flags |= EMU_PG_WORKINGSET;
		m->stats.workingset_restore++;
	}
}

/* workingset_eviction(): what a page leaves behind */
uint32_t emu_lru_shadow(struct emu_memmap *m, uint32_t pfn)
{
	uint32_t age = (uint32_t)m->stats.nonresident_age & SHADOW_AGE;

	m->stats.nonresident_age++;
	return SHADOW | age | (has(page_of(m, pfn), EMU_PG_WORKINGSET) ? SHADOW_WORKINGSET : 0);
}

/* shrink_active_list(): the tail sinks, whether referenced or not (only mapped code would stay) */
static void shrink_active(struct emu_memmap *m, struct emu_shrink *ret)
{
	const uint32_t head = head_of(m, EMU_LRU_ACTIVE_FILE);

	emu_states_begin(m);
	while (ret->nr_scanned < ret->nr_to_scan && m->t.page[head].prev != head) {
		uint32_t pfn = m->t.page[head].prev;

		ret->nr_scanned++;
		ret->nr_deactivated++;
		move(m, pfn, EMU_PG_WORKINGSET, EMU_PG_ACTIVE | EMU_PG_YOUNG, false);
		emu_page_make_volatile(m, pfn, EMU_CAUSE_SINK);
	}
	emu_states_end(m);
	m->stats.pgrefill += (int64_t)ret->nr_scanned;
	m->stats.pgdeactivate += (int64_t)ret->nr_deactivated;
}

static void activate(struct emu_memmap *m, uint32_t pfn, unsigned set, struct emu_shrink *ret)
{
	move(m, pfn, EMU_PG_ACTIVE | set, 0, false);
	m->stats.pgactivate++;
	m->stats.nonresident_age++; /* move_folios_to_lru() */
	ret->nr_activated++;
}

static void keep(struct emu_memmap *m, uint32_t pfn, unsigned set, struct emu_shrink *ret)
{
	move(m, pfn, set, 0, false);
	ret->nr_kept++;
}

/* shrink_folio_list() for one page, which is at the inactive tail */
static void shrink_page(struct emu_memmap *m, uint32_t pfn, struct emu_shrink *ret)
{
	struct emu_page *p = page_of(m, pfn);
	bool young = has(p, EMU_PG_YOUNG), referenced = has(p, EMU_PG_REFERENCED);

	if (has(p, EMU_PG_LOCKED) || p->pins) {
		keep(m, pfn, 0, ret);
		return;
	}
	if (has(p, EMU_PG_WRITEBACK)) {
		ret->nr_writeback++;
		activate(m, pfn, EMU_PG_RECLAIM, ret);
		return;
	}
	/* folio_check_references() */
	p->flags &= ~(uint32_t)(EMU_PG_YOUNG | EMU_PG_REFERENCED);
	if (young) {
		if (referenced)
			activate(m, pfn, EMU_PG_REFERENCED, ret);
		else
			keep(m, pfn, EMU_PG_REFERENCED, ret);
		return;
	}
	if (has(p, EMU_PG_DIRTY)) {
		ret->nr_dirty++;
		activate(m, pfn, EMU_PG_RECLAIM, ret); /* out of the way until the flusher has written it, referenced or not */
		return;
	}
	if (p->mapcount) { /* try_to_unmap() is for whoever knows the page tables */
		keep(m, pfn, 0, ret);
		ret->nr_kept--;
		ret->mapped[ret->nr_mapped++] = pfn;
		return;
	}
	emu_space_drop(m, pfn, emu_lru_shadow(m, pfn));
	ret->freed[ret->nr_freed++] = pfn;
}

int emu_lru_shrink(struct emu_memmap *m, int list, struct emu_shrink *ret)
{
	const uint32_t head = head_of(m, EMU_LRU_INACTIVE_FILE);
	uint64_t left = ret->nr_to_scan;

	ret->nr_scanned = ret->nr_freed = ret->nr_mapped = ret->nr_dirty = ret->nr_writeback = 0;
	ret->nr_activated = ret->nr_kept = ret->nr_deactivated = 0;
	if (list == EMU_LRU_ACTIVE_FILE) {
		shrink_active(m, ret);
		return 0;
	}
	if (list != EMU_LRU_INACTIVE_FILE)
		return -EINVAL;
	/* pages that stay go to the head: without this bound a short list would be walked in circles */
	if (left > (uint64_t)m->stats.nr_lru[EMU_LRU_INACTIVE_FILE])
		left = (uint64_t)m->stats.nr_lru[EMU_LRU_INACTIVE_FILE];
	for (; left; left--) {
		ret->nr_scanned++;
		shrink_page(m, m->t.page[head].prev, ret);
	}
	return 0;
}

int emu_lru_age(struct emu_memmap *m, struct emu_aging *ret)
{
	const unsigned busy = EMU_PG_DIRTY | EMU_PG_WRITEBACK | EMU_PG_LOCKED;
	const uint32_t lists[] = { EMU_LRU_ACTIVE_FILE, EMU_LRU_INACTIVE_FILE };

	ret->nr_scanned = ret->nr_sunk = ret->nr_freed = 0;
	for (int i = 0; i < 2; i++) {
		const uint32_t head = head_of(m, lists[i]);

		for (uint32_t pfn = m->t.page[head].prev, next; pfn != head; pfn = next) {
			struct emu_page *p = page_of(m, pfn);
			uint16_t age = (uint16_t)(m->stats.gen - p->gen);

			next = p->prev;
			ret->nr_scanned++;
			if (lists[i] == EMU_LRU_ACTIVE_FILE) {
				if (age < ret->sink_after)
					continue;
				/* to the inactive head: this walk's second half meets it there */
				move(m, pfn, EMU_PG_WORKINGSET, EMU_PG_ACTIVE | EMU_PG_REFERENCED, false);
				m->stats.pgdeactivate++;
				ret->nr_sunk++;
				continue;
			}
			if (age < ret->free_after || has(p, busy) || p->mapcount || p->pins || (ret->most && ret->nr_freed >= ret->most))
				continue;
			if (ret->hand_over) {
				if (!has(p, EMU_PG_HANDED))
					ret->freed[ret->nr_freed++] = pfn;
				p->flags |= EMU_PG_HANDED;
				continue;
			}
			emu_space_drop(m, pfn, emu_lru_shadow(m, pfn));
			ret->freed[ret->nr_freed++] = pfn;
		}
	}
	return 0;
}

int64_t emu_lru_list(struct emu_memmap *m, int list, uint32_t *pfns, size_t cap)
{
	size_t n = 0;

	if (list < 0 || list >= EMU_NR_LRU)
		return -EINVAL;
	for (uint32_t head = head_of(m, (uint32_t)list), pfn = m->t.page[head].next; pfn != head; pfn = m->t.page[pfn].next) {
		if (n < cap)
			pfns[n] = pfn;
		n++;
	}
	return (int64_t)n;
}
