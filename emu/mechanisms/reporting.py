"""reporting: free page reporting. The guest reports free blocks of an order or more, delayed; the host discards them.

Decided by the guest; guest code runs for every pass. It sees free memory only: page cache and per-CPU lists stay.

Settings: order (0 to 10, 9 = 2 MiB), delay (seconds or text, 2s), poison (a byte that the guest fills free frames with:
then the host discards nothing, unless it is 0), assigned_device (a passthrough device: the host discards nothing).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.balloon import BalloonDriver
from emu.guest.kernel import GuestKernel
from emu.guest.reporting import DEFAULT_DELAY, DEFAULT_ORDER, PageReporting, ReportingState
from emu.host.hypervisor import Hypervisor
from emu.units import parse_duration
from emu.virtio.balloon import Feature

__all__ = ["Reporting"]


def _order(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadValue(f"reporting order {text!r} must be an integer from 0 to 10") from None


def _byte(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise BadValue(f"page poison {text!r} isn't a byte such as 0xaa") from None


def _yes(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise BadValue(f"assigned_device {text!r} must be yes or no")
    return text.lower() in ("yes", "true", "1")


@dataclass(frozen=True, slots=True)
class Reporting:
    """Free page reporting. delay is in seconds."""

    order: int = DEFAULT_ORDER
    delay: float = DEFAULT_DELAY
    poison: int | None = None
    assigned_device: bool = False

    name: ClassVar[str] = "reporting"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "order": _order,
        "delay": lambda text: parse_duration(text, "reporting delay"),
        "poison": _byte,
        "assigned_device": _yes,
    }

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Give the guest a balloon driver and a reporting worker, over the host's balloon device."""
        if self.poison is not None and not 0 <= self.poison <= 255:
            raise BadValue(f"page poison {self.poison!r} isn't a byte")
        guest.page_poison = self.poison
        host.balloon.assigned_device = self.assigned_device
        driver = BalloonDriver(host.balloon, poison=self.poison)
        if Feature.PAGE_REPORTING in driver.features:
            guest.reporting = PageReporting(
                guest.zones, guest.timers, guest.clock.now, driver.report, order=self.order, delay=self.delay
            )

    def pending(self, guest: GuestKernel) -> bool:
        """Whether a pass is queued or under way."""
        return guest.reporting is not None and guest.reporting.state is not ReportingState.IDLE
