/* SPDX-License-Identifier: MIT */
/* What a guest says of its frames, and what a host may do with them: the table of CMM2, pair by pair, and its races. */
#define _GNU_SOURCE
#include "harness.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FRAMES = 1024, SEED = 5 };
#define ALL_BUT_STABLE (1u << EMU_UNUSED | 1u << EMU_VOLATILE | 1u << EMU_POTENTIAL)
#define AT(first, n) (&(struct emu_range){ first, n, 0 }), 1

static struct rig *open_nth(int n, int *fd)
{
	struct rig *rig = rig_open_nth(n, FRAMES, 0);

	if (!rig)
		return NULL;
	if (!emu_can_lose(rig->r)) {
		rig_close(rig);
		return NULL;
	}
	*fd = memfd_create("emu-test", MFD_CLOEXEC);
	rig_swap_on(rig, 4 << 20, *fd, 4 << 20);
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	CHECK_EQ(emu_usage_track(rig->r), 0);
	return rig;
}

static int64_t say(struct rig *rig, uint64_t gfn, uint64_t n, int usage, size_t *gone)
{
	uint64_t which[FRAMES];
	size_t found;
	int64_t changed = emu_usage_set(rig->r, AT(gfn, n), usage, EMU_CAUSE_OTHER, which, FRAMES, &found);

	if (gone)
		*gone = found;
	return changed;
}

/* In the field's letters, from the byte. */
static const char *pair_of(struct rig *rig, uint64_t gfn)
{
	static char pair[3];
	const uint8_t byte = emu_byte_load(rig->r, gfn), state = emu_byte_state(byte);

	pair[0] = "SUVP"[emu_byte_usage(byte)];
	pair[1] = state == EMU_PRESERVED ? 'p' : state == EMU_ZERO || state == EMU_DISCARDED ? 'z' : 'r';
	CHECK_EQ(state == EMU_DISCARDED, pair[0] == 'V' && pair[1] == 'z'); /* the host's two kinds of nothing */
	return pair;
}

static void fill(struct rig *rig, uint64_t gfn, uint64_t n)
{
	CHECK_EQ(rig_run(rig, EMU_FILL, gfn, n, SEED, 1, NULL), 0);
}

/* Make a pair, of a frame that is Sz. "Pr": clean; "PR": dirty. */
static void make(struct rig *rig, uint64_t gfn, const char *pair)
{
	uint8_t bits;

	if (pair[1] != 'z' || pair[0] == 'V')
		fill(rig, gfn, 1);
	if (pair[1] == 'p')
		CHECK_EQ(emu_swap_out(rig->r, AT(gfn, 1)), 1);
	if (pair[1] == 'r')
		CHECK_EQ(emu_access_harvest(rig->r, gfn, 1, EMU_DIRTIED, &bits), 0);
	if (pair[0] == 'U')
		CHECK_EQ(say(rig, gfn, 1, EMU_UNUSED, NULL), 1);
	if (pair[0] == 'V')
		CHECK_EQ(say(rig, gfn, 1, EMU_VOLATILE, NULL), 1);
	if (pair[0] == 'P')
		CHECK_EQ(say(rig, gfn, 1, EMU_POTENTIAL, NULL), 1);
	if (!strcmp(pair, "Vz"))
		CHECK_EQ(emu_steal(rig->r, AT(gfn, 1), EMU_VOLATILE), 1);
}

/* "!": refused. "*": and told that it is gone. "?": an access that is told so. */
static const struct {
	const char *pair, *stable, *unused, *is_volatile, *potential, *read, *steal, *out;
} table[] = {
	{ "Sr", "Sr",  "Ur", "Vr", "Pr",  "Sr", "Sr", "Sp" },
	{ "Sp", "Sp",  "Uz", "Vz", "!Sp", "Sr", "Sp", "Sp" },
	{ "Sz", "Sz",  "Uz", "Vz", "Vz",  "Sr", "Sz", "Sz" },
	{ "Ur", "Sr",  "Ur", "Vr", "Pr",  "Ur", "Uz", "Uz" },
	{ "Uz", "Sz",  "Uz", "Vz", "Vz",  "Ur", "Uz", "Uz" },
	{ "Vr", "Sr",  "Ur", "Vr", "Pr",  "Vr", "Vz", "Vz" },
	{ "Vz", "*Vz", "Uz", "Vz", "Vz",  "?Vz", "Vz", "Vz" },
	{ "Pr", "Sr",  "Ur", "Vr", "Pr",  "Pr", "Vz", "Vz" },
	{ "PR", "Sr",  "Ur", "Vr", "Pr",  "Pr", "Sp", "Sp" },
};

