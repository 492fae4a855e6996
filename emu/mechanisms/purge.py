"""purge: above a footprint the host demands that the guest drop all that it can, at once: a last line of defence.

Decided by the host; guest code runs: it writes what is dirty, drops all clean cache, used or not, and reports
everything free without delay. It doesn't see anonymous memory.

Settings: high (bytes of footprint above which it is demanded; without it the guest waits for a fleet's host), again (at
most one in so long, 10s), order, delay (as of reporting).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.host.budget import Budget, Limits
from emu.mechanisms.pressed import Pressed
from emu.mechanisms.reporting import REPORTING_PARSERS
from emu.units import parse_duration, parse_size

__all__ = ["PurgeMechanism"]


@dataclass(frozen=True, slots=True)
class PurgeMechanism(Pressed):
    """Purge requests and reporting. high is bytes, times are guest seconds."""

    high: int | None = None
    again: float = 10.0

    name: ClassVar[str] = "purge"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "high": lambda text: parse_size(text, "purge high"),
        "again": lambda text: parse_duration(text, "purge again"),
        **REPORTING_PARSERS,
    }

    @property
    def _limit(self) -> int | None:
        return self.high

    def _budget(self, limit: int) -> Budget:
        return Budget(Limits(limit, limit, limit), "purge@high", again=self.again)
