/* SPDX-License-Identifier: MIT */
#include "harness.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memmap.h"

#define FRAMES 3000

/* Every slot names a frame that names the slot; lists, owners and counts are what the descriptors say. */
static int true_books(struct emu_memmap *m, struct emu_space **spaces, size_t n)
{
	int64_t owners[EMU_NR_OWNERS] = { 0 }, cached = 0, listed = 0, pages = 0, dirty = 0;
	uint32_t *pfns = calloc(FRAMES, sizeof(*pfns));

	CHECK(pfns);
	for (uint32_t pfn = 0; pfn < FRAMES; pfn++) {
		const struct emu_page *p = &m->t.page[pfn];

		owners[m->t.owner[pfn]]++;
		if (!p->space)
			continue;
		cached++;
		CHECK(p->space < m->t.nr_spaces && m->t.space[p->space]);
		CHECK_EQ(m->t.space[p->space]->slot[p->index], pfn + 1);
	}
	for (int owner = EMU_OWNER_ANON; owner < EMU_NR_OWNERS; owner++)
		CHECK_EQ(m->stats.nr_owner[owner], owners[owner]);
	for (size_t i = 0; i < n; i++) {
		pages += spaces[i]->nr_pages;
		dirty += spaces[i]->nr_dirty;
	}
	CHECK_EQ(pages, cached);
	CHECK_EQ(dirty, owners[EMU_OWNER_DIRTY]);
	for (int list = 0; list < EMU_NR_LRU; list++) {
		int64_t count = emu_lru_list(m, list, pfns, FRAMES);

		CHECK_EQ(count, m->stats.nr_lru[list]);
		if (list == EMU_LRU_INACTIVE_FILE || list == EMU_LRU_ACTIVE_FILE)
			listed += count;
	}
	CHECK_EQ(listed, cached);
	free(pfns);
	return 0;
}

static uint64_t draw(uint64_t *state, uint64_t below)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (*state >> 33) % below;
}

/* Spaces of all sizes come, grow, shrink and go, while pages go in and out every way there is. */
static int any_order_keeps_true_books(void)
{
	struct emu_memmap *m;
	struct emu_space *spaces[4];
	uint32_t *room = calloc(FRAMES, sizeof(*room)), *mapped = calloc(FRAMES, sizeof(*mapped));
	uint64_t seed = 7;

	CHECK(room && mapped);
	CHECK_EQ(emu_memmap_create(FRAMES, &m), 0);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(emu_space_create(m, 10, &spaces[i]), 0);
	for (int step = 0; step < 20000; step++) {
		struct emu_space **s = &spaces[draw(&seed, 4)];
		uint64_t first = draw(&seed, (*s)->nr_slots), end = first + draw(&seed, 40);
		struct emu_range runs[8], one = { draw(&seed, FRAMES), 1, first };
		struct emu_shrink shrink = { .nr_to_scan = draw(&seed, 32), .freed = room, .mapped = mapped };
		struct emu_aging aging = { .sink_after = (uint16_t)(1 + draw(&seed, 3)), .free_after = (uint16_t)(1 + draw(&seed, 6)),
			                   .hand_over = (int)draw(&seed, 2), .most = draw(&seed, 9), .freed = room };
		size_t n;

		switch (draw(&seed, 12)) {
		case 0:
		case 1:
		case 2:
		case 3:
			(void)emu_space_insert(m, *s, &one, 1, (unsigned)draw(&seed, 4));
			break;
		case 4:
			(void)emu_space_lookup(m, *s, first, end - first, (unsigned)draw(&seed, 32), runs, 8, &n);
			CHECK(n <= 8);
			break;
		case 5:
			(void)emu_space_flag(m, *s, first, end, EMU_PG_DIRTY, 0);
			break;
		case 6:
			(void)emu_space_flag(m, *s, first, end, EMU_PG_WRITEBACK, EMU_PG_DIRTY);
			(void)emu_space_flag(m, *s, first, end, 0, EMU_PG_WRITEBACK);
			break;
		case 7:
			(void)emu_space_remove(m, *s, first, end, (int)draw(&seed, 3), room, FRAMES);
			break;
		case 8:
			CHECK_EQ(emu_lru_shrink(m, draw(&seed, 2) ? EMU_LRU_ACTIVE_FILE : EMU_LRU_INACTIVE_FILE, &shrink), 0);
			break;
		case 9:
			m->stats.gen++;
			CHECK_EQ(emu_lru_age(m, &aging), 0);
			break;
		case 10: /* small ones are malloc'ed, large ones mapped, and grow from one to the other */
			CHECK_EQ(emu_space_resize(m, *s, (*s)->nr_slots + draw(&seed, step % 500 ? 9 : 30000)), 0);
			break;
		default:
			if (draw(&seed, 40) == 0) {
				while (emu_space_remove(m, *s, 0, (*s)->nr_slots, EMU_REMOVE_TRUNCATE, room, FRAMES) > 0)
					;
				CHECK_EQ(emu_space_destroy(m, *s), 0);
				CHECK_EQ(emu_space_create(m, 1 + draw(&seed, 50), s), 0);
			} else if ((*s)->nr_pages) {
				CHECK_EQ(emu_space_destroy(m, *s), -EBUSY);
			}
		}
		if (step % 200 == 0 && true_books(m, spaces, 4))
			return 1;
	}
	CHECK_EQ(true_books(m, spaces, 4), 0);
	free(room);
	free(mapped);
	emu_memmap_destroy(m);
	return 0;
}

