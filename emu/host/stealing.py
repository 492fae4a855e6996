"""Stealing: memory that the host takes by what the guest says of it, without asking (CMM2; csrc/steal.c).

Its timer looks at the footprint, and takes what is over a limit. It is the host's own, and goes on while the guest is
paused.
"""

from collections.abc import Callable
from typing import Protocol

from emu.errors import BadValue
from emu.frames import StealPolicy, Usage
from emu.ram import GuestRam
from emu.timers import Timers
from emu.units import FRAME_SIZE

__all__ = ["IDLE_CLASSES", "KINDS", "Stealing"]

#: guest seconds: memory of a class has been idle for at least so long, and less than the class before it
IDLE_CLASSES = (256, 128, 64, 32, 16, 8, 4, 0)

#: what a steal takes, as the core counts it: steal_KIND
KINDS = ("unused", "volatile", "potential", "preserved")

_PERIOD = 0.25  # guest seconds


class _Host(Protocol):
    ram: GuestRam
    timers: Timers
    now: Callable[[], float]
    idle_period: float


class Stealing:
    """Takes from one guest. most: bytes of footprint; None: only when steal() is called."""

    def __init__(self, host: _Host, most: int | None, policy: StealPolicy) -> None:
        self._host = host
        self._most = most
        self.policy = policy
        self._seed = 0
        if most is not None:
            self._again()

    def steal(self, size: int, policy: StealPolicy | None = None) -> int:
        """Take up to so many bytes; return how many."""
        self._seed += 1
        policy = self.policy if policy is None else policy
        if not isinstance(policy, StealPolicy):
            raise BadValue(f"steal policy {policy!r} isn't a StealPolicy: {', '.join(StealPolicy.__members__)}")
        return self._host.ram.steal(-(-size // FRAME_SIZE), policy=policy, seed=self._seed) * FRAME_SIZE

    def offer(self) -> list[int]:
        """Return the bytes that could be taken, what is first taken first: unused ones, then volatile and potentially
        volatile ones by IDLE_CLASSES."""
        ram, period = self._host.ram, self._host.idle_period
        classes = [0] * len(IDLE_CLASSES)
        for age, frames in enumerate(ram.stealable((Usage.VOLATILE, Usage.POTENTIALLY_VOLATILE))):
            if frames:
                classes[next(i for i, least in enumerate(IDLE_CLASSES) if age * period >= least)] += frames
        unused = sum(ram.stealable((Usage.UNUSED,)))
        return [frames * FRAME_SIZE for frames in (unused, *classes)]

    def _again(self) -> None:
        self._host.timers.at(self._host.now() + _PERIOD, self._look, self)

    def _look(self) -> None:
        assert self._most is not None
        over = self._host.ram.footprint_bytes - self._most
        if over > 0:
            self.steal(over)
        self._again()

    def stop(self) -> None:
        """End it."""
        self._host.timers.cancel(self)
