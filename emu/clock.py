"""Guest time: who says what the time is, and how to wait for it.

Every timer of the guest (reporting's 2 s, later the flusher's 5 s) asks a `Clock`. A stepped clock stands still until
the test moves it, so that a minute of guest time costs nothing; a scaled one runs `speed` times as fast as the wall;
the real one is scaled by 1.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from emu.errors import BadValue

__all__ = ["Clock", "ScaledClock", "StepClock", "make_clock"]


class Clock(Protocol):
    """Guest time in seconds since the machine started."""

    @property
    def name(self) -> str:
        """How a table calls it: step, real, x10."""

    @property
    def speed(self) -> float:
        """Guest seconds a second of the wall; infinite where time passes only when somebody waits."""

    def now(self) -> float:
        """Return the guest's time."""

    def sleep_until(self, t: float) -> None:
        """Return when now() is at least t."""


class StepClock:
    """A clock that only moves when somebody waits for it."""

    name = "step"
    speed = math.inf

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, t: float) -> None:
        self._now = max(self._now, t)


def _check_speed(speed: float) -> None:
    if not 0.001 <= speed <= 1e6:
        raise BadValue(f"speed {speed!r} must be from 0.001 to 1000000 (1 is real time), or step")


class ScaledClock:
    """The wall's clock, `speed` times as fast."""

    def __init__(self, speed: float = 1.0) -> None:
        _check_speed(speed)
        # (guest time, the wall's time at it or None while it stands still, speed): replaced whole, so that another
        # thread's now() never sees half of a change
        self._anchor: tuple[float, float | None, float] = (0.0, time.monotonic(), speed)

    @property
    def speed(self) -> float:
        return self._anchor[2]

    @property
    def name(self) -> str:
        return "real" if self.speed == 1 else f"x{self.speed:g}"

    def now(self) -> float:
        at, since, speed = self._anchor
        return at if since is None else at + (time.monotonic() - since) * speed

    def sleep_until(self, t: float) -> None:
        # in slices, so that Ctrl-C and a late timer are never more than a moment away
        while (left := (t - self.now()) / self.speed) > 0:
            time.sleep(min(left, 0.1))

    def _restart(self, at: float, speed: float) -> None:
        self._anchor = (at, None if self._anchor[1] is None else time.monotonic(), speed)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let guest time stand still for a while: what happens meanwhile costs the guest none."""
        stood = self._anchor[1] is None
        try:
            self._anchor = (self.now(), None, self.speed)
            yield
        finally:
            if not stood:
                self._anchor = (self._anchor[0], time.monotonic(), self.speed)

    def set_speed(self, speed: float) -> None:
        """Go on from now at another speed. Raises BadValue."""
        _check_speed(speed)
        self._restart(self.now(), speed)

    def skip_to(self, t: float) -> None:
        """Make it guest time t at once, if that is later than now."""
        self._restart(max(self.now(), t), self.speed)


def make_clock(speed: float | str) -> Clock:
    """Return a clock from "step", "real", or a factor such as 10 or "10"."""
    if speed == "step":
        return StepClock()
    if speed == "real":
        return ScaledClock(1.0)
    try:
        return ScaledClock(float(speed))
    except ValueError as error:
        if isinstance(error, BadValue):
            raise
        raise BadValue(f"speed {speed!r} isn't known: give real, step, or a factor such as 10") from None
