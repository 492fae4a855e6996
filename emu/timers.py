"""Timers: delayed work of guest or host, run in guest time, earliest first (as schedule_delayed_work would)."""

import heapq
import itertools
from collections.abc import Callable

__all__ = ["Timers"]


class Timers:
    """Work that is due at a time; of two at the same time, the one queued first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None], object]] = []
        self._tick = itertools.count()

    def at(self, when: float, work: Callable[[], None], owner: object = None) -> None:
        """Queue work for guest time `when`, in seconds. owner: whose it is, for cancel()."""
        heapq.heappush(self._heap, (when, next(self._tick), work, owner))

    def cancel(self, owner: object) -> None:
        """Forget all queued work of an owner (cancel_delayed_work)."""
        self._heap = [entry for entry in self._heap if entry[3] is not owner]
        heapq.heapify(self._heap)

    @property
    def next_due(self) -> float | None:
        """When the earliest work is due; None when there is none."""
        return self._heap[0][0] if self._heap else None

    def run_due(self, now: float) -> int:
        """Run everything due by now, and what that queues for no later; return how many ran."""
        ran = 0
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2]()
            ran += 1
        return ran