static int mistakes_change_nothing(void)
{
	struct emu_memmap *m, *none;
	struct emu_space *s;
	const struct emu_range in = { 5, 2, 0 }, anon = { 10, 3, 0 }, outside = { FRAMES - 1, 2, 0 }, beyond = { 20, 1, 9 };
	uint32_t room[8];
	struct emu_page_info info;

	CHECK_EQ(emu_memmap_create(0, &none), -ERANGE);
	CHECK_EQ(emu_memmap_create(1ull << 31, &none), -ERANGE);
	CHECK_EQ(emu_memmap_create(FRAMES, &m), 0);
	CHECK_EQ(emu_space_create(m, UINT32_MAX, &s), -EFBIG);
	CHECK_EQ(emu_space_create(m, 8, &s), 0);
	CHECK_EQ(emu_pages_use(m, &anon, 1, EMU_OWNER_ANON), 0);
	CHECK_EQ(emu_pages_use(m, &anon, 1, EMU_OWNER_BALLOON), -EBUSY);
	CHECK_EQ(emu_pages_use(m, &anon, 1, EMU_OWNER_DIRTY), -EINVAL);
	CHECK_EQ(emu_pages_use(m, &outside, 1, EMU_OWNER_ANON), -ERANGE);
	CHECK_EQ(emu_space_insert(m, s, &in, 1, 0), 0);
	CHECK_EQ(emu_space_insert(m, s, &in, 1, 0), -EEXIST);
	CHECK_EQ(emu_space_insert(m, s, &beyond, 1, 0), -ERANGE);
	CHECK_EQ(emu_space_insert(m, s, &(struct emu_range){ 11, 1, 4 }, 1, 0), -EBUSY);
	CHECK_EQ(emu_pages_release(m, &in, 1), -EBUSY);
	CHECK_EQ(emu_space_resize(m, s, 1), -EBUSY);
	CHECK_EQ(emu_pages_map(m, &in, 1, -1, 0), -EINVAL);
	CHECK_EQ(emu_pages_map(m, &in, 1, 2, 0), 0);
	CHECK_EQ(emu_space_remove(m, s, 0, 8, EMU_REMOVE_TRUNCATE, room, 8), -EBUSY);
	CHECK_EQ(emu_pages_map(m, &in, 1, -2, 0), 0);
	CHECK_EQ(emu_space_flag(m, s, 0, 8, EMU_PG_ACTIVE, 0), -EINVAL);
	CHECK_EQ(emu_space_flag(m, s, 0, 8, EMU_PG_DIRTY, EMU_PG_DIRTY), -EINVAL);
	CHECK_EQ(emu_page_look(m, FRAMES, &info), -ERANGE);
	CHECK_EQ(emu_page_look(m, 6, &info), 0);
	CHECK_EQ(info.index, 1);
	CHECK_EQ(info.owner, EMU_OWNER_INACTIVE);
	CHECK_EQ(emu_space_remove(m, s, 0, 8, EMU_REMOVE_TRUNCATE, room, 1), 1);
	CHECK_EQ(emu_space_remove(m, s, 0, 8, EMU_REMOVE_TRUNCATE, room, 8), 1);
	CHECK_EQ(emu_space_resize(m, s, 1), 0);
	CHECK_EQ(emu_pages_release(m, &anon, 1), 0);
	CHECK_EQ(m->t.block[0], 0);
	emu_memmap_destroy(m);
	return 0;
}

