"""Aside: what the host keeps of a guest's frames for a while, outside the guest, oldest first.

Frames come here in batches: each has the time, and a stamp, by which the core tells that a frame has been aside since
then and hasn't come back meanwhile. A batch goes when its time is up, or when memory is wanted.

Two kinds of batch. What the guest has given up (free memory) reads as zero once it is dropped. What the guest still
calls its own (clean page cache) is evicted: an access is a discard fault, and the guest reads the page again.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.timers import Timers

__all__ = ["Aside"]

_STAMPS = 65534  # the last one is the working set's


@dataclass(frozen=True, slots=True)
class _Batch:
    since: float
    stamp: int
    ranges: Ranges
    evict: bool


class Aside:
    """A RAM's frames aside. now: guest time in seconds."""

    def __init__(self, ram: GuestRam, timers: Timers, now: Callable[[], float]) -> None:
        self._ram = ram
        self._timers = timers
        self._now = now
        self._batches: deque[_Batch] = deque()
        self._stamps = itertools.cycle(range(_STAMPS))
        self._in_use: set[int] = set()
        #: frames that went aside, and of those that were dropped, and evicted
        self.taken = self.dropped = self.evicted = 0

    def put(self, ranges: Ranges, *, evict: bool, keep: float | None) -> int:
        """Set frames aside; return how many had a page of their own. keep: seconds; None: until memory is wanted."""
        if len(self._batches) == _STAMPS:  # so many at once: the oldest gives its stamp up
            self._drop(self._batches.popleft())
        stamp = next(s for s in self._stamps if s not in self._in_use)
        taken = self._ram.set_aside(ranges, stamp)
        if not taken:
            return 0
        self._in_use.add(stamp)
        self.taken += taken
        batch = _Batch(self._now(), stamp, ranges, evict)
        self._batches.append(batch)
        if keep is not None:
            self._timers.at(batch.since + keep, lambda: self._expire(batch), self)
        return taken

    def _expire(self, batch: _Batch) -> None:
        # with different times to keep, it need not be the oldest
        if batch in self._batches:
            self._batches.remove(batch)
            self._drop(batch)

    def _drop(self, batch: _Batch) -> int:
        self._in_use.discard(batch.stamp)
        frames = self._ram.drop_aside(batch.ranges, batch.stamp, evict=batch.evict)
        if batch.evict:
            self.evicted += frames
        else:
            self.dropped += frames
        return frames

    def recall(self) -> None:
        """Bring everything back that would be evicted: the guest is about to say itself what it needs."""
        kept = deque(batch for batch in self._batches if not batch.evict)
        for batch in self._batches:
            if batch.evict:
                self._ram.bring_back(batch.ranges)
                self._in_use.discard(batch.stamp)
        self._batches = kept

    def shrink(self, frames: int | None = None) -> int:
        """Drop what has been aside longest, batch by batch, until so many frames went (None: all); return how many."""
        went = 0
        while self._batches and (frames is None or went < frames):
            went += self._drop(self._batches.popleft())
        return went

    @property
    def pending(self) -> bool:
        """Whether a batch waits for its time."""
        return bool(self._batches)

    @property
    def oldest(self) -> float | None:
        """Guest time since when the oldest batch has been here; None: there is none."""
        return self._batches[0].since if self._batches else None