static void do_guest(struct rig *rig, uint64_t gfn, int usage, const char *want)
{
	struct emu_usage_counts before, after;
	const bool refused = *want == '!', told = *want == '*';
	uint8_t byte = emu_byte_load(rig->r, gfn), was = emu_byte_usage(byte);
	int64_t moved;
	size_t gone;

	CHECK_EQ(emu_usage_counts(rig->r, &before), 0);
	moved = say(rig, gfn, 1, usage, &gone);
	CHECK_EQ(emu_usage_counts(rig->r, &after), 0);
	CHECK_EQ(strcmp(pair_of(rig, gfn), want + (refused || told)), 0);
	CHECK_EQ(gone, told);
	CHECK_EQ(after.gone[EMU_CAUSE_OTHER] - before.gone[EMU_CAUSE_OTHER], told);
	CHECK_EQ(after.refused[EMU_CAUSE_OTHER][usage] - before.refused[EMU_CAUSE_OTHER][usage], refused);
	CHECK_EQ(moved, emu_byte_load(rig->r, gfn) != byte);
	if (usage == EMU_POTENTIAL && *want == 'V')
		usage = EMU_VOLATILE; /* what it became is what is counted */
	CHECK_EQ(after.moved[EMU_CAUSE_OTHER][was][usage] - before.moved[EMU_CAUSE_OTHER][was][usage], moved);
}

/* One operation on one pair, in a frame of its own; what is kept is still right, and what isn't is never stale. */
static void check_cell(struct rig *rig, uint64_t gfn, const char *pair, int op, const char *want)
{
	const bool had = pair[1] != 'z', told = *want == '?';
	uint8_t page[EMU_FRAME_SIZE];
	struct emu_progress p;
	uint64_t bad;
	int err;

	make(rig, gfn, pair);
	if (op < EMU_NR_USAGES) {
		do_guest(rig, gfn, op, want);
	} else if (op == EMU_NR_USAGES) {
		err = emu_guest_read(rig->r, gfn << EMU_FRAME_SHIFT, page, sizeof(page), &p);
		CHECK_EQ(err, told ? -ENODATA : 0);
	} else if (op == EMU_NR_USAGES + 1) {
		CHECK_EQ(emu_steal_some(rig->r, FRAMES, ALL_BUT_STABLE, EMU_STEAL_BY_AGE, 1), pair[1] != 'z' && pair[0] != 'S');
	} else {
		CHECK_EQ(emu_swap_out(rig->r, AT(gfn, 1)), pair[1] == 'r' || pair[1] == 'R');
	}
	want += *want == '!' || *want == '*' || told;
	CHECK_EQ(strcmp(pair_of(rig, gfn), want), 0);
	rig_check_books(rig);
	if (had && (want[1] == 'r' || want[1] == 'p')) { /* its content is what it was */
		CHECK_EQ(rig_run(rig, EMU_VERIFY, gfn, 1, SEED, 1, &bad), 0);
		CHECK_EQ(bad, 0);
	} else if (want[0] != 'V') {
		CHECK_EQ(emu_guest_read(rig->r, gfn << EMU_FRAME_SHIFT, page, sizeof(page), &p), 0);
		for (size_t i = 0; i < sizeof(page); i++)
			CHECK_EQ(page[i], 0);
	}
	say(rig, gfn, 1, EMU_UNUSED, NULL);
	say(rig, gfn, 1, EMU_STABLE, NULL);
	CHECK(emu_discard(rig->r, AT(gfn, 1)) >= 0);
	CHECK_EQ(strcmp(pair_of(rig, gfn), "Sz"), 0);
}

