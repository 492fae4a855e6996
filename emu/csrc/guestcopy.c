/* SPDX-License-Identifier: MIT */
/*
 * guestcopy.c - the only file whose code touches guest memory.
 *
 * Any such touch may fault.  With the inline service the handler runs right here, in the middle of a load or a store;
 * with the thread service the thread sleeps; and the frame may turn out LOST.  So each section that touches is armed: a
 * guard on the stack, which the handler finds through a thread-local pointer, says where to go when a frame can't be
 * served (arming costs 4 ns; savemask 0 makes it free of system calls).  Calls return what they had finished and the
 * frame that stopped them, and can be resumed there.  A section holds nothing that would outlive the jump: no BUSY
 * frame, no lock, no reference.
 *
 * The compiler knows nothing of the jump.  So progress lives in the caller's struct, not in locals of the function
 * that called sigsetjmp, and a compiler barrier follows each frame; what is not in that struct is dead after a jump.
 *
 * The books.  Two things happen without a fault that our books must learn of, and the access itself tells them:
 *
 *   - a write to a frame that has the shared zero page mapped becomes resident by copy-on-write: ZEROMAP -> RESIDENT
 *     *before* the store.  If a discard comes between, it changes the byte, and the store then faults like any other.
 *   - without userfaultfd (EMU_SERVICE_OFF) nothing faults to us at all: ZERO -> RESIDENT or ZEROMAP before the
 *     access.
 *
 * After the access the byte is read once more: if a discard came between note and access, the frame may be present and
 * marked ZERO, so the access is made again (a touch, a fill, a read or a copy of the same bytes can be).  With that the
 * books are exact under any interleaving with reclaim.
 */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>

#define barrier() atomic_signal_fence(memory_order_seq_cst)

#define WORDS (EMU_FRAME_SIZE / sizeof(uint64_t))

static uint64_t mix(uint64_t x) /* splitmix64's finaliser (S. Vigna) */
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* Word i of a filled frame is first + i * STEP: no two frames agree, and a torn one differs from both. */
#define STEP 0x9e3779b97f4a7c15u
static uint64_t first_word(uint64_t seed, uint64_t key)
{
	return mix(mix(seed + STEP) ^ (key * 0xd1342543de82ef95u + 1));
}

void emu_content_words(uint64_t seed, uint64_t key, uint64_t *ret)
{
	uint64_t word = first_word(seed, key);

	for (size_t i = 0; i < WORDS; i++, word += STEP)
		ret[i] = word;
}

static bool writes(int op)
{
	return op == EMU_TOUCH_WRITE || op == EMU_SET || op == EMU_FILL;
}

/* Before an access: returns 0, or an error if the frame is known to be lost. */
static int note(struct emu_region *r, uint64_t gfn, bool write)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);
		uint8_t to;

		switch (state) {
		case EMU_LOST:
			emu_stat_add(r, EMU_STAT_pgfault_lost, 1);
			return -EHWPOISON;
		case EMU_ZEROMAP:
			if (!write)
				return 0;
			to = EMU_RESIDENT;
			break;
		case EMU_ZERO:
			if (r->uffd >= 0)
				return 0;
			to = write ? EMU_RESIDENT : EMU_ZEROMAP;
			emu_stat_add(r, EMU_STAT_pgfault, 1);
			emu_stat_add(r, write ? EMU_STAT_pgfault_write : EMU_STAT_pgfault_read, 1);
			break;
		case EMU_BUSY:
			if (r->uffd >= 0)
				return 0; /* if it matters, the access faults and waits */
			emu_state_wait(r, gfn);
			continue;
		default:
			return 0;
		}
		if (emu_state_try(r, gfn, state, to)) {
			emu_state_moved(r, state, to, 1);
			return 0;
		}
	}
}

/* After an access: true if the books still tell what the access did. */
static bool noted(struct emu_region *r, uint64_t gfn, bool write)
{
	for (;;) {
		uint8_t state = emu_state_load(r, gfn);

		/*
		 * BUSY matters to a write: a reader's fault may have mapped the zero page and not published it yet when
		 * our store replaced it; then ZEROMAP comes out, and the note has to be made again.
		 */
		if (state == EMU_BUSY && (write || r->uffd < 0)) {
			emu_state_wait(r, gfn);
			continue;
		}
		if (write && state == EMU_ZEROMAP)
			return false;
		return r->uffd >= 0 || (state != EMU_ZERO && state != EMU_LOST);
	}
}

