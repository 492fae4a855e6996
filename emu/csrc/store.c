/* SPDX-License-Identifier: MIT */
/*
 * store.c - where the content of swapped-out pages is: a pool in memory, and a file.
 *
 * The pool holds objects of 64 to 4096 bytes in slabs of 64 KiB, each slab for one size (as zsmalloc's size classes, in
 * steps of 64).  An object's place is reused as soon as it is free, a slab that has become empty goes back to the kernel,
 * and nothing ever moves: whoever owns a slot reads its bytes without a lock.
 *
 * The file takes extents: up to 64 blocks of 4 KiB in a row, written at once, with many objects in them.  An extent is free
 * when its last object is.  Its descriptor is the caller's: unlinked or O_TMPFILE, so that nothing is left of it whoever is
 * killed; with O_DIRECT where the file system has it (buffers and offsets here are aligned to 4096).
 *
 * A checksum stands over each object's stored bytes and over whose they are (the frame, and how often the store had
 * counted up by then): what a disk has mixed up, or an older page at the same place, doesn't pass.
 *
 * The lock is held for lists and the search for blocks (the longer, the fuller the file), by nobody who touches guest memory; so the SIGBUS handler, which frees
 * slots, never interrupts its holder by a guest's fault.  It is a futex (U. Drepper, "Futexes are tricky", mutex 2).
 */
#define _GNU_SOURCE
#include "store.h"

#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLAB 65536
#define SLAB_FRAMES (SLAB / EMU_FRAME_SIZE)
#define STEP 64
#define CLASSES (EMU_FRAME_SIZE / STEP)
#define NONE UINT32_MAX

struct slab {
	uint32_t next, prev; /* of its class's slabs with room; or of the free ones */
	uint16_t used, fresh; /* objects; fresh: those from here on were never used */
	uint16_t free;       /* a list through the free objects: number + 1 */
	uint8_t class;
};

struct emu_store {
	struct emu_region *r;
	_Atomic uint32_t lock;

	uint8_t *pool;
	uint64_t pool_len;
	struct slab *slab;
	uint32_t nr_slabs, fresh_slabs, free_slab; /* free_slab: a list */
	uint32_t partial[CLASSES];
	int64_t slabs_used;

	int fd;
	uint64_t blocks, free_blocks, cursor;
	struct emu_table file_table;
	uint8_t *taken;  /* a byte a block */
	uint8_t *extent; /* at an extent's first block: its blocks */
	uint8_t *live;   /* there, too: its objects */

	_Atomic int64_t pages, same, raw, object_bytes;
	_Atomic int error;
};

static void lock(struct emu_store *s)
{
	uint32_t was = 0;

	if (atomic_compare_exchange_strong(&s->lock, &was, 1))
		return;
	if (was != 2)
		was = atomic_exchange(&s->lock, 2);
	while (was) {
		emu_futex(&s->lock, FUTEX_WAIT, 2);
		was = atomic_exchange(&s->lock, 2);
	}
}

static void unlock(struct emu_store *s)
{
	if (atomic_exchange(&s->lock, 0) == 2)
		emu_futex(&s->lock, FUTEX_WAKE, 1);
}

