/* SPDX-License-Identifier: MIT */
/*
 * page_states.c - what the guest's kernel says of its pages to the host (CMM2; mm/page-states.c of the patches of 2009).
 *
 * A page of the cache that the disk has, too, needn't be kept by the host: such a page is called volatile.  Eleven things
 * say that it must be kept, or may be needed at any moment:
 *
 *     reserved             dirty                under writeback       locked
 *     anonymous            without a mapping    not up to date        with private data
 *     discarded already    on no list           with a reference that isn't the cache's or a page table's
 *
 * Made volatile: when one of them ends - it was read from the disk (unlock_page), written (end_page_writeback), a reference
 * was dropped (put_page), its last mapping went - and when it sinks to the inactive list.  Made stable: when a reference is
 * taken to use it (find_get_page, follow_page, copy-on-write).  Then the guest may be told that the page is gone.  It is out of
 * the cache before anybody can use it, and read from the disk again.
 *
 * A page that a process may write through its page table is another matter: it gets dirty without a word.  Where the machine
 * has a dirty bit a page (s390's storage key) it is potentially volatile, and the host looks at the bit.  Where it has one a
 * page-table entry (x86) the host can't see it, so the first writable entry makes the page stable, until the last is gone.
 *
 * Minor faults are where this is dear: stable to map it, volatile again afterwards, twice for each of a process's start.  The
 * authors' way out: map it as it is, and let the discard fault repair what the host has taken meanwhile.  EMU_STATES_MINOR.
 *
 * The light form, which is all that was merged (s390, 2008): stable and unused, said by the allocator.
 *
 * Deviations: what comes into the cache is up to date (inode.c reads before it inserts), and there are no reserved pages; a
 * lock on the whole of the guest's kernel stands for the page's state lock.
 */
#include "core.h"
#include "memmap.h"

/* Around what may say something. The region may have been closed meanwhile: then nothing is said. */
bool emu_states_begin(struct emu_memmap *m)
{
	struct emu_page_states *s = &m->states;

	s->open = s->region && !emu_usage_enter(s->region);
	return s->open;
}

void emu_states_end(struct emu_memmap *m)
{
	struct emu_page_states *s = &m->states;

	if (!s->open)
		return;
	for (int cause = 0; s->said; cause++, s->said >>= 1)
		if (s->said & 1) {
			emu_usage_count(s->region, cause, &s->tally[cause]);
			s->tally[cause] = (struct emu_usage_tally){ 0 };
		}
	emu_region_leave(s->region);
	s->open = false;
}

static enum emu_said say(struct emu_memmap *m, uint32_t pfn, int usage, int cause)
{
	m->states.said |= 1u << cause;
	return emu_usage_say(m->states.region, pfn, usage, &m->states.tally[cause]);
}

/* The same of eight frames at once, if they are alike and their numbers begin a word: for pages that lie in a row. */
static bool say8(struct emu_memmap *m, uint32_t pfn, int usage, int cause)
{
	if (pfn % 8 || !emu_usage_say8(m->states.region, pfn, (uint8_t)usage, &m->states.tally[cause]))
		return false;
	m->states.said |= 1u << cause;
	return true;
}

/* The eleven. The last one: the cache's reference and the page tables' are known, so any other is a pin. */
static bool discardable(const struct emu_memmap *m, const struct emu_page *p)
{
	const unsigned needed = PG_RESERVED | EMU_PG_DIRTY | EMU_PG_WRITEBACK | EMU_PG_LOCKED | PG_SWAPBACKED |
	                        PG_NOT_UPTODATE | PG_PRIVATE | EMU_PG_DISCARDED;

	return !has(p, needed) && p->space != NO_SPACE && has(p, PG_LRU) && !p->pins && !m->t.space[p->space]->mlocked;
}

void emu_page_make_volatile(struct emu_memmap *m, uint32_t pfn, int cause)
{
	const struct emu_page *p = page_of(m, pfn);

	if (!m->states.open || m->states.how & EMU_STATES_LIGHT || !discardable(m, p))
		return;
	if (!has(p, EMU_PG_WRITABLE))
		say(m, pfn, EMU_VOLATILE, cause);
	else if (!(m->states.how & EMU_STATES_PER_MAPPING))
		say(m, pfn, EMU_POTENTIAL, cause);
}