static int every_pair_and_every_operation(void)
{
	int ran = 0, fd;

	for (int i = 0; i < RIGS; i++) {
		struct rig *rig = open_nth(i, &fd);
		uint64_t gfn = 0;

		if (!rig)
			continue;
		for (size_t row = 0; row < sizeof(table) / sizeof(table[0]); row++) {
			const char *const want[] = { table[row].stable, table[row].unused, table[row].is_volatile,
				                     table[row].potential, table[row].read, table[row].steal, table[row].out };

			for (int op = 0; op < 7; op++)
				check_cell(rig, gfn++, table[row].pair, op, want[op]);
		}
		rig_close(rig);
		close(fd);
		ran++;
	}
	return ran ? 0 : SKIPPED;
}

/* The four pairs that don't exist: put there by force, they are refused, and stay. */
static int pairs_that_dont_exist(void)
{
	static const uint8_t forced[][2] = { { EMU_UNUSED, EMU_PRESERVED }, { EMU_VOLATILE, EMU_PRESERVED },
		                             { EMU_POTENTIAL, EMU_PRESERVED }, { EMU_POTENTIAL, EMU_ZERO },
		                             { EMU_VOLATILE, EMU_ZERO }, { EMU_STABLE, EMU_DISCARDED } };
	int fd;
	struct rig *rig = open_nth(0, &fd);

	if (!rig)
		return SKIPPED;
	for (size_t i = 0; i < sizeof(forced) / sizeof(forced[0]); i++)
		for (int usage = 0; usage < EMU_NR_USAGES; usage++) {
			const uint8_t byte = (uint8_t)(forced[i][0] << EMU_USAGE_SHIFT) | forced[i][1];
			struct emu_usage_counts counts;

			CHECK(!emu_usage_legal(forced[i][0], forced[i][1]));
			atomic_store(&rig->r->state[7], byte);
			CHECK_EQ(say(rig, 7, 1, usage, NULL), 0);
			CHECK_EQ(emu_byte_load(rig->r, 7), byte);
			CHECK_EQ(emu_steal_some(rig->r, 1, ALL_BUT_STABLE, EMU_STEAL_ROUND, 1), 0);
			CHECK_EQ(emu_byte_load(rig->r, 7), byte);
			CHECK_EQ(emu_usage_counts(rig->r, &counts), 0);
			CHECK_EQ(counts.refused[EMU_CAUSE_OTHER][usage], i + 1);
		}
	atomic_store(&rig->r->state[7], EMU_ZERO);
	rig_close(rig);
	close(fd);
	return 0;
}

static int one(struct rig *rig, uint64_t gfn, int usage, int cause)
{
	return emu_usage_one(&(struct emu_sayer){ rig->r, &gfn, usage, cause });
}

