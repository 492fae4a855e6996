"""How much memory a guest uses, as a host can estimate it, and as this one knows it.

    sampling   set random frames aside, and see how many are touched within a period (C. Waldspurger, "Memory Resource
               Management in VMware ESX Server", OSDI 2002, section 5.3): the share touched, times what is in memory. Of
               a slow and a fast moving average and the period's own value the largest counts, so that growth is seen at
               once.
    idle age   scan accessed bits each period; the working set is what was accessed within `window` (idle page
    tracking). written    pages that the kernel saw written in a period (WP_ASYNC and PAGEMAP_SCAN): writes alone, and
    only on a RAM
               opened with write_tracking.

The truth is what the guest's own accesses left behind in the same window: a real host doesn't have it. Idle age with
one scan a window is the truth; with more scans it isn't, since ages are whole periods.

What sampling costs the guest: each sampled frame that is touched costs a fault (aside_return counts them). Frames that
sampling has set aside and that aren't touched are moved back at the period's end.
"""

import functools
import operator
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from emu._native import lib
from emu.errors import BadValue, HostError
from emu.frames import FrameState
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.timers import Timers
from emu.units import FRAME_SIZE

__all__ = ["Estimate", "WorkingSet"]

_SLOW, _FAST = 0.125, 0.5  # weights of the newest period in the moving averages
_STAMP = 65534  # never Aside's: it goes to 65533


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, at guest time t (s). written is None without write tracking; truth is of the same period."""

    t: float
    resident: int
    sampled: int
    idle_age: int
    written: int | None
    truth: int


class WorkingSet:
    """Estimates each period. period, window: guest seconds (a window is whole periods); samples: frames a period."""

    def __init__(
        self,
        ram: GuestRam,
        timers: Timers,
        now: Callable[[], float],
        *,
        period: float = 30.0,
        window: float = 60.0,
        samples: float = 100,
        seed: float = 1,
    ) -> None:
        if not 0.1 <= period <= 3600 or window < period:
            raise BadValue(
                f"working set period {period!r} s must be from 0.1 to 3600, and the window {window!r} no less"
            )
        if not 1 <= samples <= 65536:
            raise BadValue(f"working set samples {samples!r} must be from 1 to 65536")
        if ram.aside_how == "none":
            raise HostError("sampling needs frames to be set aside: userfaultfd with UFFDIO_MOVE or write protection")
        self._ram = ram
        self._timers = timers
        self._now = now
        self.period = period
        self.window = window
        self._samples = int(samples)
        self._random = random.Random(seed)
        self._sampled: list[int] = []
        self._slow = self._fast = 0.0
        self._begun = False
        self._writes = ram.write_tracking
        #: one a period, the newest last
        self.estimates: list[Estimate] = []
        # what was accessed in each of the last periods, a byte a frame
        self._accessed: deque[int] = deque(maxlen=max(round(window / period), 1))
        ram.track_accesses()
        ram.harvest(bits=lib.EMU_SEEN)
        if self._writes:
            ram.written_pages()
        self._begin()

    def _resident(self) -> int:
        stats = self._ram.stats()
        return stats["nr_resident"] + stats["nr_lazy"] + stats["nr_aside"]

    def _begin(self) -> None:
        # random frames of those in memory, without replacement
        states = self._ram.states()
        wanted = bytes((FrameState.RESIDENT,))[0]
        present = states.count(wanted)
        picks: set[int] = set()
        if present:
            tries = 0
            while len(picks) < min(self._samples, present) and tries < 64 * self._samples:
                tries += 1
                gfn = self._random.randrange(len(states))
                if states[gfn] == wanted:
                    picks.add(gfn)
        self._sampled = sorted(picks)
        if self._sampled:
            self._ram.set_aside(Ranges.of_frames(self._sampled), _STAMP)
        self._timers.at(self._now() + self.period, self._end, self)

    def _end(self) -> None:
        ram = self._ram
        touched = 0
        if self._sampled:
            back = Ranges.of_frames(self._sampled)
            still = ram.bring_back(back, _STAMP)
            touched = len(self._sampled) - still
        resident = self._resident()
        share = touched / len(self._sampled) if self._sampled else 0.0
        if self._begun:
            self._slow += _SLOW * (share - self._slow)
            self._fast += _FAST * (share - self._fast)
        else:
            self._slow = self._fast = share
            self._begun = True
        accessed = ram.harvest(bits=lib.EMU_SEEN)
        self._accessed.append(int.from_bytes(accessed, "little"))
        within = functools.reduce(operator.or_, self._accessed).to_bytes(len(accessed), "little")
        self.estimates.append(
            Estimate(
                t=self._now(),
                resident=resident * FRAME_SIZE,
                sampled=int(max(share, self._slow, self._fast) * resident) * FRAME_SIZE,
                idle_age=within.count(lib.EMU_SEEN) * FRAME_SIZE,
                written=ram.written_pages() * FRAME_SIZE if self._writes else None,
                truth=accessed.count(lib.EMU_SEEN) * FRAME_SIZE,
            )
        )
        self._begin()

    def stop(self) -> None:
        """End it; what is aside for sampling comes back."""
        self._timers.cancel(self)
        if self._sampled:
            self._ram.bring_back(Ranges.of_frames(self._sampled), _STAMP)
            self._sampled = []