int emu_store_open(struct emu_region *r, const struct emu_store_options *o, struct emu_store **ret)
{
	struct emu_store *s = calloc(1, sizeof(*s));
	int err = 0;

	if (!s)
		return -ENOMEM;
	s->r = r;
	s->fd = -1;
	s->free_slab = NONE;
	for (int i = 0; i < CLASSES; i++)
		s->partial[i] = NONE;
	if (o->memory / SLAB >= NONE || o->file / EMU_FRAME_SIZE >= NONE) {
		err = -EINVAL;
		goto out;
	}
	if (o->memory >= SLAB) {
		s->pool_len = o->memory / SLAB * SLAB;
		s->nr_slabs = (uint32_t)(o->memory / SLAB);
		s->slab = malloc(s->nr_slabs * sizeof(*s->slab)); /* written as slabs are begun */
		s->pool = mmap(NULL, s->pool_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (s->pool == MAP_FAILED)
			s->pool = NULL;
		if (!s->slab || !s->pool) {
			err = -ENOMEM;
			goto out;
		}
		madvise(s->pool, s->pool_len, MADV_NOHUGEPAGE);
		madvise(s->pool, s->pool_len, MADV_DONTFORK);
	}
	if (o->fd >= 0 && o->file >= EMU_FRAME_SIZE) {
		s->blocks = s->free_blocks = o->file / EMU_FRAME_SIZE;
		err = emu_table_map(&s->file_table, s->blocks * 3);
		if (err)
			goto out;
		s->taken = s->file_table.p;
		s->extent = s->taken + s->blocks;
		s->live = s->extent + s->blocks;
		s->fd = o->fd;
	}
	*ret = s;
	return 0;
out:
	emu_store_close(s);
	return err;
}

void emu_store_close(struct emu_store *s)
{
	if (s->pool)
		munmap(s->pool, s->pool_len);
	emu_table_unmap(&s->file_table);
	free(s->slab);
	free(s);
}

bool emu_store_has_file(const struct emu_store *s)
{
	return s->fd >= 0;
}

/* ---- the pool */

static void unlink_slab(struct emu_store *s, uint32_t i)
{
	struct slab *slab = &s->slab[i];

	if (slab->prev == NONE)
		s->partial[slab->class] = slab->next;
	else
		s->slab[slab->prev].next = slab->next;
	if (slab->next != NONE)
		s->slab[slab->next].prev = slab->prev;
}

static void link_slab(struct emu_store *s, uint32_t i)
{
	struct slab *slab = &s->slab[i];

	slab->prev = NONE;
	slab->next = s->partial[slab->class];
	if (slab->next != NONE)
		s->slab[slab->next].prev = i;
	s->partial[slab->class] = i;
}

static uint32_t new_slab(struct emu_store *s, uint8_t class)
{
	uint32_t i = s->free_slab;

	if (i != NONE)
		s->free_slab = s->slab[i].next;
	else if (s->fresh_slabs < s->nr_slabs)
		i = s->fresh_slabs++;
	else
		return NONE;
	s->slab[i] = (struct slab){ .class = class };
	s->slabs_used++;
	link_slab(s, i);
	/* may go over a gate's max by this much: it is what pages can leave for */
	emu_gate_charge(s->r, SLAB_FRAMES, EMU_GATE_FORCE);
	emu_stat_add(s->r, EMU_STAT_pool_frames, SLAB_FRAMES);
	return i;
}

int emu_store_put(struct emu_store *s, const void *bytes, uint16_t len, struct emu_slot *ret)
{
	const uint8_t class = (uint8_t)((len + STEP - 1) / STEP - 1);
	const uint32_t size = (class + 1u) * STEP;
	struct slab *slab;
	uint32_t i, object;
	uint8_t *at;

	lock(s);
	i = s->partial[class];
	if (i == NONE)
		i = new_slab(s, class);
	if (i == NONE) {
		unlock(s);
		return -ENOSPC;
	}
	slab = &s->slab[i];
	if (slab->free) {
		object = slab->free - 1u;
		memcpy(&slab->free, s->pool + (uint64_t)i * SLAB + object * size, sizeof(slab->free));
	} else {
		object = slab->fresh++;
	}
	if (++slab->used == SLAB / size)
		unlink_slab(s, i);
	unlock(s);
	at = s->pool + (uint64_t)i * SLAB + object * size;
	memcpy(at, bytes, len);
	ret->kind = EMU_SLOT_MEMORY;
	ret->at = (uint64_t)(at - s->pool);
	return 0;
}

/* Returns the slab that is empty now, or NONE. */
static uint32_t put_back(struct emu_store *s, uint64_t at)
{
	const uint32_t i = (uint32_t)(at / SLAB);
	struct slab *slab = &s->slab[i];
	const uint32_t size = (slab->class + 1u) * STEP, object = (uint32_t)(at % SLAB) / size;

	memcpy(s->pool + at, &slab->free, sizeof(slab->free));
	slab->free = (uint16_t)(object + 1);
	if (slab->used-- == SLAB / size)
		link_slab(s, i);
	if (slab->used)
		return NONE;
	unlink_slab(s, i);
	s->slabs_used--;
	return i;
}

/* A slab that is on no list: its memory goes back, and it may be begun again. Not under the lock: it takes its time. */
static void free_slab(struct emu_store *s, uint32_t i)
{
	madvise(s->pool + (uint64_t)i * SLAB, SLAB, MADV_DONTNEED);
	emu_stat_add(s->r, EMU_STAT_pool_frames, -SLAB_FRAMES);
	emu_gate_uncharge(s->r, SLAB_FRAMES);
	lock(s);
	s->slab[i].next = s->free_slab;
	s->free_slab = i;
	unlock(s);
}

const uint8_t *emu_store_bytes(struct emu_store *s, const struct emu_slot *slot)
{
	return s->pool + slot->at;
}

/* ---- the file */

int64_t emu_store_extent(struct emu_store *s, uint32_t blocks, uint32_t objects)
{
	uint64_t run = 0, at;

	lock(s);
	at = s->cursor;
	/* once round, and to the end of a run that began before the cursor */
	for (uint64_t looked = 0; blocks <= s->free_blocks && looked < s->blocks + blocks; looked++, at++) {
		if (at == s->blocks) {
			at = 0;
			run = 0;
		}
		run = s->taken[at] ? 0 : run + 1;
		if (run == blocks) {
			at = at + 1 - blocks;
			memset(s->taken + at, 1, blocks);
			s->extent[at] = (uint8_t)blocks;
			s->live[at] = (uint8_t)objects;
			s->free_blocks -= blocks;
			s->cursor = (at + blocks) % s->blocks;
			unlock(s);
			return (int64_t)(at * EMU_FRAME_SIZE);
		}
	}
	unlock(s);
	return -ENOSPC;
}

static void give_up(struct emu_store *s, uint64_t block, uint8_t objects)
{
	s->live[block] = (uint8_t)(s->live[block] - objects);
	if (s->live[block])
		return;
	memset(s->taken + block, 0, s->extent[block]);
	s->free_blocks += s->extent[block];
}

int emu_store_write(struct emu_store *s, const void *buffer, uint32_t blocks, int64_t at)
{
	const uint64_t len = (uint64_t)blocks * EMU_FRAME_SIZE;
	uint64_t done = 0;
	int err = 0;

	while (done < len && !err) {
		ssize_t n = pwrite(s->fd, (const uint8_t *)buffer + done, len - done, at + (off_t)done);

		if (n > 0)
			done += (uint64_t)n;
		else if (!n || errno != EINTR)
			err = n ? -errno : -EIO;
	}
	if (!err) {
		emu_stat_add(s->r, EMU_STAT_swap_file_written, (int64_t)len);
		return 0;
	}
	atomic_store(&s->error, -err);
	lock(s);
	give_up(s, (uint64_t)at / EMU_FRAME_SIZE, s->live[(uint64_t)at / EMU_FRAME_SIZE]);
	unlock(s);
	return err;
}

int emu_store_read(struct emu_store *s, uint64_t at, uint32_t bytes, void *buffer)
{
	uint32_t done = 0;

	while (done < bytes) {
		ssize_t n = pread(s->fd, (uint8_t *)buffer + done, bytes - done, (off_t)(at + done));

		if (n > 0) {
			done += (uint32_t)n;
		} else if (!n || errno != EINTR) {
			int err = n ? errno : EIO; /* somebody has cut the file */

			atomic_store(&s->error, err);
			return -err;
		}
	}
	emu_stat_add(s->r, EMU_STAT_swap_file_read, bytes);
	return 0;
}

/* ---- both */

static void count(struct emu_store *s, const struct emu_slot *slot, int sign)
{
	atomic_fetch_add(&s->pages, sign);
	if (slot->kind == EMU_SLOT_SAME) {
		atomic_fetch_add(&s->same, sign);
		return;
	}
	if (slot->len == EMU_FRAME_SIZE)
		atomic_fetch_add(&s->raw, sign);
	atomic_fetch_add(&s->object_bytes, sign * slot->len);
}

void emu_store_free(struct emu_store *s, const struct emu_slot *slot)
{
	uint32_t empty = NONE;

	count(s, slot, -1);
	if (slot->kind == EMU_SLOT_SAME)
		return;
	lock(s);
	if (slot->kind == EMU_SLOT_MEMORY)
		empty = put_back(s, slot->at);
	else
		give_up(s, slot->at / EMU_FRAME_SIZE - slot->extent, 1);
	unlock(s);
	if (empty != NONE)
		free_slab(s, empty);
}

/* Called when a slot is kept. */
void emu_store_kept(struct emu_store *s, const struct emu_slot *slot)
{
	count(s, slot, 1);
}

void emu_store_failed(struct emu_store *s, int err)
{
	atomic_store(&s->error, err);
}

void emu_store_tell(struct emu_store *s, struct emu_store_info *ret)
{
	lock(s);
	ret->pool_bytes = s->slabs_used * SLAB;
	ret->file_bytes = (int64_t)(s->blocks - s->free_blocks) * EMU_FRAME_SIZE;
	unlock(s);
	ret->pool_resident = emu_table_bytes(&(struct emu_table){ s->pool, s->pool_len });
	ret->pages = atomic_load(&s->pages);
	ret->same = atomic_load(&s->same);
	ret->raw = atomic_load(&s->raw);
	ret->object_bytes = atomic_load(&s->object_bytes);
	ret->error = atomic_load(&s->error);
}

static uint64_t mum(uint64_t a, uint64_t b)
{
	const unsigned __int128 product = (unsigned __int128)a * b;

	return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Four lanes of a multiplication to 128 bits folded into 64, as wyhash has them (Wang Yi): some 30 bytes a ns. */
uint32_t emu_store_sum(const void *bytes, uint16_t len, uint64_t key)
{
	const uint64_t salt[4] = { 0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu, 0x8ebc6af09c88c6e3u, 0x589965cc75374cc3u };
	uint64_t lane[4] = { key ^ salt[0], key ^ salt[1], key ^ salt[2], key ^ salt[3] }, word[8];
	const uint8_t *p = bytes;
	uint32_t left = len;

	for (; left >= 64; p += 64, left -= 64) {
		memcpy(word, p, 64);
		for (int i = 0; i < 4; i++)
			lane[i] = mum(word[2 * i] ^ salt[i], word[2 * i + 1] ^ lane[i]);
	}
	memset(word, 0, sizeof(word));
	memcpy(word, p, left);
	for (int i = 0; i < 4; i++)
		lane[i] = mum(word[2 * i] ^ salt[i], word[2 * i + 1] ^ lane[i]);
	lane[0] = mum(lane[0] ^ lane[1] ^ len, lane[2] ^ lane[3] ^ salt[0]);
	return (uint32_t)(lane[0] ^ (lane[0] >> 32));
}
