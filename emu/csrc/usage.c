/* SPDX-License-Identifier: MIT */
/*
 * usage.c - what the guest says of its frames, and when that may be said (CMM2, "guest page hinting").
 *
 * After M. Schwidefsky, H. Franke, R. Mansell, H. Raj, D. Osisek, J. Choi: Collaborative Memory Management in Hosted Linux
 * Environments (OLS 2006), as far as the patches of 2006 to 2009 tell it.  A frame is in one of eight pairs of a guest's
 * state (Stable, Unused, Volatile, Potentially volatile) and a host's (r: in memory, p: in the store, z: nothing):
 *
 *                 Sr  Sp  Sz   Ur  Uz   Vr  Vz   Pr
 *
 *   r   RESIDENT, ZEROMAP, LAZY, and ASIDE, which is memory all the same
 *   p   PRESERVED
 *   z   ZERO; or DISCARDED, if volatile: the difference between a page of zeros and one that is gone
 *
 * What the guest asks for:
 *
 *   asked     Sr  Sp  Sz   Ur  Uz   Vr  Vz   Pr
 *   stable    -   -   -    Sr  Sz   Sr  no*  Sr      * and it is told: what the frame held is gone.  It stays Vz, an access
 *                                                      a discard fault, until it is called unused: out of cache and page tables
 *   unused    Ur  Uz  Uz   -   -    Ur  Uz   Ur      Sp: what was stored is thrown away
 *   volatile  Vr  Vz  Vz   Vr  Vz   -   -    Vr
 *   potential Pr  no  Vz   Pr  Vz   Pr  -    -       no: the store's page may be the only copy, so it stays stable
 *
 * What the host does: Sr -> Sp (swapout.c), Sp -> Sr and Sz -> Sr (a fault), Ur -> Uz, Vr -> Vz, Pr -> Vz if it is clean, and
 * Pr -> Sp if not (steal.c).  An access to Vz is refused, and told as a discard fault (ENODATA).
 *
 * Usage and state share the frame's byte, so each of these is one compare-and-swap, and no pair but the eight is ever seen.
 * Where more than the byte must change (z has a marker where the service is a thread, p has a slot in the store) the frame
 * goes through BUSY, all of it in one: nobody sees Sz on the way from Sp to Vz.  Who holds a frame BUSY leaves it in a legal pair;
 * who wants to say something of it waits (not if it is what the frame's usage is already).  So "made stable" means
 * that the host has either taken it before, and the guest is told, or will not: that is the whole of the protocol.
 *
 * The bytes are the guest's to write: they aren't a boundary against a guest that lies.  One that calls volatile what it
 * needs loses it, and nobody else does: the host only ever takes frames of that guest for it.
 */
#include "core.h"

#include <stdlib.h>

#define IN(s) (1u << EMU_##s)
#define IN_MEMORY (IN(ZEROMAP) | IN(RESIDENT) | IN(LAZY) | IN(ASIDE))

struct emu_usages {
	_Atomic int64_t moved[EMU_NR_CAUSES][EMU_NR_USAGES][EMU_NR_USAGES];
	_Atomic int64_t refused[EMU_NR_CAUSES][EMU_NR_USAGES]; /* by what was asked for */
	_Atomic int64_t gone[EMU_NR_CAUSES];
};

static uint8_t byte_of(uint8_t usage, uint8_t state)
{
	return (uint8_t)(usage << EMU_USAGE_SHIFT) | state;
}

/* The eight pairs, written as states of the core's. */
bool emu_usage_legal(uint8_t usage, uint8_t state)
{
	static const uint32_t legal[EMU_NR_USAGES] = {
		[EMU_STABLE] = IN_MEMORY | IN(PRESERVED) | IN(ZERO) | IN(LOST),
		[EMU_UNUSED] = IN_MEMORY | IN(ZERO),
		[EMU_VOLATILE] = IN_MEMORY | IN(DISCARDED),
		[EMU_POTENTIAL] = IN_MEMORY,
	};

	return usage < EMU_NR_USAGES && legal[usage] >> state & 1;
}