/* False: it is gone, and is nobody's to use. */
bool emu_page_make_stable(struct emu_memmap *m, uint32_t pfn, int cause)
{
	struct emu_page *p = page_of(m, pfn);

	if (!m->states.open || m->states.how & EMU_STATES_LIGHT)
		return true;
	if (say(m, pfn, EMU_STABLE, cause) == EMU_SAID_GONE)
		p->flags |= EMU_PG_DISCARDED;
	return !has(p, EMU_PG_DISCARDED);
}

/*
 * The pages in frames [pfn, pfn + n), of which nobody knows more than of any other: so the next eight may go in one step, if
 * each of them may.  Most reads are of pages in a row, and it costs a tenth of saying it eight times.
 */
void emu_pages_make_volatile(struct emu_memmap *m, uint32_t pfn, uint64_t n, int cause)
{
	const uint32_t end = pfn + (uint32_t)n;

	if (!m->states.open || m->states.how & EMU_STATES_LIGHT)
		return;
	while (pfn < end) {
		unsigned may = pfn % 8 || end - pfn < 8 ? 8 : 0;

		while (may < 8 && discardable(m, page_of(m, pfn + may)) && !has(page_of(m, pfn + may), EMU_PG_WRITABLE))
			may++;
		if (may == 8 && !(pfn % 8) && end - pfn >= 8 && say8(m, pfn, EMU_VOLATILE, cause))
			pfn += 8;
		else
			emu_page_make_volatile(m, pfn++, cause);
	}
}

/* Eight pages in the frames from pfn on, if that is one step: then none of them is gone. */
bool emu_pages_make_stable8(struct emu_memmap *m, uint32_t pfn, int cause)
{
	return m->states.open && !(m->states.how & EMU_STATES_LIGHT) && say8(m, pfn, EMU_STABLE, cause);
}

/* All pages as they are now: free ones are unused, and of the cache those that may be are volatile. */
int emu_page_states_on(struct emu_region *r, struct emu_memmap *m, unsigned how)
{
	/* a page that may be written without a word is the host's to ask about */
	const bool asks = !(how & (EMU_STATES_LIGHT | EMU_STATES_PER_MAPPING));
	int err = how & ~EMU_STATES_ALL || m->t.frames != r->frames ? -EINVAL : asks && !atomic_load(&r->access) ? -EOPNOTSUPP : emu_usage_track(r);

	if (err)
		return err;
	m->states.region = r;
	m->states.how = how;
	if (!emu_states_begin(m))
		return -ESHUTDOWN;
	for (uint32_t pfn = 0; pfn < m->t.frames; pfn++)
		if (m->t.owner[pfn] == EMU_OWNER_FREE)
			say(m, pfn, EMU_UNUSED, EMU_CAUSE_OTHER);
		else
			emu_page_make_volatile(m, pfn, EMU_CAUSE_OTHER);
	emu_states_end(m);
	return 0;
}

/*
 * All is stable again, but pages of the cache that the host has taken: up to `cap` of those are in `gone` (returned is how many
 * there are), for the caller to drop, and to ask again.  Until they are out of the cache an access to them is a discard fault:
 * whatever interrupts the caller, nobody reads zeros.  When there is none left, nothing is said from now on.
 */
int64_t emu_page_states_off(struct emu_memmap *m, uint32_t *gone, size_t cap)
{
	int64_t found = 0;

	if (emu_states_begin(m))
		for (uint32_t pfn = 0; pfn < m->t.frames; pfn++) {
			if (say(m, pfn, EMU_STABLE, EMU_CAUSE_OTHER) != EMU_SAID_GONE)
				continue;
			if (page_of(m, pfn)->space != NO_SPACE) {
				page_of(m, pfn)->flags |= EMU_PG_DISCARDED;
				if ((size_t)found < cap)
					gone[found] = pfn;
				found++;
			} else if (m->t.owner[pfn] == EMU_OWNER_FREE) {
				say(m, pfn, EMU_UNUSED, EMU_CAUSE_OTHER);
				say(m, pfn, EMU_STABLE, EMU_CAUSE_OTHER);
			} /* else a guest that lied: the fault is its own, as long as it has the frame */
		}
	emu_states_end(m);
	if (!found && m->states.region) {
		atomic_store(&m->states.region->telling, false);
		m->states.region = NULL;
	}
	return found;
}

