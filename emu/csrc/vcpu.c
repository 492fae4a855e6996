/* SPDX-License-Identifier: MIT */
/*
 * vcpu.c - the loops a guest's CPUs run over its memory, in one thread or several.
 *
 * A job's frames are cut into equal shares in the order of its ranges; each thread walks one share (guestwalk.c).  The
 * first share runs in the calling thread.  Each thread has its own histogram and its own list of bad frames, merged
 * after the join, so that nothing in the loop is shared but the guest's memory itself.
 *
 * The threads block every signal but SIGBUS: the program's signals belong to its own threads, and SIGBUS blocked would
 * be death at the first missing frame.
 */
#define _GNU_SOURCE
#include "core.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct vcpu {
	struct emu_walk walk;
	struct emu_hist hist;
	pthread_t thread;
	int err;
	bool started;
};

static void *run(void *arg)
{
	struct vcpu *v = arg;

	emu_sigbus_unblock();
	v->err = emu_guest_walk(&v->walk);
	return NULL;
}

static int run_job(struct emu_region *r, const struct emu_range *ranges, size_t n, struct emu_vcpu_job *job)
{
	uint64_t frames = 0, given = 0;
	int err = emu_ranges_check(r, ranges, n);
	int threads = job->threads;
	struct vcpu *vcpus;
	bool was_blocked;

	job->progress = (struct emu_progress){ 0 };
	job->bad_count = 0;
	if (err)
		return err;
	if (job->op < 0 || job->op >= EMU_NR_OPS || threads < 1 || threads > 1024)
		return -EINVAL;
	for (size_t i = 0; i < n && job->op == EMU_COPY; i++) /* there the keys are frames, too */
		if (!emu_range_ok(r, ranges[i].key, ranges[i].count))
			return -ERANGE;
	if (atomic_load(&r->dead))
		return -EOWNERDEAD;
	for (size_t i = 0; i < n; i++)
		frames += ranges[i].count;
	if (!frames)
		return 0;
	if ((uint64_t)threads > frames)
		threads = (int)frames;
	vcpus = calloc((size_t)threads, sizeof(*vcpus));
	if (!vcpus)
		return -ENOMEM;
	for (int t = 0; t < threads; t++) {
		uint64_t share = frames / (uint64_t)threads + ((uint64_t)t < frames % (uint64_t)threads);
		struct emu_walk *w = &vcpus[t].walk;

		*w = (struct emu_walk){ .r = r, .ranges = ranges, .n = n, .op = job->op, .arg = job->arg,
			                .hist = job->hist ? &vcpus[t].hist : NULL, .skip = given, .left = share };
		given += share;
		if (job->op == EMU_VERIFY && job->bad_cap) {
			w->bad_cap = share < job->bad_cap ? share : job->bad_cap;
			w->bad = malloc(w->bad_cap * sizeof(*w->bad));
			if (!w->bad)
				err = -ENOMEM;
		}
	}
	emu_sigbus_ensure(r);
	was_blocked = emu_sigbus_unblock();
	if (!err) {
		sigset_t all, old;

		sigfillset(&all);
		sigdelset(&all, SIGBUS);
		if (threads > 1)
			pthread_sigmask(SIG_SETMASK, &all, &old);
		for (int t = 1; t < threads; t++)
			vcpus[t].started = !pthread_create(&vcpus[t].thread, NULL, run, &vcpus[t]);
		if (threads > 1)
			pthread_sigmask(SIG_SETMASK, &old, NULL);
		run(&vcpus[0]);
		for (int t = 1; t < threads; t++) {
			if (vcpus[t].started)
				pthread_join(vcpus[t].thread, NULL);
			else
				run(&vcpus[t]); /* no thread to be had: its share is done here, and late */
		}
	}
	if (was_blocked)
		emu_sigbus_block();
	for (int t = 0; t < threads; t++) {
		struct vcpu *v = &vcpus[t];
		uint64_t room = job->bad_count < job->bad_cap ? job->bad_cap - job->bad_count : 0;
		uint64_t kept = v->walk.bad_count < v->walk.bad_cap ? v->walk.bad_count : v->walk.bad_cap;

		job->progress.done += v->walk.done;
		if (v->err && !err) {
			err = v->err;
			job->progress.bad_gfn = v->walk.guard.gfn;
		}
		if (kept && room)
			memcpy(job->bad + job->bad_count, v->walk.bad, (kept < room ? kept : room) * sizeof(*job->bad));
		job->bad_count += v->walk.bad_count;
		if (job->hist)
			emu_hist_merge(job->hist, &v->hist);
		free(v->walk.bad);
	}
	free(vcpus);
	return err;
}

int emu_vcpu_run(struct emu_region *r, const struct emu_range *ranges, size_t n, struct emu_vcpu_job *job)
{
	int err = emu_region_enter(r);
	uint64_t t0;

	if (err)
		return err;
	t0 = emu_now_ns();
	err = run_job(r, ranges, n, job);
	/* what the guest's CPUs took, all threads together counted once: the rest of a step is Python's */
	emu_stat_add(r, EMU_STAT_vcpu_ns, (int64_t)(emu_now_ns() - t0));
	emu_stat_add(r, EMU_STAT_vcpu_calls, 1);
	emu_stat_add(r, EMU_STAT_vcpu_frames, (int64_t)job->progress.done);
	emu_region_leave(r);
	return err;
}