/* Frame gfn, of state ZERO, becomes Vz. False if it has changed. */
static bool lose(struct emu_region *r, uint64_t gfn)
{
	if (!emu_state_try(r, gfn, EMU_ZERO, EMU_BUSY))
		return false;
	emu_lose(r, gfn, 1);
	emu_state_publish(r, gfn, EMU_DISCARDED);
	emu_state_moved(r, EMU_ZERO, EMU_DISCARDED, 1);
	emu_state_wake(r, gfn, 1);
	return true;
}

/* What no more than the byte must change for: in memory, where every usage is legal, or nothing there and nothing lost. */
static bool plain(uint8_t was, uint8_t state, uint8_t usage)
{
	return IN_MEMORY >> state & 1 || (state == EMU_ZERO && was <= EMU_UNUSED && usage <= EMU_UNUSED);
}

/* The kernel may refuse what it takes (a locked page): who asks isn't kept for that. */
#define TRIES 3

static enum emu_said say_slowly(struct emu_region *r, uint64_t gfn, uint8_t usage, struct emu_usage_tally *t)
{
	for (int tries = 0;;) {
		uint8_t byte = emu_byte_load(r, gfn);
		const uint8_t state = emu_byte_state(byte), was = emu_byte_usage(byte);

		if (state == EMU_BUSY) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (!emu_usage_legal(was, state) || tries == TRIES) {
			t->refused[usage]++;
			return EMU_SAID_REFUSED;
		}
		if (was == usage)
			return EMU_SAID_ALREADY;
		if (plain(was, state, usage)) {
			if (!atomic_compare_exchange_weak_explicit(&r->state[gfn], &byte, byte_of(usage, state), memory_order_acq_rel,
			                                           memory_order_relaxed))
				continue;
		} else if (state == EMU_ZERO) {
			if (!lose(r, gfn))
				continue;
			usage = EMU_VOLATILE; /* asking P gives Vz */
		} else if (state == EMU_DISCARDED && usage == EMU_STABLE) {
			t->gone++;
			return EMU_SAID_GONE;
		} else if (state == EMU_DISCARDED && usage == EMU_UNUSED) {
			if (!emu_fault_forget(r, gfn, usage)) {
				tries++;
				continue;
			}
		} else if (state == EMU_DISCARDED) { /* asking P gives Vz */
			return EMU_SAID_ALREADY;
		} else if (state == EMU_PRESERVED && usage != EMU_POTENTIAL) {
			if (!emu_swap_forget_as(r, gfn, usage))
				continue;
		} else { /* Sp to P; LOST, of which nothing can be said */
			t->refused[usage]++;
			return EMU_SAID_REFUSED;
		}
		t->moved[was][usage]++;
		return EMU_SAID;
	}
}

/* Nearly every time it is one compare-and-swap: the rest is apart, so that this is short. */
static inline enum emu_said say(struct emu_region *r, uint64_t gfn, uint8_t usage, struct emu_usage_tally *t)
{
	uint8_t byte = emu_byte_load(r, gfn);
	const uint8_t state = emu_byte_state(byte), was = emu_byte_usage(byte);

	if (!plain(was, state, usage) || was == usage ||
	    !atomic_compare_exchange_strong_explicit(&r->state[gfn], &byte, byte_of(usage, state), memory_order_acq_rel,
	                                             memory_order_relaxed))
		return say_slowly(r, gfn, usage, t);
	t->moved[was][usage]++;
	return EMU_SAID;
}

enum emu_said emu_usage_say(struct emu_region *r, uint64_t gfn, int usage, struct emu_usage_tally *t)
{
	return say(r, gfn, (uint8_t)usage, t);
}

