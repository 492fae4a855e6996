"""reporting: free page reporting. The guest reports free blocks of an order or more, delayed; the host discards them.

Decided by the guest; guest code runs for every pass. It sees free memory only: page cache and per-CPU lists stay.

Settings: order (0 to 10, 9 = 2 MiB), delay (seconds or text, 2s), poison (a byte that the guest fills free frames with:
then the host discards nothing, unless it is 0), assigned_device (a passthrough device: the host discards nothing).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.kernel import GuestKernel
from emu.guest.reporting import DEFAULT_DELAY, DEFAULT_ORDER, PageReporting, ReportingState
from emu.host.hypervisor import Hypervisor
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, Arrow
from emu.observe.pagemap import Stage
from emu.units import FRAME_SIZE, format_size, parse_duration
from emu.virtio.balloon import Feature

__all__ = ["REPORTING_CHAIN", "REPORTING_PARSERS", "OverReporting", "Reporting", "parse_yes"]


REPORTING_CHAIN = (*GUEST_CHAIN, Stage.HOST_OWNED)


def _order(text: str) -> int:
    """Read a reporting order."""
    try:
        return int(text)
    except ValueError:
        raise BadValue(f"reporting order {text!r} must be an integer from 0 to 10") from None


def _byte(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise BadValue(f"page poison {text!r} isn't a byte such as 0xaa") from None


def parse_yes(text: str) -> bool:
    """Read yes or no."""
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise BadValue(f"{text!r} must be yes or no")
    return text.lower() in ("yes", "true", "1")


def _delay(text: str) -> float:
    """Read a reporting delay."""
    return parse_duration(text, "reporting delay")


REPORTING_PARSERS: dict[str, Callable[[str], Any]] = {"order": _order, "delay": _delay}


@dataclass(frozen=True, slots=True)
class Reporting:
    """Free page reporting. delay is in seconds."""

    order: int = DEFAULT_ORDER
    delay: float = DEFAULT_DELAY
    poison: int | None = None
    assigned_device: bool = False

    name: ClassVar[str] = "reporting"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        **REPORTING_PARSERS,
        "poison": _byte,
        "assigned_device": parse_yes,
    }
    chain: ClassVar[tuple[Stage, ...]] = REPORTING_CHAIN
    arrows: ClassVar[tuple[Arrow, ...]] = GUEST_ARROWS

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Give the guest a balloon driver and a reporting worker, over the host's balloon device."""
        if self.poison is not None and not 0 <= self.poison <= 255:
            raise BadValue(f"page poison {self.poison!r} isn't a byte")
        guest.page_poison = self.poison
        host.balloon.assigned_device = self.assigned_device
        driver = guest.probe_balloon(host.balloon)
        if Feature.PAGE_REPORTING not in driver.features:
            return
        try:
            guest.reporting = PageReporting(
                guest.zones, guest.timers, guest.clock.now, driver.report, order=self.order, delay=self.delay
            )
        except BaseException:
            self.detach(guest, host)
            raise

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Unbind the driver: the worker stops, the device is reset. Blocks keep their Reported flags, as in Linux."""
        if guest.reporting is not None:
            guest.end_worker(guest.reporting)
            guest.reporting = None
        guest.remove_balloon()
        host.balloon.reset()
        host.balloon.assigned_device = False

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """The worker's state, when it runs next, what its budget lets it do, and what it has done."""
        worker = guest.reporting
        if worker is None:
            return [("worker", "none: the driver gave reporting up")]
        due = worker.next_pass
        lines = [
            (
                "worker",
                worker.state.name.lower() + ("" if due is None else f", in {max(due - guest.clock.now(), 0.0):.1f} s"),
            ),
            ("budget", f"{worker.budget} a pass, {worker.waiting_reports} waiting"),
            ("reported", format_size(worker.reported_frames * FRAME_SIZE)),
            ("not yet", format_size(worker.unreported_frames * FRAME_SIZE)),
            ("passes", f"{worker.passes:,}, reports {worker.reports:,}"),
        ]
        if host.balloon.inhibited:
            lines[4] = ("host", "discards nothing")
        return lines

    def pending(self, guest: GuestKernel) -> bool:
        """Whether a pass is queued or under way."""
        return guest.reporting is not None and guest.reporting.state is not ReportingState.IDLE


@dataclass(frozen=True, slots=True, kw_only=True)
class OverReporting:
    """What a mechanism has that frees memory in the guest and lets reporting hand it over. delay is in seconds."""

    order: int = DEFAULT_ORDER
    delay: float = DEFAULT_DELAY

    chain: ClassVar[tuple[Stage, ...]] = REPORTING_CHAIN
    arrows: ClassVar[tuple[Arrow, ...]] = GUEST_ARROWS

    @property
    def _reporting(self) -> Reporting:
        return Reporting(order=self.order, delay=self.delay)
