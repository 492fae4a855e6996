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

    #: guest seconds a second of the wall; infinite where time passes only when somebody waits
    speed: float

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


class ScaledClock:
    """The wall's clock, `speed` times as fast."""

    def __init__(self, speed: float = 1.0) -> None:
        if not 0.001 <= speed < math.inf:
            raise BadValue(f"speed {speed!r} must be at least 0.001 (1 is real time)")
        self.speed = speed
        # guest time `_at` was the wall's `_since`; None: it stands still there
        self._at = 0.0
        self._since: float | None = time.monotonic()

    @property
    def name(self) -> str:
        return "real" if self.speed == 1 else f"x{self.speed:g}"

    def now(self) -> float:
        return self._at if self._since is None else self._at + (time.monotonic() - self._since) * self.speed

    def sleep_until(self, t: float) -> None:
        # in slices, so that Ctrl-C and a late timer are never more than a moment away
        while (left := (t - self.now()) / self.speed) > 0:
            time.sleep(min(left, 0.1))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let guest time stand still for a while: what happens meanwhile costs the guest none."""
        self._at = self.now()
        since, self._since = self._since, None
        try:
            yield
        finally:
            if since is not None:
                self._since = time.monotonic()

    def set_speed(self, speed: float) -> None:
        """Go on from now at another speed. Raises BadValue."""
        if not 0.001 <= speed < math.inf:
            raise BadValue(f"speed {speed!r} must be at least 0.001 (1 is real time)")
        self._at = self.now()
        if self._since is not None:
            self._since = time.monotonic()
        self.speed = speed

    def skip_to(self, t: float) -> None:
        """Make it guest time t at once, if that is later than now."""
        self._at = max(self.now(), t)
        if self._since is not None:
            self._since = time.monotonic()


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