/* Frames just allocated are needed, before anybody writes them. */
int emu_pages_allocated(struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	if (!emu_states_begin(m))
		return 0;
	for (size_t i = 0; i < n; i++)
		for (uint32_t pfn = (uint32_t)ranges[i].gfn, end = pfn + (uint32_t)ranges[i].count; pfn < end;) {
			if (end - pfn >= 8 && say8(m, pfn, EMU_STABLE, EMU_CAUSE_ALLOC)) {
				pfn += 8;
				continue;
			}
			if (say(m, pfn, EMU_STABLE, EMU_CAUSE_ALLOC) == EMU_SAID_GONE) { /* freed while nothing was said */
				say(m, pfn, EMU_UNUSED, EMU_CAUSE_DISCARDED);
				say(m, pfn, EMU_STABLE, EMU_CAUSE_ALLOC);
			}
			pfn++;
		}
	emu_states_end(m);
	return 0;
}

void emu_pages_freed(struct emu_memmap *m, uint32_t pfn, uint64_t n)
{
	if (!m->states.open)
		return;
	for (const uint32_t end = pfn + (uint32_t)n; pfn < end;) {
		if (end - pfn >= 8 && say8(m, pfn, EMU_UNUSED, EMU_CAUSE_FREE)) {
			pfn += 8;
			continue;
		}
		/* of one that the host has taken, a discard fault has told */
		say(m, pfn, EMU_UNUSED,
		    emu_state_load(m->states.region, pfn) == EMU_DISCARDED ? EMU_CAUSE_DISCARDED : EMU_CAUSE_FREE);
		pfn++;
	}
}

/* References that emu_space_lookup() took (EMU_LOOKUP_GET), or that pin pages, are dropped. */
int emu_pages_put(struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++)
			if (!page_of(m, (uint32_t)(ranges[i].gfn + k))->pins)
				return -EINVAL;
	emu_states_begin(m);
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			const uint32_t pfn = (uint32_t)(ranges[i].gfn + k);

			if (!--page_of(m, pfn)->pins)
				emu_lru_putback(m, pfn);
		}
	for (size_t i = 0; i < n; i++) /* those that somebody else holds aren't discardable */
		emu_pages_make_volatile(m, (uint32_t)ranges[i].gfn, ranges[i].count, EMU_CAUSE_PUT);
	emu_states_end(m);
	return 0;
}

/*
 * mlock(2): one more reference to pages that are held, until emu_pages_put(); they leave the lists of what reclaim may take.
 * Their file is marked for good: none of its pages is called volatile any more.
 */
int emu_pages_mlock(struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			const struct emu_page *p = page_of(m, (uint32_t)(ranges[i].gfn + k));

			if (!p->pins || p->space == NO_SPACE)
				return -EINVAL;
			if (p->pins == UINT16_MAX)
				return -EOVERFLOW;
		}
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++) {
			struct emu_page *p = page_of(m, (uint32_t)(ranges[i].gfn + k));

			p->pins++;
			m->t.space[p->space]->mlocked = true;
			emu_lru_unevictable(m, (uint32_t)(ranges[i].gfn + k));
		}
	return 0;
}

/* A process may write these pages from now on (page_mkwrite): until it has unmapped them, as others have. */
int emu_pages_writable(struct emu_memmap *m, const struct emu_range *ranges, size_t n)
{
	if (!emu_memmap_ranges_ok(m, ranges, n))
		return -ERANGE;
	for (size_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < ranges[i].count; k++)
			page_of(m, (uint32_t)(ranges[i].gfn + k))->flags |= EMU_PG_WRITABLE;
	return 0;
}
