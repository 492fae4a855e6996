"""epoch: above a footprint the host moves the epoch on, and the guest evicts cache that was last used before it.

Decided by the host (when, and how old), then by the guest (which pages); guest code runs: a walk of the file lists for
each request. Freed cache reaches the host by free page reporting. It doesn't see anonymous memory, and does nothing
without pressure.

Settings: low (bytes of footprint above which the epoch moves; without it the guest waits for a fleet's host), step
(bytes a request, 64MiB), period (between two requests, 1s), oldest (age of the first epoch, 60s; it halves while the
guest has less than it was asked for), order, delay (as of reporting).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.host.budget import Budget, Limits
from emu.mechanisms.pressed import Pressed
from emu.mechanisms.reporting import REPORTING_PARSERS
from emu.units import parse_duration, parse_size

__all__ = ["EpochMechanism"]


@dataclass(frozen=True, slots=True)
class EpochMechanism(Pressed):
    """Epochs and reporting. low and step are bytes, times guest seconds."""

    low: int | None = None
    step: int = 64 << 20
    period: float = 1.0
    oldest: float = 60.0

    name: ClassVar[str] = "epoch"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "low": lambda text: parse_size(text, "epoch low"),
        "step": lambda text: parse_size(text, "epoch step"),
        "period": lambda text: parse_duration(text, "epoch period"),
        "oldest": lambda text: parse_duration(text, "epoch oldest"),
        **REPORTING_PARSERS,
    }

    @property
    def _limit(self) -> int | None:
        return self.low

    def _budget(self, limit: int) -> Budget:
        limits = Limits(limit, limit, limit)
        return Budget(limits, "epoch@low", step=self.step, period=self.period, oldest=self.oldest)
