/* SPDX-License-Identifier: MIT */
/* store.h - where stored pages lie, for those who put them there and fetch them: store.c, lz4.c, swapout.c, swapin.c. */
#ifndef EMU_STORE_H
#define EMU_STORE_H

#include "core.h"

struct emu_lz4 {
	size_t state_size;
	int (*compress)(void *state, const char *src, char *dst, int len, int room, int acceleration);
	int (*decompress)(const char *src, char *dst, int len, int room); /* async-signal-safe: neither heap nor locks */
};
const struct emu_lz4 *emu_lz4(void); /* NULL: there is none */

enum emu_slot_kind { EMU_SLOT_NONE, EMU_SLOT_SAME, EMU_SLOT_MEMORY, EMU_SLOT_FILE };
/* Where a page's content is. One a frame; whoever holds the frame BUSY owns it. */
struct emu_slot {
	uint64_t at;  /* the word that fills the page; or bytes into the pool; or into the file */
	uint32_t sum; /* of the stored bytes, and of whose they are */
	uint32_t seq; /* counts pages as they are stored: neighbours in time have neighbouring numbers */
	uint16_t len; /* 4096: not compressed */
	uint8_t kind;
	uint8_t extent; /* file: blocks from the start of its extent to the block that `at` is in */
};
_Static_assert(sizeof(struct emu_slot) == 24, "three words a frame");

#define EMU_EXTENT_BLOCKS 64 /* of 4 KiB: what one write to the file takes at most */

struct emu_store;
int emu_store_open(struct emu_region *r, const struct emu_store_options *o, struct emu_store **ret);
void emu_store_close(struct emu_store *s);
/* Into the pool; -ENOSPC. */
int emu_store_put(struct emu_store *s, const void *bytes, uint16_t len, struct emu_slot *ret);
/* Blocks in a row of the file, for so many objects: their first byte, or -ENOSPC. A write that fails frees them again. */
int64_t emu_store_extent(struct emu_store *s, uint32_t blocks, uint32_t objects);
int emu_store_write(struct emu_store *s, const void *buffer, uint32_t blocks, int64_t at);
void emu_store_kept(struct emu_store *s, const struct emu_slot *slot); /* it is a frame's now */
void emu_store_failed(struct emu_store *s, int err);
void emu_store_free(struct emu_store *s, const struct emu_slot *slot);
int emu_store_read(struct emu_store *s, uint64_t at, uint32_t bytes, void *buffer);
const uint8_t *emu_store_bytes(struct emu_store *s, const struct emu_slot *slot);
bool emu_store_has_file(const struct emu_store *s);
void emu_store_tell(struct emu_store *s, struct emu_store_info *ret);
uint32_t emu_store_sum(const void *bytes, uint16_t len, uint64_t key);

#endif
