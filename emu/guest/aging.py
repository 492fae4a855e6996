"""Aging: clean cache that nobody has used for a while is freed, without any pressure.

This is what the linux-mm thread on free page reporting asked for (January 2020): "in the normal mode of operation you
still want to shrink down voluntarily", and a page that sits in the queue for long enough is freed, "but if it is
accessed it is cheap to put back". Linux frees cache only when memory is short, and a guest's memory isn't short while
its host's is.

Generations, as MGLRU has them. One lasts aging_seconds / 4 of guest time: 15 s of the default minute. An access to a
page stamps it with the generation of now; that store, and the list move that a second access makes, are all that a
touch costs (csrc/lru.c). At the end of each generation a worker walks the two lists of file pages:

    not accessed for 2 generations (half of aging_seconds)   sinks from active to inactive
    not accessed for 4 generations, clean and unmapped       is freed, and leaves a shadow

So a page goes between aging_seconds and a generation more after its last access; dirty ones wait for the flusher,
mapped ones are left alone. What is freed reaches the buddy at once (the per-CPU lists are drained after a walk that
freed something), since it is meant for the host.

Feedback, if wanted, bounds the regret. A refault shows that a page was freed too early. Pages freed and refaults are
counted with a half-life of four times what was set; when refaults come to more than `regret` of the pages freed,
aging_seconds doubles (up to 16-fold), and stays so for eight times as long. After that, after four times aging_seconds
in which they stayed below a quarter of that, it shrinks by a quarter; and in a guest that has read nothing for as long
as was set, by half every aging_seconds; down to a quarter of what was set. Refaults are the kernel's own count
(workingset_refault_file), which doesn't tell who evicted.
"""

from typing import TYPE_CHECKING

from emu.errors import BadValue
from emu.ranges import runs_of

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["GENERATIONS", "Aging"]

GENERATIONS = 4  # MAX_NR_GENS
_SINK = 2
_CALM = 8  # aging_seconds after a regret in which it doesn't get faster
_SLOWEST, _FASTEST = 16.0, 0.25  # of what was set


class Aging:
    """The worker. seconds: guest seconds without an access until a page is freed. regret: a share of pages freed."""

    def __init__(self, kernel: "GuestKernel", *, seconds: float, feedback: bool = False, regret: float = 0.05) -> None:
        if not 0.4 <= seconds <= 86400:
            raise BadValue(f"aging seconds {seconds!r} must be from 0.4 to 86400")
        if not 0 < regret <= 1:
            raise BadValue(f"aging regret {regret!r} must be above 0 and at most 1")
        self._kernel = kernel
        self._set = seconds
        self._feedback = feedback
        self._regret = regret
        #: guest seconds until a page is freed, as feedback has it now
        self.seconds = seconds
        #: guest time of the next walk
        self.next_walk = 0.0
        self.counters = dict.fromkeys(("aging_walks", "aging_scanned", "aging_sunk", "aging_freed"), 0)
        # of feedback: pages freed and refaults, fading; what was counted last; when something was read, and the pace
        # changed
        self._freed = self._refaults = 0.0
        self._seen = self._events()
        self._read_at = self._changed_at = self._calm_at = kernel.clock.now()
        kernel.memmap.next_generation()
        self._queue()

    @property
    def generation(self) -> float:
        """Guest seconds that a generation lasts."""
        return self.seconds / GENERATIONS

    def _queue(self) -> None:
        self.next_walk = self._kernel.clock.now() + self.generation
        self._kernel.timers.at(self.next_walk, self._work, self)

    def _events(self) -> tuple[int, int]:
        return int(self._kernel.memmap.stats.workingset_refault), self._kernel.vmstat["pgpgin"]

    def _work(self) -> None:
        kernel = self._kernel
        kernel.memmap.next_generation()
        freed, scanned, sunk = kernel.memmap.age(_SINK, GENERATIONS)
        counters = self.counters
        counters["aging_walks"] += 1
        counters["aging_scanned"] += scanned
        counters["aging_sunk"] += sunk
        counters["aging_freed"] += len(freed)
        if freed:
            kernel.free_pages(runs_of(freed))
            kernel.drain_pages()
        if self._feedback:
            self._adapt(len(freed))
        self._queue()

    def _adapt(self, freed: int) -> None:
        now = self._kernel.clock.now()
        before, self._seen = self._seen, self._events()
        refaults = self._seen[0] - before[0]
        if self._seen[1] > before[1]:
            self._read_at = now
        fading = 0.5 ** (self.generation / (4 * self._set))
        self._freed = self._freed * fading + freed
        self._refaults = self._refaults * fading + refaults
        pace = self.seconds
        if refaults and self._refaults > self._regret * self._freed:
            pace = min(pace * 2, self._set * _SLOWEST)
            self._refaults = 0.0  # judged: the new pace is to be judged by itself
            self._calm_at = now + _CALM * pace
        elif now < self._calm_at:
            pass
        elif now - self._read_at >= self._set and now - self._changed_at >= pace:
            pace /= 2
        elif now - self._changed_at >= 4 * pace and self._refaults <= self._regret * self._freed / 4:
            pace *= 0.75
        if pace != self.seconds:
            self.seconds = max(pace, self._set * _FASTEST)
            self._changed_at = now

    @property
    def pending(self) -> bool:
        """Whether clean unmapped cache is still on its way out: a guest that goes on using its cache never ends it."""
        return self._kernel.cached_bytes > 0

    def stop(self) -> None:
        """End the worker."""
        self._kernel.timers.cancel(self)