EMU_GUEST_BYTES static bool access_frame(uint8_t *frame, int op, uint64_t arg, uint64_t key)
{
	uint64_t *words = (uint64_t *)frame;
	uint64_t word, differ = 0;

	switch (op) {
	case EMU_TOUCH_READ:
		(void)*(volatile uint8_t *)frame;
		break;
	case EMU_TOUCH_WRITE:
		__atomic_fetch_or(frame, 0, __ATOMIC_RELAXED);
		break;
	case EMU_SET:
		memset(frame, (int)arg, EMU_FRAME_SIZE);
		break;
	case EMU_FILL:
		word = first_word(arg, key);
		for (size_t i = 0; i < WORDS; i++)
			words[i] = word + i * STEP;
		break;
	case EMU_VERIFY:
		word = first_word(arg, key);
		for (size_t i = 0; i < WORDS; i++)
			differ |= words[i] ^ (word + i * STEP);
		break;
	default:
		break;
	}
	return !differ;
}

static void walk(struct emu_walk *w)
{
	struct emu_region *r = w->r;
	const bool write = writes(w->op);
	uint64_t skip = w->skip;

	for (size_t i = 0; i < w->n && w->left; i++) {
		const struct emu_range *range = &w->ranges[i];

		if (skip >= range->count) {
			skip -= range->count;
			continue;
		}
		for (uint64_t k = skip; k < range->count && w->left; k++) {
			uint64_t gfn = range->gfn + k, t0 = 0;
			bool good;
			int err;

			if (w->hist)
				t0 = emu_now_ns();
			do {
				err = note(r, gfn, write);
				if (err) {
					w->guard.err = err;
					w->guard.gfn = gfn;
					return;
				}
				barrier();
				good = access_frame(emu_frame(r, gfn), w->op, w->arg, range->key + k);
				barrier();
			} while (!noted(r, gfn, write));
			if (w->hist)
				emu_hist_add(w->hist, emu_now_ns() - t0);
			if (!good) {
				if (w->bad_count < w->bad_cap)
					w->bad[w->bad_count] = gfn;
				w->bad_count++;
			}
			w->done++;
			w->left--;
			barrier();
		}
		skip = 0;
	}
}