/* Eight frames of one kind in one word and one compare-and-swap, if they are, and need no more than that. gfn: of 8. */
bool emu_usage_say8(struct emu_region *r, uint64_t gfn, uint8_t usage, struct emu_usage_tally *t)
{
#if defined(__SANITIZE_THREAD__) /* which keeps its clocks by address: state.c */
	(void)r, (void)gfn, (void)usage, (void)t;
	return false;
#else
	uint64_t *const at = (uint64_t *)(void *)(r->state + gfn);
	uint64_t word = __atomic_load_n(at, __ATOMIC_RELAXED);
	const uint8_t byte = (uint8_t)word, state = emu_byte_state(byte);

	if (word != byte * 0x0101010101010101u)
		return false;
	if (emu_byte_usage(byte) == usage)
		return true;
	if (!(IN_MEMORY >> state & 1 || (state == EMU_ZERO && usage <= EMU_UNUSED)))
		return false;
	if (!__atomic_compare_exchange_n(at, &word, byte_of(usage, state) * 0x0101010101010101u, false, __ATOMIC_ACQ_REL,
	                                 __ATOMIC_RELAXED))
		return false;
	t->moved[emu_byte_usage(byte)][usage] += 8;
	return true;
#endif
}

/* The counts of a call join the region's. */
void emu_usage_count(struct emu_region *r, int cause, const struct emu_usage_tally *t)
{
	struct emu_usages *u = atomic_load_explicit(&r->usages, memory_order_acquire);

	for (int from = 0; from < EMU_NR_USAGES; from++)
		for (int to = 0; to < EMU_NR_USAGES; to++)
			if (t->moved[from][to])
				atomic_fetch_add_explicit(&u->moved[cause][from][to], t->moved[from][to], memory_order_relaxed);
	for (int to = 0; to < EMU_NR_USAGES; to++)
		if (t->refused[to])
			atomic_fetch_add_explicit(&u->refused[cause][to], t->refused[to], memory_order_relaxed);
	if (t->gone)
		atomic_fetch_add_explicit(&u->gone[cause], t->gone, memory_order_relaxed);
}

/* A call that says something: 0, or -errno. Then emu_region_leave(). */
int emu_usage_enter(struct emu_region *r)
{
	int err = emu_region_enter(r);

	if (!err && !atomic_load_explicit(&r->usages, memory_order_acquire)) {
		emu_region_leave(r);
		err = -EOPNOTSUPP;
	}
	return err;
}

/* Potentially volatile is worth nothing where nobody can say whether it is dirty. */
static bool sayable(const struct emu_region *r, int usage, int cause)
{
	return usage >= 0 && usage < EMU_NR_USAGES && cause >= 0 && cause < EMU_NR_CAUSES &&
	       (usage != EMU_POTENTIAL || atomic_load(&r->access));
}

/* Where a batch puts the frames that were gone. */
struct gone {
	uint64_t *gfn;
	size_t cap, n;
};

static void say_of(struct emu_region *r, uint64_t gfn, int usage, struct emu_usage_tally *t, struct gone *gone)
{
	if (say(r, gfn, (uint8_t)usage, t) == EMU_SAID_GONE && gone->n++ < gone->cap)
		gone->gfn[gone->n - 1] = gfn;
}

static int64_t end(struct emu_region *r, int cause, const struct emu_usage_tally *t)
{
	emu_usage_count(r, cause, t);
	emu_region_leave(r);
	return emu_usage_changed(t);
}

int64_t emu_usage_set(struct emu_region *r, const struct emu_range *ranges, size_t n, int usage, int cause, uint64_t *gone,
                      size_t cap, size_t *nr_gone)
{
	struct emu_usage_tally t = { 0 };
	struct gone into = { gone, cap, 0 };
	int err = sayable(r, usage, cause) ? emu_ranges_check(r, ranges, n) : -EINVAL;

	*nr_gone = 0;
	if (!err)
		err = emu_usage_enter(r);
	if (err)
		return err;
	for (size_t i = 0; i < n; i++)
		for (uint64_t gfn = ranges[i].gfn, last = gfn + ranges[i].count; gfn < last;) {
			if (gfn % 8 == 0 && last - gfn >= 8 && emu_usage_say8(r, gfn, (uint8_t)usage, &t))
				gfn += 8;
			else
				say_of(r, gfn++, usage, &t, &into);
		}
	*nr_gone = into.n;
	return end(r, cause, &t);
}

