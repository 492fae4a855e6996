"""Guest time: who says what the time is, and how to wait for it.

Every timer of the guest (reporting's 2 s, later the flusher's 5 s) asks a `Clock`. A stepped clock stands still until
the test moves it, so that a minute of guest time costs nothing; a scaled one runs `speed` times as fast as the wall;
the real one is scaled by 1.
"""

import time
from typing import Protocol

from emu.errors import BadValue

__all__ = ["Clock", "ScaledClock", "StepClock", "make_clock"]


class Clock(Protocol):
    """Guest time in seconds since the machine started."""

    name: str

    def now(self) -> float:
        """Return the guest's time."""

    def sleep_until(self, t: float) -> None:
        """Return when now() is at least t."""


class StepClock:
    """A clock that only moves when somebody waits for it."""

    name = "step"

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, t: float) -> None:
        self._now = max(self._now, t)


class ScaledClock:
    """The wall's clock, `speed` times as fast."""

    def __init__(self, speed: float = 1.0) -> None:
        if not 0.001 <= speed < float("inf"):
            raise BadValue(f"speed {speed!r} must be at least 0.001 (1 is real time)")
        self.speed = speed
        self.name = "real" if speed == 1 else f"x{speed:g}"
        self._start = time.monotonic()

    def now(self) -> float:
        return (time.monotonic() - self._start) * self.speed

    def sleep_until(self, t: float) -> None:
        # in slices, so that Ctrl-C and a late timer are never more than a moment away
        while (left := (t - self.now()) / self.speed) > 0:
            time.sleep(min(left, 0.1))


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