/* One frame a call: what came of it, and what is refused at the door. */
static int one_by_one(void)
{
	struct rig *rig, *silent = rig_open(FRAMES, EMU_SERVICE_OFF, 1, 0);
	struct emu_usage_counts counts;
	int fd;

	CHECK_EQ(one(silent, 0, EMU_UNUSED, EMU_CAUSE_FREE), -EOPNOTSUPP);
	rig_close(silent);
	rig = open_nth(0, &fd);
	if (!rig)
		return SKIPPED;
	fill(rig, 5, 1);
	CHECK_EQ(one(rig, 5, EMU_VOLATILE, EMU_CAUSE_PUT), EMU_SAID);
	CHECK_EQ(one(rig, 5, EMU_VOLATILE, EMU_CAUSE_PUT), EMU_SAID_ALREADY);
	CHECK_EQ(emu_steal(rig->r, AT(5, 1), EMU_VOLATILE), 1);
	CHECK_EQ(one(rig, 5, EMU_STABLE, EMU_CAUSE_LOOKUP), EMU_SAID_GONE);
	CHECK_EQ(one(rig, 5, EMU_STABLE, EMU_CAUSE_LOOKUP), EMU_SAID_GONE); /* as often as it is asked */
	CHECK_EQ(one(rig, 5, EMU_UNUSED, EMU_CAUSE_DISCARDED), EMU_SAID);
	CHECK_EQ(one(rig, 5, EMU_STABLE, EMU_CAUSE_ALLOC), EMU_SAID);
	CHECK_EQ(one(rig, FRAMES, EMU_STABLE, EMU_CAUSE_LOOKUP), -ERANGE);
	CHECK_EQ(one(rig, 5, EMU_NR_USAGES, EMU_CAUSE_LOOKUP), -EINVAL);
	CHECK_EQ(one(rig, 5, EMU_STABLE, EMU_NR_CAUSES), -EINVAL);
	atomic_store(&rig->r->state[7], (uint8_t)(EMU_UNUSED << EMU_USAGE_SHIFT) | EMU_PRESERVED); /* no legal pair */
	CHECK_EQ(one(rig, 7, EMU_STABLE, EMU_CAUSE_LOOKUP), EMU_SAID_REFUSED);
	atomic_store(&rig->r->state[7], EMU_ZERO);
	CHECK_EQ(emu_usage_counts(rig->r, &counts), 0);
	CHECK_EQ(counts.moved[EMU_CAUSE_PUT][EMU_STABLE][EMU_VOLATILE], 1);
	CHECK_EQ(counts.moved[EMU_CAUSE_LOOKUP][EMU_VOLATILE][EMU_STABLE], 0);
	CHECK_EQ(counts.moved[EMU_CAUSE_DISCARDED][EMU_VOLATILE][EMU_UNUSED], 1);
	CHECK_EQ(counts.gone[EMU_CAUSE_LOOKUP], 2);
	CHECK_EQ(counts.refused[EMU_CAUSE_LOOKUP][EMU_STABLE], 1);
	emu_region_forked(rig->r);
	CHECK_EQ(one(rig, 5, EMU_STABLE, EMU_CAUSE_LOOKUP), -ESHUTDOWN);
	atomic_store(&rig->r->closed, 0);
	rig_close(rig);
	close(fd);
	return 0;
}

/* Runs across words, single frames, and frames by number say the same, and are counted alike. */
static int batches(void)
{
	int fd;
	struct rig *rig = open_nth(0, &fd);
	struct emu_usage_counts counts;
	int64_t matrix[EMU_NR_USAGES][EMU_NR_STATES];
	uint32_t gfns[FRAMES];
	uint64_t gone[8];
	uint8_t usages[FRAMES];
	size_t found;

	if (!rig)
		return SKIPPED;
	fill(rig, 100, 300);
	CHECK_EQ(say(rig, 0, FRAMES, EMU_UNUSED, NULL), FRAMES);
	CHECK_EQ(say(rig, 103, 250, EMU_VOLATILE, NULL), 250);
	CHECK_EQ(say(rig, 103, 250, EMU_VOLATILE, NULL), 0);
	CHECK_EQ(emu_usage_copy(rig->r, 0, FRAMES, usages), 0);
	for (int i = 0; i < FRAMES; i++)
		CHECK_EQ(usages[i], i >= 103 && i < 353 ? EMU_VOLATILE : EMU_UNUSED);
	CHECK_EQ(emu_usage_matrix(rig->r, &matrix[0][0]), 0);
	CHECK_EQ(matrix[EMU_VOLATILE][EMU_RESIDENT], 250);
	CHECK_EQ(matrix[EMU_UNUSED][EMU_RESIDENT], 50);
	CHECK_EQ(matrix[EMU_UNUSED][EMU_ZERO], FRAMES - 300);
	CHECK_EQ(emu_steal(rig->r, AT(200, 10), EMU_VOLATILE), 10);
	for (uint32_t i = 0; i < 300; i++)
		gfns[i] = 399 - i;
	CHECK_EQ(emu_usage_set_frames(rig->r, gfns, 300, EMU_STABLE, EMU_CAUSE_LOOKUP, gone, 8, &found), 290);
	CHECK_EQ(found, 10);
	for (uint64_t i = 0; i < 8; i++)
		CHECK_EQ(gone[i], 209 - i);
	CHECK_EQ(emu_usage_counts(rig->r, &counts), 0);
	CHECK_EQ(counts.moved[EMU_CAUSE_LOOKUP][EMU_VOLATILE][EMU_STABLE], 240);
	CHECK_EQ(counts.moved[EMU_CAUSE_LOOKUP][EMU_UNUSED][EMU_STABLE], 50);
	CHECK_EQ(counts.gone[EMU_CAUSE_LOOKUP], 10);
	CHECK_EQ(counts.moved[EMU_CAUSE_OTHER][EMU_STABLE][EMU_UNUSED], FRAMES);
	CHECK_EQ(emu_usage_set(rig->r, AT(0, FRAMES + 1), EMU_STABLE, 0, NULL, 0, &found), -ERANGE);
	CHECK_EQ(emu_usage_set(rig->r, AT(0, 1), EMU_NR_USAGES, 0, NULL, 0, &found), -EINVAL);
	CHECK_EQ(emu_usage_set(rig->r, AT(0, 1), 0, EMU_NR_CAUSES, NULL, 0, &found), -EINVAL);
	CHECK_EQ(emu_steal(rig->r, AT(0, 1), EMU_STABLE), -EINVAL);
	rig_check_books(rig);
	rig_close(rig);
	close(fd);
	return 0;
}