int64_t emu_usage_set_frames(struct emu_region *r, const uint32_t *gfns, size_t n, int usage, int cause, uint64_t *gone,
                             size_t cap, size_t *nr_gone)
{
	struct emu_usage_tally t = { 0 };
	struct gone into = { gone, cap, 0 };
	int err = sayable(r, usage, cause) ? 0 : -EINVAL;

	*nr_gone = 0;
	for (size_t i = 0; i < n && !err; i++)
		err = gfns[i] < r->frames ? 0 : -ERANGE;
	if (!err)
		err = emu_usage_enter(r);
	if (err)
		return err;
	for (size_t i = 0; i < n; i++)
		say_of(r, gfns[i], usage, &t, &into);
	*nr_gone = into.n;
	return end(r, cause, &t);
}

int emu_usage_one(const struct emu_sayer *s)
{
	const uint64_t gfn = *s->gfn;
	struct emu_usage_tally t = { 0 };
	int said = !sayable(s->region, s->usage, s->cause) ? -EINVAL : gfn < s->region->frames ? emu_usage_enter(s->region) : -ERANGE;

	if (said)
		return said;
	said = (int)say(s->region, gfn, (uint8_t)s->usage, &t);
	end(s->region, s->cause, &t);
	return said;
}

/* Whether anything may be said from now on; all frames are stable before. */
int emu_usage_track(struct emu_region *r)
{
	int err = emu_region_enter(r);

	if (err)
		return err;
	pthread_mutex_lock(&r->setup);
	if (!emu_can_lose(r)) {
		err = -EOPNOTSUPP; /* a page that is gone couldn't be told from one of zeros */
	} else if (!atomic_load(&r->usages)) {
		struct emu_usages *u = calloc(1, sizeof(*u));

		err = u ? 0 : -ENOMEM;
		atomic_store_explicit(&r->usages, u, memory_order_release);
	}
	if (!err)
		atomic_store(&r->telling, true);
	pthread_mutex_unlock(&r->setup);
	emu_region_leave(r);
	return err;
}

int emu_usage_tracked(struct emu_region *r)
{
	return atomic_load(&r->telling);
}

void emu_usage_free(struct emu_region *r)
{
	free(atomic_exchange(&r->usages, NULL));
}

int emu_usage_counts(struct emu_region *r, struct emu_usage_counts *ret)
{
	struct emu_usages *u;
	int err = emu_usage_enter(r);

	if (err)
		return err;
	u = atomic_load_explicit(&r->usages, memory_order_acquire);
	for (int cause = 0; cause < EMU_NR_CAUSES; cause++) {
		for (int from = 0; from < EMU_NR_USAGES; from++)
			for (int to = 0; to < EMU_NR_USAGES; to++)
				ret->moved[cause][from][to] = atomic_load_explicit(&u->moved[cause][from][to], memory_order_relaxed);
		for (int to = 0; to < EMU_NR_USAGES; to++)
			ret->refused[cause][to] = atomic_load_explicit(&u->refused[cause][to], memory_order_relaxed);
		ret->gone[cause] = atomic_load_explicit(&u->gone[cause], memory_order_relaxed);
	}
	emu_region_leave(r);
	return 0;
}

/* Frames by usage and state, all of them: a walk over the bytes. */
int emu_usage_matrix(struct emu_region *r, int64_t *ret)
{
	int err = emu_usage_enter(r);

	if (err)
		return err;
	for (int i = 0; i < EMU_NR_USAGES * EMU_NR_STATES; i++)
		ret[i] = 0;
	for (uint64_t gfn = 0; gfn < r->frames;) {
		const uint8_t byte = emu_byte_load(r, gfn);
		const bool eight = gfn % 8 == 0 && r->frames - gfn >= 8 && emu_byte_alike8(r, gfn, byte);

		ret[emu_byte_usage(byte) * EMU_NR_STATES + emu_byte_state(byte)] += eight ? 8 : 1;
		gfn += eight ? 8 : 1;
	}
	emu_region_leave(r);
	return 0;
}

int emu_usage_copy(struct emu_region *r, uint64_t gfn, uint64_t count, uint8_t *ret)
{
	int err = emu_range_ok(r, gfn, count) ? emu_region_enter(r) : -ERANGE;

	if (err)
		return err;
	for (uint64_t i = 0; i < count; i++)
		ret[i] = emu_byte_usage(emu_byte_load(r, gfn + i));
	emu_region_leave(r);
	return 0;
}
