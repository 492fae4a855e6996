/* SPDX-License-Identifier: MIT */
/*
 * memmap.h - what memmap.c, pagecache.c and lru.c share: a guest's page descriptors.  Not for callers: those include
 * emu.h.
 *
 * Data structures of the guest's kernel, in C for their number and their speed only.  They never touch guest memory and take
 * no lock: whoever calls holds the guest's kernel lock (emu/guest/lock.py).  What they say to the host of a page goes
 * through page_states.c alone.
 */
#ifndef EMU_MEMMAP_H
#define EMU_MEMMAP_H

#include <stdbool.h>

#include "core.h"

/* What the owner byte can't tell; the lower bits of flags are emu.h's EMU_PG_*. */
#define PG_LRU (1u << 12)        /* on the list that PG_ACTIVE, PG_SWAPBACKED and PG_UNEVICTABLE say */
#define PG_SWAPBACKED (1u << 13) /* anonymous */
#define PG_UNEVICTABLE (1u << 14)
/* what page_states.c asks about, beside these and emu.h's */
#define PG_RESERVED (1u << 15)
#define PG_NOT_UPTODATE (1u << 16)
#define PG_PRIVATE (1u << 17)   /* buffer heads */

struct emu_page {
	uint32_t next, prev; /* on its list; a list's head is page frames + list */
	uint32_t space;      /* whose page it is, of the page cache; NO_SPACE */
	uint32_t index;      /* and which of its pages */
	uint32_t mapcount;
	uint32_t flags;
	uint16_t gen;  /* when it was last accessed, in generations (lru.c) */
	uint16_t pins; /* references that are neither the cache's nor a page table's */
};
#define NO_SPACE 0 /* ids start at 1: lazily populated descriptors are zeros */

/* A slot of a space: 0, a page's frame + 1, or, from 2^31 on, the shadow of a page that was evicted (lru.c). */
#define SHADOW (1u << 31)
#define SHADOW_WORKINGSET (1u << 30)
#define SHADOW_AGE (SHADOW_WORKINGSET - 1)

struct emu_page_table { /* emu_memmap's private part */
	uint64_t frames;
	struct emu_page *page; /* lazily populated, as is all of this mapping */
	uint8_t *owner;        /* enum emu_owner, a byte a frame: what emu_states_tally() reads */
	uint16_t *block;       /* frames of a 2 MiB block that are somebody's */
	size_t len;
	struct emu_space **space; /* by id; NULL: to be used again */
	uint32_t nr_spaces;
	uint32_t *free_id; /* a stack of those */
	uint32_t nr_free_ids;
};

struct emu_page_states { /* page_states.c */
	struct emu_region *region; /* NULL: the guest says nothing */
	unsigned how;              /* EMU_STATES_* */
	bool open;                 /* between begin and end */
	uint32_t said;             /* causes that have something in their tally */
	struct emu_usage_tally tally[EMU_NR_CAUSES];
};

struct emu_memmap {
	struct emu_memmap_stats stats;
	struct emu_page_states states;
	struct emu_page_table t;
};

static inline struct emu_page *page_of(struct emu_memmap *m, uint32_t pfn)
{
	return &m->t.page[pfn];
}
/* An access, for who goes by age. */
static inline void stamp(const struct emu_memmap *m, struct emu_page *p)
{
	p->gen = m->stats.gen;
	p->flags &= ~(uint32_t)EMU_PG_HANDED;
}
static inline bool has(const struct emu_page *p, unsigned flag)
{
	return p->flags & flag;
}

/* memmap.c */
void emu_page_own(struct emu_memmap *m, uint32_t pfn, uint8_t owner);
void emu_page_classify(struct emu_memmap *m, uint32_t pfn); /* a page of the cache: by its flags */
bool emu_memmap_ranges_ok(const struct emu_memmap *m, const struct emu_range *ranges, size_t n);

/* pagecache.c */
void emu_space_drop(struct emu_memmap *m, uint32_t pfn, uint32_t slot); /* off its list, out of its space */

/* page_states.c: between begin and end */
bool emu_states_begin(struct emu_memmap *m);
void emu_states_end(struct emu_memmap *m);
void emu_page_make_volatile(struct emu_memmap *m, uint32_t pfn, int cause);
bool emu_page_make_stable(struct emu_memmap *m, uint32_t pfn, int cause);
void emu_pages_make_volatile(struct emu_memmap *m, uint32_t pfn, uint64_t n, int cause);
bool emu_pages_make_stable8(struct emu_memmap *m, uint32_t pfn, int cause);
void emu_pages_freed(struct emu_memmap *m, uint32_t pfn, uint64_t n);

/* lru.c */
void emu_lru_add(struct emu_memmap *m, uint32_t pfn);
void emu_lru_del(struct emu_memmap *m, uint32_t pfn);
void emu_lru_unevictable(struct emu_memmap *m, uint32_t pfn); /* mlocked: reclaim doesn't see it */
void emu_lru_putback(struct emu_memmap *m, uint32_t pfn);     /* if it was: reclaim sees it again */
void emu_lru_rotate(struct emu_memmap *m, uint32_t pfn); /* to the inactive tail: written, and wanted by reclaim */
void emu_lru_accessed(struct emu_memmap *m, uint32_t pfn);
void emu_lru_refault(struct emu_memmap *m, uint32_t pfn, uint32_t shadow);
uint32_t emu_lru_shadow(struct emu_memmap *m, uint32_t pfn);

#endif