/* Unused ones go first, then volatile ones, then clean ones that are potentially volatile; and the oldest of each. */
static int the_order(void)
{
	int fd;
	struct rig *rig = open_nth(0, &fd);
	uint64_t ages[256];
	uint8_t bits[FRAMES];

	if (!rig)
		return SKIPPED;
	fill(rig, 0, 400);
	CHECK_EQ(emu_access_harvest(rig->r, 0, FRAMES, EMU_DIRTIED, bits), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_WRITE, 350, 50, 0, 1, NULL), 0);
	CHECK_EQ(say(rig, 0, 100, EMU_VOLATILE, NULL), 100);
	CHECK_EQ(say(rig, 200, 100, EMU_UNUSED, NULL), 100);
	CHECK_EQ(say(rig, 300, 100, EMU_POTENTIAL, NULL), 100);
	CHECK_EQ(emu_access_scan(rig->r, ages), 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 0, 50, 0, 1, NULL), 0);
	CHECK_EQ(emu_access_scan(rig->r, ages), 0);
	CHECK_EQ(emu_steal_some(rig->r, 80, ALL_BUT_STABLE, EMU_STEAL_BY_AGE, 1), 80);
	CHECK_EQ(rig_stat(rig, "steal_unused"), 80);
	CHECK_EQ(emu_steal_some(rig->r, 70, ALL_BUT_STABLE, EMU_STEAL_BY_AGE, 1), 70);
	CHECK_EQ(rig_stat(rig, "steal_unused"), 100);
	CHECK_EQ(rig_stat(rig, "steal_volatile"), 50);
	for (uint64_t gfn = 0; gfn < 100; gfn++)
		CHECK_EQ(emu_state_load(rig->r, gfn), gfn < 50 ? EMU_RESIDENT : EMU_DISCARDED);
	CHECK_EQ(emu_steal_some(rig->r, 1, 1u << EMU_UNUSED, EMU_STEAL_AT_RANDOM, 7), 0);
	CHECK_EQ(emu_steal_some(rig->r, FRAMES, ALL_BUT_STABLE, EMU_STEAL_AT_RANDOM, 7), 150);
	CHECK_EQ(rig_stat(rig, "steal_potential"), 50);
	CHECK_EQ(rig_stat(rig, "steal_preserved"), 50);
	CHECK_EQ(rig_rss(rig), 100);
	CHECK_EQ(emu_steal_some(rig->r, FRAMES, ALL_BUT_STABLE, EMU_STEAL_ROUND, 7), 0);
	CHECK_EQ(emu_steal_some(rig->r, 1, ALL_BUT_STABLE, 3, 7), -EINVAL);
	rig_check_books(rig);
	rig_close(rig);
	close(fd);
	return 0;
}