/* Returns 0 or -errno; w->done frames are finished, w->guard.gfn is where it stopped. */
int emu_guest_walk(struct emu_walk *w)
{
	w->guard.region = w->r;
	w->guard.err = 0;
	w->done = 0;
	if (!sigsetjmp(w->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &w->guard, memory_order_relaxed);
		barrier();
		walk(w);
		barrier();
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	return w->guard.err;
}

/* One copy between guest bytes and a buffer, armed; lies inside one frame or follows frames in a row. */
struct copy {
	struct emu_guard guard;
	struct emu_region *r;
	uint64_t gpa;
	uint8_t *buf;
	uint64_t left;
	bool write;
	bool install; /* missing whole frames may be installed from the buffer */
	uint64_t done;
};

EMU_GUEST_BYTES static void copy_bytes(uint8_t *to, const uint8_t *from, size_t n)
{
#if defined(__SANITIZE_THREAD__)
	for (size_t i = 0; i < n; i++) /* memcpy's interceptor would check guest bytes */
		((volatile uint8_t *)to)[i] = ((const volatile uint8_t *)from)[i];
#else
	if (to == from) /* a copy onto itself stores nothing, and the books say that it did */
		__atomic_fetch_or(to, 0, __ATOMIC_RELAXED);
	memmove(to, from, n); /* the buffer may be guest memory, too */
#endif
}

static void copy(struct copy *c)
{
	struct emu_region *r = c->r;

	while (c->left) {
		uint64_t gfn = c->gpa >> EMU_FRAME_SHIFT, off = c->gpa % EMU_FRAME_SIZE;
		uint64_t n = EMU_FRAME_SIZE - off < c->left ? EMU_FRAME_SIZE - off : c->left;
		uint8_t *at = emu_frame(r, gfn) + off;
		int64_t installed = 0;
		int err;

		if (c->install && n == EMU_FRAME_SIZE && emu_state_load(r, gfn) == EMU_ZERO)
			installed = emu_fault_install(r, gfn, c->left >> EMU_FRAME_SHIFT, c->buf);
		if (installed > 0) {
			n = (uint64_t)installed << EMU_FRAME_SHIFT;
		} else if (installed < 0) {
			c->guard.err = (int)installed;
			c->guard.gfn = gfn;
			return;
		} else {
			do {
				err = note(r, gfn, c->write);
				if (err) {
					c->guard.err = err;
					c->guard.gfn = gfn;
					return;
				}
				barrier();
				if (c->write)
					copy_bytes(at, c->buf, n);
				else
					copy_bytes(c->buf, at, n);
				barrier();
			} while (!noted(r, gfn, c->write));
		}
		c->gpa += n;
		c->buf += n;
		c->left -= n;
		c->done += n;
		barrier();
	}
}

static int copy_armed(struct copy *c)
{
	c->guard.region = c->r;
	c->guard.err = 0;
	if (!sigsetjmp(c->guard.env, EMU_SAVEMASK)) {
		atomic_store_explicit(&emu_thread.guard, &c->guard, memory_order_relaxed);
		barrier();
		copy(c);
		barrier();
	}
	atomic_store_explicit(&emu_thread.guard, NULL, memory_order_relaxed);
	return c->guard.err;
}

static int copy_range(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, bool write, struct emu_progress *ret)
{
	struct copy c = { .r = r, .gpa = gpa, .buf = buf, .left = n, .write = write };
	int err = atomic_load(&r->dead);
	bool was_blocked;

	/*
	 * UFFDIO_COPY reads its source in the kernel while the destination is BUSY.  A source that is guest memory could
	 * fault there, and with the thread service wait for a fault that waits for that BUSY: such bytes are copied here.
	 */
	c.install = write && r->uffd >= 0 && !emu_registry_overlaps((uintptr_t)buf, n);
	*ret = (struct emu_progress){ 0 };
	if (gpa > r->frames << EMU_FRAME_SHIFT || n > (r->frames << EMU_FRAME_SHIFT) - gpa)
		return -ERANGE;
	if (err)
		return -EOWNERDEAD;
	err = emu_region_enter(r);
	if (err)
		return err;
	emu_sigbus_ensure(r);
	was_blocked = emu_sigbus_unblock();
	err = copy_armed(&c);
	if (was_blocked)
		emu_sigbus_block();
	emu_region_leave(r);
	ret->done = c.done;
	ret->bad_gfn = err ? c.guard.gfn : 0;
	return err;
}

int emu_guest_read(struct emu_region *r, uint64_t gpa, void *buf, uint64_t n, struct emu_progress *ret)
{
	return copy_range(r, gpa, buf, n, false, ret);
}

int emu_guest_write(struct emu_region *r, uint64_t gpa, const void *buf, uint64_t n, struct emu_progress *ret)
{
	return copy_range(r, gpa, (void *)(uintptr_t)buf, n, true, ret);
}

int emu_guest_install(struct emu_region *r, const uint64_t *gfns, size_t n, const void *buf,
                      struct emu_progress *ret)
{
	*ret = (struct emu_progress){ 0 };
	for (size_t i = 0; i < n; i++)
		if (!emu_range_ok(r, gfns[i], 1))
			return -ERANGE;
	for (size_t i = 0, run; i < n; i += run) {
		struct emu_progress part;
		int err;

		for (run = 1; i + run < n && gfns[i + run] == gfns[i] + run; run++)
			;
		err = copy_range(r, gfns[i] << EMU_FRAME_SHIFT, (uint8_t *)(uintptr_t)buf + (i << EMU_FRAME_SHIFT),
		                 (uint64_t)run << EMU_FRAME_SHIFT, true, &part);
		ret->done += part.done >> EMU_FRAME_SHIFT;
		if (err) {
			ret->bad_gfn = part.bad_gfn;
			return err;
		}
	}
	return 0;
}
