"""purge: above a footprint the host demands that the guest drop all that it can, at once: a last line of defence.

Decided by the host; guest code runs: it writes what is dirty, drops all clean cache, used or not, and reports
everything free without delay. It doesn't see anonymous memory.

Settings: high (bytes of footprint above which it is demanded; without it the guest waits for a fleet's host), again (at
most one in so long, 10s), order, delay (as of reporting).
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

__all__ = ["PurgeMechanism"]


@dataclass(frozen=True, slots=True)
class PurgeMechanism:
    """Purge requests and reporting. high is bytes, times are guest seconds."""

    high: int | None = None
    again: float = 10.0
    order: int = DEFAULT_ORDER
    delay: float = DEFAULT_DELAY

    name: ClassVar[str] = "purge"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "high": lambda text: parse_size(text, "purge high"),
        "again": lambda text: parse_duration(text, "purge again"),
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
        if self.high is not None:
            limits = Limits(self.high, self.high, self.high)
            budget = Budget(limits, "purge@high", again=self.again)
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
            ("above", "asked by a fleet" if self.high is None else format_size(self.high)),
            ("purges", f"{counters['purges']:,}"),
            ("freed", format_size(counters["purge_freed"] * FRAME_SIZE)),
            *self._reporting.panel(guest, host)[:1],
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether reporting has something; pressure comes when it comes."""
        return self._reporting.pending(guest)