/* A page in the store becomes volatile: a reader sees it, or is told that it is gone, and never zeros on the way. */
struct watch {
	struct rig *rig;
	_Atomic int stop;
	_Atomic uint64_t seen, told;
	_Atomic uint64_t writes; /* odd: the page is being read in, which the guest's kernel keeps readers from */
};

static void *watcher(void *arg)
{
	struct watch *w = arg;
	struct emu_progress p;
	uint8_t page[EMU_FRAME_SIZE];

	while (!atomic_load(&w->stop)) {
		const uint64_t before = atomic_load(&w->writes);
		const int err = emu_guest_read(w->rig->r, 9 << EMU_FRAME_SHIFT, page, sizeof(page), &p);

		if (before % 2 || before != atomic_load(&w->writes))
			continue;
		CHECK(!err || err == -ENODATA);
		atomic_fetch_add(err ? &w->told : &w->seen, 1);
		for (size_t i = 0; !err && i < sizeof(page); i++)
			CHECK_EQ(page[i], 7);
	}
	return NULL;
}

static int from_the_store_to_nothing(void)
{
	uint8_t page[EMU_FRAME_SIZE];
	struct watch w = { 0 };
	struct emu_progress p;
	pthread_t thread;
	size_t gone;
	int fd;

	memset(page, 7, sizeof(page));
	w.rig = open_nth(0, &fd);
	if (!w.rig)
		return SKIPPED;
	CHECK_EQ(emu_guest_write(w.rig->r, 9 << EMU_FRAME_SHIFT, page, sizeof(page), &p), 0);
	CHECK_EQ(pthread_create(&thread, NULL, watcher, &w), 0);
	for (int i = 0; i < 20000 || (i < 2000000 && !(atomic_load(&w.seen) && atomic_load(&w.told))); i++) {
		CHECK(emu_swap_out(w.rig->r, AT(9, 1)) >= 0);
		CHECK_EQ(say(w.rig, 9, 1, EMU_VOLATILE, NULL), 1);
		say(w.rig, 9, 1, EMU_STABLE, &gone);
		if (gone) {
			atomic_fetch_add(&w.writes, 1);
			CHECK_EQ(emu_guest_write(w.rig->r, 9 << EMU_FRAME_SHIFT, page, sizeof(page), &p), 0);
			atomic_fetch_add(&w.writes, 1);
		}
	}
	atomic_store(&w.stop, 1);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(atomic_load(&w.seen) && atomic_load(&w.told));
	rig_check_books(w.rig);
	rig_close(w.rig);
	close(fd);
	return 0;
}

/* What nobody needs can be stolen wherever it is, by each policy; what is dirty and can't be stored hides nothing. */
static int what_can_be_stolen(void)
{
	struct rig *rig = rig_open_nth(0, FRAMES, 0);

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_usage_track(rig->r), 0);
	CHECK_EQ(emu_usage_one(&(struct emu_sayer){ rig->r, &(uint64_t){ 0 }, EMU_POTENTIAL, 0 }), -EINVAL); /* who'd know? */
	CHECK_EQ(emu_access_track(rig->r, 1), 0);
	for (int policy = EMU_STEAL_BY_AGE; policy <= EMU_STEAL_AT_RANDOM; policy++) {
		uint8_t bits[FRAMES];
		uint64_t ages[256];

		fill(rig, 0, FRAMES);
		CHECK_EQ(emu_lazy_free(rig->r, AT(0, 64)), 64);
		CHECK_EQ(say(rig, 0, 64, EMU_UNUSED, NULL), 64);
		CHECK_EQ(emu_set_aside(rig->r, AT(64, 64), 5), 64);
		CHECK_EQ(say(rig, 64, 64, EMU_VOLATILE, NULL), 64);
		CHECK_EQ(emu_access_ages(rig->r, ALL_BUT_STABLE, ages), 0);
		CHECK_EQ(ages[0], 128);
		CHECK_EQ(emu_steal_some(rig->r, 128, ALL_BUT_STABLE, policy, 3), 128);
		/* the first half is dirty, and there is no store */
		CHECK_EQ(emu_access_harvest(rig->r, 512, 512, EMU_DIRTIED, bits), 0);
		CHECK_EQ(say(rig, 256, 768, EMU_POTENTIAL, NULL), 768);
		CHECK_EQ(emu_steal_some(rig->r, 500, ALL_BUT_STABLE, policy, 3), 500);
		CHECK_EQ(say(rig, 256, 256, EMU_STABLE, NULL), 256); /* not one of them was taken */
		say(rig, 0, FRAMES, EMU_UNUSED, NULL);
		say(rig, 0, FRAMES, EMU_STABLE, NULL);
		CHECK(emu_discard(rig->r, AT(0, FRAMES)) >= 0);
		rig_check_books(rig);
	}
	rig_close(rig);
	return 0;
}