/* Ranges out of order, with a skip, of frames that are there and that aren't; and what stops it. */
static int copies_go_over_ranges(void)
{
	struct rig *rig = rig_open(64, EMU_SERVICE_INLINE, 1, 0);
	const struct emu_range ranges[] = { { 7, 2, 0 }, { 3, 1, 0 }, { 60, 4, 0 } };
	uint8_t *data = malloc(7 * 4096), *back = malloc(7 * 4096);
	struct emu_progress progress;

	if (!rig)
		return SKIPPED;
	CHECK(data && back);
	for (size_t i = 0; i < 7 * 4096; i++)
		data[i] = (uint8_t)(i * 131 >> 3);
	CHECK_EQ(emu_guest_copyv(rig->r, ranges, 3, 0, data, 7 * 4096, 1, &progress), 0);
	CHECK_EQ(progress.done, 7 * 4096);
	for (uint64_t skip = 0; skip < 7 * 4096; skip += 1777) {
		uint64_t n = 7 * 4096 - skip < 9000 ? 7 * 4096 - skip : 9000;

		CHECK_EQ(emu_guest_copyv(rig->r, ranges, 3, skip, back, n, 0, &progress), 0);
		CHECK(!memcmp(back, data + skip, n));
	}
	CHECK_EQ(emu_guest_copyv(rig->r, ranges, 3, 1, back, 7 * 4096, 0, &progress), -ERANGE);
	CHECK_EQ(emu_guest_copyv(rig->r, ranges, 3, 7 * 4096 + 1, back, 0, 0, &progress), -ERANGE);
	CHECK_EQ(emu_guest_copyv(rig->r, &(struct emu_range){ 63, 2, 0 }, 1, 0, back, 1, 0, &progress), -ERANGE);
	CHECK_EQ(emu_poison(rig->r, &(struct emu_range){ 3, 1, 0 }, 1), 1);
	CHECK_EQ(emu_guest_copyv(rig->r, ranges, 3, 100, back, 5 * 4096, 0, &progress), -EHWPOISON);
	CHECK_EQ(progress.bad_gfn, 3);
	CHECK_EQ(progress.done, 2 * 4096 - 100);
	free(data);
	free(back);
	rig_close(rig);
	return 0;
}

static int files_are_opened_below_and_nowhere_else(void)
{
	char folder[] = "/tmp/emu-test-XXXXXX", name[64];
	struct emu_file_info info;
	int dir, fd;

	CHECK(mkdtemp(folder));
	dir = open(folder, O_RDONLY | O_DIRECTORY);
	CHECK(dir >= 0);
	fd = emu_file_open(dir, "a", O_RDWR | O_CREAT | O_EXCL, 0600, &info);
	CHECK(fd >= 0);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	close(fd);
	CHECK_EQ(emu_file_open(dir, "../a", O_RDONLY, 0, &info), -EXDEV);
	CHECK_EQ(emu_file_open(dir, "/etc/passwd", O_RDONLY, 0, &info), -EXDEV);
	CHECK_EQ(emu_file_open(dir, "missing", O_RDONLY, 0, &info), -ENOENT);
	snprintf(name, sizeof(name), "%s/out", folder);
	CHECK_EQ(symlink("/etc/passwd", name), 0);
	CHECK_EQ(emu_file_open(dir, "out", O_RDONLY, 0, &info), -EXDEV);
	unlink(name);
	snprintf(name, sizeof(name), "%s/a", folder);
	unlink(name);
	close(dir);
	rmdir(folder);
	return 0;
}

const struct test pagecache_tests[] = {
	{ "page cache: any order of events keeps true books", any_order_keeps_true_books },
	{ "page cache: mistakes change nothing", mistakes_change_nothing },
	{ "copies go over ranges", copies_go_over_ranges },
	{ "files are opened below a directory and nowhere else", files_are_opened_below_and_nowhere_else },
	{ NULL, NULL },
};
