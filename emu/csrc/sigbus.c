/* SPDX-License-Identifier: MIT */
/*
 * sigbus.c - the inline fault service, and how it shares SIGBUS with everybody else.
 *
 * With UFFD_FEATURE_SIGBUS the kernel raises SIGBUS in the thread that touched a missing frame.  Our handler finds the
 * region, resolves the fault and returns; the access is then made again.  No other thread, no wake-up, no lock: it
 * works for a thread that holds Python's GIL, and it scales as the vCPUs do.
 *
 * A signal has one handler in a process, so we share:
 *
 *  - A SIGBUS that isn't a guest's goes to the handlers that were there before, newest first.  `formers` is that
 *    chain; the last one is what we found at the very first installation.
 *  - A handler installed over ours later (faulthandler.enable() in a pytest plugin) would take the next guest fault for
 *    a crash.  So every call that touches guest memory checks, with one sigaction(2), that the signal is still ours,
 *    and if it isn't, puts the newcomer on top of `formers` and itself back in front.
 *  - A handler may also come while a call is under way in another thread, and if it just returns (as Python's
 *    signal.signal() makes one do), the call would fault for ever.  So while a region is open a thread of ours looks,
 *    ten times a second, whether the signal is still ours.
 *  - A handler on the chain may have been disabled since and simply return (faulthandler does).  If it left the context
 *    as it was and the address still can't be read, it hasn't helped, and the next older one is asked; at the end the
 *    default kills.  A handler that repairs, changes the context or jumps out is never asked twice for one fault.
 *  - faulthandler's handler re-raises: it restores what it replaced and calls raise().  Two cases reach us as a signal
 *    with si_code <= 0.  (1) We called it ourselves for a foreign fault: `chaining` is set, the next older one is
 *    asked.  (2) It sat on top of us and took a guest's fault from a raw access (no call of ours came between to put
 *    us back): the fault is still pending, and returning is right, since the access comes again and then reaches
 *    us.  raise() tells no address, so case 2 is recognised by the alternate stack that faulthandler runs on, or by
 *    there being no older handler than the default; a second signal without a fault in between is passed on.
 *
 * A thread with SIGBUS blocked would be killed by the kernel at its first guest fault (force_sig_fault resets a blocked
 * signal to the default).  So guestcopy.c's entry points unblock it for their duration; a raw access from such a thread
 * through unsafe_view() still dies, loudly.
 *
 * Handler hygiene: everything read here is atomic or thread-local with the initial-exec model; errno is saved; no
 * SA_ONSTACK (alternate stacks are small, and belong to faulthandler); SA_NODEFER and an empty mask, so that the jump
 * out (siglongjmp with savemask 0) needs no system call to restore anything.  si_code can't tell missing from poisoned
 * (both are BUS_ADRERR): the state byte does.
 */
#define _GNU_SOURCE
#include "core.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define MAX_FORMERS 8
#define SPURIOUS_TRIES 64

/* An immutable snapshot of the chain, newest last. Snapshots are kept and reused, never freed: a handler may hold one. */
struct formers {
	struct formers *next;
	int n;
	struct sigaction action[MAX_FORMERS];
};

static _Atomic(struct formers *) formers;
static struct formers *all_formers;                         /* under lock */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* serialises installation; never taken by the handler */

static void on_sigbus(int sig, siginfo_t *si, void *context);

static bool is_ours(const struct sigaction *action)
{
	return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigbus;
}

int emu_sigbus_is_ours(void)
{
	struct sigaction now;

	return !sigaction(SIGBUS, NULL, &now) && is_ours(&now);
}

static bool is_function(const struct sigaction *action)
{
	return (action->sa_flags & SA_SIGINFO) || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN);
}

static bool same_action(const struct sigaction *a, const struct sigaction *b)
{
	return a->sa_flags == b->sa_flags && a->sa_handler == b->sa_handler;
}

/* The chain with `top` as its newest: its earlier place, if it had one, is given up. Under lock. */
static struct formers *formers_with(const struct formers *old, const struct sigaction *top)
{
	struct formers want = { .n = 0 };
	struct formers *f;

	/* A default on top says that whoever was above has taken everything down with it. */
	for (int i = 0; old && is_function(top) && i < old->n && want.n < MAX_FORMERS - 1; i++)
		if (!same_action(&old->action[i], top))
			want.action[want.n++] = old->action[i];
	want.action[want.n++] = *top;
	for (f = all_formers; f; f = f->next) {
		int i = 0;

		while (f->n == want.n && i < f->n && same_action(&f->action[i], &want.action[i]))
			i++;
		if (f->n == want.n && i == f->n)
			return f;
	}
	f = malloc(sizeof(*f));
	if (!f)
		return NULL;
	*f = want;
	f->next = all_formers;
	all_formers = f;
	return f;
}