/* What is volatile isn't anybody else's to take: a discard, a sweep of what is aside, an eviction leave it. */
static int only_a_steal_takes_what_is_volatile(void)
{
	struct rig *rig = rig_open_nth(0, FRAMES, 0);
	uint64_t bad;

	if (!rig)
		return SKIPPED;
	CHECK_EQ(emu_usage_track(rig->r), 0);
	fill(rig, 0, 64);
	CHECK_EQ(say(rig, 0, 32, EMU_VOLATILE, NULL), 32);
	CHECK_EQ(emu_discard(rig->r, AT(0, 64)), 32);
	CHECK_EQ(emu_set_aside(rig->r, AT(0, 32), 5), 32);
	CHECK_EQ(emu_aside_drop(rig->r, AT(0, 32), 5, false), 0);
	CHECK_EQ(say(rig, 0, 16, EMU_STABLE, NULL), 16);
	CHECK_EQ(emu_aside_drop(rig->r, AT(0, 32), 5, true), 16); /* made stable: kept; the others may be evicted */
	CHECK_EQ(rig_run(rig, EMU_VERIFY, 0, 16, SEED, 1, &bad), 0);
	CHECK_EQ(bad, 0);
	CHECK_EQ(rig_run(rig, EMU_TOUCH_READ, 16, 1, 0, 1, &bad), -ENODATA);
	rig_check_books(rig);
	rig_close(rig);
	return 0;
}

/* ---- races made on purpose */

struct race {
	struct rig *rig;
	_Atomic int stop;
	_Atomic uint64_t gone, held, told;
};
struct runner {
	struct race *race;
	int id;
};
enum { RUNNERS = 3, OWN = FRAMES / RUNNERS };

static uint64_t next(uint64_t *rng)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return *rng;
}

/* A page that is right, or one that is told to be gone: never a wrong byte, nor a zero one. */
static void *guest(void *arg)
{
	struct runner *me = arg;
	struct race *race = me->race;
	struct rig *rig = race->rig;
	uint64_t rng = 77 + (uint64_t)me->id, round[OWN] = { 0 }, want[512], got[512];
	struct emu_progress p;

	for (uint64_t i = 0; !atomic_load_explicit(&race->stop, memory_order_relaxed); i++) {
		const uint64_t k = next(&rng) % OWN, gfn = (uint64_t)me->id * OWN + k;
		const int how = (int)(next(&rng) % 8);
		size_t lost = 0;
		int err = 0;

		if (round[k] && how < 3) { /* between lookup and use: it is read as it is, and the fault repairs it */
			err = emu_guest_read(rig->r, gfn << EMU_FRAME_SHIFT, got, sizeof(got), &p);
			CHECK(!err || err == -ENODATA);
			atomic_fetch_add(&race->told, err != 0);
		}
		if (!round[k] || err || how >= 3) {
			say(rig, gfn, 1, EMU_STABLE, &lost);
			atomic_fetch_add(&race->gone, lost);
		}
		if (round[k] && !lost && !err) {
			if (how >= 3) /* between make_stable and read */
				CHECK_EQ(emu_guest_read(rig->r, gfn << EMU_FRAME_SHIFT, got, sizeof(got), &p), 0);
			emu_content_words(round[k], gfn, want);
			CHECK_EQ(memcmp(got, want, sizeof(got)), 0);
			atomic_fetch_add(&race->held, 1);
		}
		if (!round[k] || lost || err) { /* from the disk again */
			round[k] = 1 + next(&rng) % 1000;
			emu_content_words(round[k], gfn, want);
			CHECK_EQ(emu_guest_write(rig->r, gfn << EMU_FRAME_SHIFT, want, sizeof(want), &p), 0);
		} else if (how == 7) { /* a page that is written: stable before, and dirty */
			CHECK_EQ(rig_run(rig, EMU_FILL, gfn, 1, round[k], 1, NULL), 0);
			say(rig, gfn, 1, EMU_POTENTIAL, NULL);
			continue;
		} else if (how == 6) {
			say(rig, gfn, 1, EMU_UNUSED, NULL);
			round[k] = 0;
			continue;
		}
		say(rig, gfn, 1, EMU_VOLATILE, NULL);
	}
	return NULL;
}

