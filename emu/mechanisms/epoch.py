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

from emu.guest.kernel import GuestKernel
from emu.guest.pressure import PressureDriver
from emu.guest.reporting import DEFAULT_DELAY, DEFAULT_ORDER
from emu.host.budget import Budget, Limits
from emu.host.hypervisor import Hypervisor
from emu.host.squeeze import Squeeze
from emu.mechanisms.reporting import REPORTING_CHAIN, Reporting, parse_delay, parse_order
from emu.observe.chain import GUEST_ARROWS, Arrow
from emu.observe.pagemap import Stage
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size

__all__ = ["EpochMechanism"]


@dataclass(frozen=True, slots=True)
class EpochMechanism:
    """Epochs and reporting. low and step are bytes, times guest seconds."""

    low: int | None = None
    step: int = 64 << 20
    period: float = 1.0
    oldest: float = 60.0
    order: int = DEFAULT_ORDER
    delay: float = DEFAULT_DELAY

    name: ClassVar[str] = "epoch"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "low": lambda text: parse_size(text, "epoch low"),
        "step": lambda text: parse_size(text, "epoch step"),
        "period": lambda text: parse_duration(text, "epoch period"),
        "oldest": lambda text: parse_duration(text, "epoch oldest"),
        "order": parse_order,
        "delay": parse_delay,
    }
    chain: ClassVar[tuple[Stage, ...]] = REPORTING_CHAIN
    arrows: ClassVar[tuple[Arrow, ...]] = GUEST_ARROWS

    @property
    def _reporting(self) -> Reporting:
        return Reporting(order=self.order, delay=self.delay)

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Give the guest the driver of the pressure queue, and reporting; start looking at the footprint."""
        budget = None
        if self.low is not None:
            limits = Limits(self.low, self.low, self.low)
            budget = Budget(limits, "epoch@low", step=self.step, period=self.period, oldest=self.oldest)
        self._reporting.attach(guest, host)
        guest.pressure = PressureDriver(guest)
        host.squeeze = None if budget is None else Squeeze(host, guest.pressure, budget)

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Stop."""
        if host.squeeze is not None:
            host.squeeze.stop()
            host.squeeze = None
        if guest.pressure is not None:
            guest.end_worker(guest.pressure)
            guest.pressure = None
        self._reporting.detach(guest, host)

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """The limit, requests, what they freed, and reporting's state."""
        if guest.pressure is None:
            return [("driver", "none")]
        counters = guest.pressure.counters
        return [
            ("above", "asked by a fleet" if self.low is None else format_size(self.low)),
            ("epochs", f"{counters['epochs']:,}"),
            ("freed", format_size(counters["epoch_freed"] * FRAME_SIZE)),
            *self._reporting.panel(guest, host)[:1],
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether reporting has something; pressure comes when it comes."""
        return self._reporting.pending(guest)