/* Called by every entry point that touches guest memory: one system call when nothing has changed. */
void emu_sigbus_ensure(struct emu_region *r)
{
	struct sigaction now;
	struct sigaction ours = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };

	if (emu_sigbus_is_ours())
		return;
	pthread_mutex_lock(&lock);
	if (!sigaction(SIGBUS, NULL, &now) && !is_ours(&now)) {
		struct formers *f = formers_with(atomic_load(&formers), &now);

		if (f) {
			atomic_store(&formers, f); /* before the handler can need it */
			sigemptyset(&ours.sa_mask);
			sigaction(SIGBUS, &ours, NULL);
			if (r)
				emu_stat_add(r, EMU_STAT_sigbus_rechained, 1);
		}
	}
	pthread_mutex_unlock(&lock);
}

/* The last region is closed: put the newest former handler back, unless somebody sits above us. */
void emu_sigbus_release(void)
{
	struct sigaction now;
	struct formers *f;

	pthread_mutex_lock(&lock);
	f = atomic_load(&formers);
	if (f && !sigaction(SIGBUS, NULL, &now) && is_ours(&now)) {
		sigaction(SIGBUS, &f->action[f->n - 1], NULL);
		atomic_store(&formers, NULL);
	}
	pthread_mutex_unlock(&lock);
}

bool emu_sigbus_unblock(void)
{
	sigset_t bus, old;

	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	return !pthread_sigmask(SIG_UNBLOCK, &bus, &old) && sigismember(&old, SIGBUS) == 1;
}

void emu_sigbus_block(void)
{
	sigset_t bus;

	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &bus, NULL);
}

static struct {
	pthread_t thread;
	pthread_mutex_t lock; /* guards stop */
	pthread_cond_t wake;
	bool stop, running;
} watch = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void *watcher(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&watch.lock);
	while (!watch.stop) {
		struct timespec until;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += 100000000;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		pthread_cond_timedwait(&watch.wake, &watch.lock, &until);
		if (!watch.stop)
			emu_sigbus_ensure(NULL);
	}
	pthread_mutex_unlock(&watch.lock);
	return NULL;
}

/* With the first region and with the last one; the caller serialises. A watch that can't be started isn't missed. */
void emu_sigbus_watch(bool on)
{
	pthread_condattr_t monotonic;

	if (on == watch.running)
		return;
	if (!on) {
		pthread_mutex_lock(&watch.lock);
		watch.stop = true;
		pthread_cond_signal(&watch.wake);
		pthread_mutex_unlock(&watch.lock);
		pthread_join(watch.thread, NULL);
		watch.running = false;
		return;
	}
	watch.stop = false;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&watch.wake, &monotonic);
	pthread_condattr_destroy(&monotonic);
	watch.running = !emu_thread_start(&watch.thread, watcher, NULL, "emu-sigbus");
}

/* In a forked child: no region is left, nor the thread. The handler stays; all that it meets is foreign. */
void emu_sigbus_forked(void)
{
	pthread_mutex_init(&lock, NULL);
	pthread_mutex_init(&watch.lock, NULL);
	watch.running = false;
}

/* Without faulting: the kernel reads the mask before it finds that there is no such operation. */
static bool readable(uint64_t addr)
{
	return syscall(SYS_rt_sigprocmask, -1, addr & ~(uint64_t)7, NULL, 8) == 0 || errno != EFAULT;
}

static uint64_t stack_pointer(const ucontext_t *uc)
{
#if defined(__x86_64__)
	return (uint64_t)uc->uc_mcontext.gregs[REG_RSP];
#elif defined(__aarch64__)
	return uc->uc_mcontext.sp;
#else
	return (uintptr_t)uc;
#endif
}

/* The frame's ss_flags don't say so (the kernel stores those of sigaltstack(2)); the interrupted stack pointer does. */
static bool on_alternate_stack(const ucontext_t *uc)
{
	return !(uc->uc_stack.ss_flags & SS_DISABLE) &&
	       stack_pointer(uc) - (uintptr_t)uc->uc_stack.ss_sp < uc->uc_stack.ss_size;
}