static void *host(void *arg)
{
	struct race *race = arg;
	struct emu_region *r = race->rig->r;
	uint64_t rng = 3, ages[256];

	while (!atomic_load(&race->stop)) {
		const struct emu_range range = { next(&rng) % (FRAMES - 64), 1 + next(&rng) % 64, 0 };

		switch (next(&rng) % 6) {
		case 0: case 1: case 2:
			CHECK(emu_steal_some(r, 1 + next(&rng) % 40, ALL_BUT_STABLE, (int)(next(&rng) % 3), next(&rng)) >= 0);
			break;
		case 3:
			CHECK(emu_swap_out(r, &range, 1) >= 0);
			break;
		case 4:
			CHECK(emu_set_aside(r, &range, 1, 9) >= 0);
			break;
		default:
			CHECK_EQ(emu_access_scan(r, ages), 0);
		}
	}
	return NULL;
}

static int race(int nth)
{
	const char *seconds = getenv("STORM");
	const double len = seconds ? atof(seconds) : 0.5;
	pthread_t threads[RUNNERS + 1];
	struct runner runners[RUNNERS];
	int fd;
	struct race race = { .rig = open_nth(nth, &fd) };

	if (!race.rig)
		return SKIPPED;
	for (int i = 0; i < RUNNERS; i++) {
		runners[i] = (struct runner){ &race, i };
		CHECK_EQ(pthread_create(&threads[i], NULL, guest, &runners[i]), 0);
	}
	CHECK_EQ(pthread_create(&threads[RUNNERS], NULL, host, &race), 0);
	usleep((useconds_t)(len * 1e6));
	for (int i = 0; i < 200 && !(atomic_load(&race.held) && atomic_load(&race.gone) && atomic_load(&race.told)); i++)
		usleep(100000); /* a machine that is busy with others */
	atomic_store(&race.stop, 1);
	for (int i = 0; i <= RUNNERS; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	fprintf(stderr, "  %llu reads of pages that were held; %llu found gone when made stable, %llu by a discard fault\n",
	        (unsigned long long)atomic_load(&race.held), (unsigned long long)atomic_load(&race.gone),
	        (unsigned long long)atomic_load(&race.told));
	CHECK(atomic_load(&race.held) && atomic_load(&race.gone) && atomic_load(&race.told));
	CHECK_EQ(rig_stat(race.rig, "swap_corrupt"), 0);
	rig_check_books(race.rig);
	rig_close(race.rig);
	close(fd);
	return 0;
}

static int race_inline(void)
{
	return race(0);
}
static int race_thread(void)
{
	return race(1);
}
static int race_wp(void)
{
	return race(2);
}

const struct test usage_tests[] = {
	{ "usage: every pair and every operation", every_pair_and_every_operation },
	{ "usage: pairs that don't exist", pairs_that_dont_exist },
	{ "usage: one frame a call", one_by_one },
	{ "usage: batches", batches },
	{ "usage: the order of stealing", the_order },
	{ "usage: what can be stolen", what_can_be_stolen },
	{ "usage: only a steal takes what is volatile", only_a_steal_takes_what_is_volatile },
	{ "usage: from the store to nothing", from_the_store_to_nothing },
	{ "usage: race, move, inline", race_inline },
	{ "usage: race, move, thread", race_thread },
	{ "usage: race, wp, inline", race_wp },
	{ NULL, NULL },
};