static uint64_t program_counter(const ucontext_t *uc)
{
#if defined(__x86_64__)
	return (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
	return uc->uc_mcontext.pc;
#else
	(void)uc;
	return 0;
#endif
}

/* Hand the signal to handler number `depth` from the newest; past the oldest, the default: death by SIGBUS. */
static void chain(int sig, siginfo_t *si, void *context, int depth)
{
	struct formers *f = atomic_load(&formers);
	int i = f ? f->n - 1 - depth : -1;
	uint64_t pc;

	if (i < 0 || !is_function(&f->action[i])) {
		struct sigaction dfl = { .sa_handler = SIG_DFL };

		if (i >= 0 && f->action[i].sa_handler == SIG_IGN && si->si_code <= 0)
			return; /* a sent SIGBUS that the program ignores; a fault can't be ignored */
		sigemptyset(&dfl.sa_mask);
		sigaction(sig, &dfl, NULL);
		if (si->si_code <= 0)
			raise(sig);
		return; /* a fault comes again by itself, now to the default */
	}
	pc = program_counter(context);
	emu_thread.chaining = depth + 1;
	emu_thread.chain_sp = (uintptr_t)__builtin_frame_address(0);
	if (f->action[i].sa_flags & SA_SIGINFO)
		f->action[i].sa_sigaction(sig, si, context);
	else
		f->action[i].sa_handler(sig);
	emu_thread.chaining = 0;
	if (si->si_code > 0 && program_counter(context) == pc && !readable((uintptr_t)si->si_addr))
		chain(sig, si, context, depth + 1);
}

static bool is_write(const ucontext_t *context)
{
#if defined(__x86_64__)
	return context->uc_mcontext.gregs[REG_ERR] & 2; /* arch/x86 page fault error code, X86_PF_WRITE */
#else
	(void)context;
	return true; /* costs a page where a zero page would do; loses nothing */
#endif
}

/*
 * A fault on a frame that is present by our books happens when another thread's install came first, and then once.  Many
 * in a row at one address mean that its page isn't there, and fault.c finds out.
 */
static bool loops(uint64_t addr)
{
	if (emu_thread.last_addr != addr) {
		emu_thread.last_addr = addr;
		emu_thread.same_addr = 0;
	}
	return ++emu_thread.same_addr % SPURIOUS_TRIES == 0;
}

static int serve(struct emu_region *r, uint64_t addr, uint64_t gfn, const siginfo_t *si, const ucontext_t *uc)
{
	uint8_t state = emu_state_load(r, gfn);
	int err;

	if (si->si_code == BUS_MCEERR_AR || si->si_code == BUS_MCEERR_AO)
		return -EFAULT; /* the host's memory failed: nothing to install */
	if (state == EMU_RESIDENT || state == EMU_ZEROMAP) {
		emu_stat_add(r, EMU_STAT_pgfault_spurious, 1);
		return loops(addr) ? emu_fault_vanished(r, gfn, true) : 0;
	}
	emu_thread.same_addr = 0;
	/*
	 * With the thread service, only a frame with a poison marker raises a signal: LOST, DISCARDED, or one whose page
	 * couldn't be brought back when the service tried (tried again here).  If it is none of these any more, the access
	 * comes again and is then the service's.
	 */
	if (r->service == EMU_SERVICE_INLINE || state == EMU_LOST || state == EMU_DISCARDED || state == EMU_ASIDE ||
	    state == EMU_PRESERVED)
		return emu_fault_resolve(r, gfn, is_write(uc), EMU_GATE_WAIT);
	if (state == EMU_BUSY) {
		emu_state_wait(r, gfn);
		return 0;
	}
	/* ZERO or LAZY: the service had no memory for it in time, or somebody has given it back since. Once more, now. */
	emu_fault_unmark(r, gfn);
	err = emu_fault_resolve(r, gfn, is_write(uc), EMU_GATE_TRY);
	return err == -EAGAIN ? -ENOMEM : err;
}

static void on_sigbus(int sig, siginfo_t *si, void *context)
{
	const int saved_errno = errno;
	const ucontext_t *uc = context;

	if (si->si_code > 0) {
		uint64_t addr = (uintptr_t)si->si_addr, gfn = 0;
		struct emu_guard *guard = atomic_load_explicit(&emu_thread.guard, memory_order_relaxed);
		struct emu_region *r = guard ? guard->region : NULL;
		bool registered = false;

		/* A call of ours on that region is under way and keeps it: nothing that vCPUs share needs to be written. */
		if (r && addr - (uintptr_t)r->base < r->frames << EMU_FRAME_SHIFT) {
			gfn = (addr - (uintptr_t)r->base) >> EMU_FRAME_SHIFT;
		} else {
			r = emu_registry_get(addr, &gfn);
			registered = r;
		}
		emu_thread.let_go = 0;
		emu_thread.chaining = 0; /* a former that jumped out of the last one has left it set */
		if (r) {
			int err = serve(r, addr, gfn, si, uc);

			if (registered)
				emu_registry_put(r);
			if (!err) {
				errno = saved_errno;
				return;
			}
			/* of whatever region: the buffer of a copy may be a view of another one */
			if (guard) {
				guard->err = err;
				guard->gfn = gfn;
				guard->elsewhere = r != guard->region;
				errno = saved_errno;
				siglongjmp(guard->env, 1);
			}
		}
		chain(sig, si, context, 0);
	} else if (emu_thread.chaining && stack_pointer(uc) < emu_thread.chain_sp) { /* that former is still running */
		chain(sig, si, context, emu_thread.chaining);
	} else {
		struct formers *f = atomic_load(&formers);
		bool nested = on_alternate_stack(uc) || !f || !is_function(&f->action[f->n - 1]);

		if (nested && si->si_code == SI_TKILL && si->si_pid == getpid() && !emu_thread.let_go++) {
			errno = saved_errno;
			return;
		}
		chain(sig, si, context, 0);
	}
	errno = saved_errno;
}
