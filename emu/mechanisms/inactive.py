"""inactive: the guest hands over clean cache that it hasn't used for a while; the host keeps it aside, then drops it.

Decided by the guest (what), then by the host (when); no guest code runs when memory is taken, and nothing changes for
the guest: its cache, MemFree and MemAvailable stay. A touch, read or write, brings a page back; one that was dropped is
read from the guest's disk again, at the touch. It sees neither anonymous memory nor dirty or mapped cache. Free memory
is reported, as by `reporting`.

Settings: seconds (without an access until a page is handed over, 30s), keep (how long the host keeps it aside, 30s;
never: until memory is wanted), order, delay (as of reporting; report=no: only the inactive queue).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue, HostError
from emu.guest.inactive import Inactive
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.mechanisms.reporting import REPORTING_CHAIN, REPORTING_PARSERS, OverReporting, parse_yes
from emu.observe.chain import ASIDE_ARROWS, GUEST_ARROWS, Arrow
from emu.observe.pagemap import Stage
from emu.units import FRAME_SIZE, format_size, parse_duration

__all__ = ["InactiveMechanism"]


def _keep(text: str) -> float | None:
    return None if text == "never" else parse_duration(text, "keep")


@dataclass(frozen=True, slots=True)
class InactiveMechanism(OverReporting):
    """The inactive queue, and reporting. seconds, keep and delay are in guest seconds."""

    seconds: float = 30.0
    keep: float | None = 30.0
    report: bool = True

    name: ClassVar[str] = "inactive"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "seconds": lambda text: parse_duration(text, "inactive seconds"),
        "keep": _keep,
        "report": parse_yes,
        **REPORTING_PARSERS,
    }
    chain: ClassVar[tuple[Stage, ...]] = (*REPORTING_CHAIN, Stage.ASIDE, Stage.DISCARDED)
    arrows: ClassVar[tuple[Arrow, ...]] = (*GUEST_ARROWS, *ASIDE_ARROWS)

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Give the guest a driver over the host's inactive queue, and reporting."""
        if self.keep is not None and not 0 <= self.keep <= 86400:
            raise BadValue(f"keep {self.keep!r} s must be from 0 to 86400, or never")
        if not host.ram.can_evict:
            raise HostError(
                "inactive needs userfaultfd, UFFDIO_MOVE or write protection, and (for the thread service) "
                "UFFDIO_POISON: a page that was dropped must be told from one that is zero"
            )
        if self.report:
            self._reporting.attach(guest, host)
        host.inactive.keep = self.keep
        try:
            guest.inactive = Inactive(guest, host.inactive, seconds=self.seconds)
        except BaseException:
            self.detach(guest, host)
            raise

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Stop handing over. What is aside stays the host's to drop."""
        if guest.inactive is not None:
            guest.end_worker(guest.inactive)
            guest.inactive = None
        if self.report:
            self._reporting.detach(guest, host)

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """The pace, what was handed over, what is aside, what came back, and discard faults."""
        worker = guest.inactive
        if worker is None:
            return [("worker", "none")]
        stats = host.ram.stats()
        return [
            ("after", f"{worker.seconds:g} s, keep {'on' if self.keep is None else f'{self.keep:g} s'}"),
            ("handed", format_size(worker.counters["inactive_handed"] * FRAME_SIZE)),
            ("aside", format_size(stats["nr_aside"] * FRAME_SIZE)),
            ("came back", f"{stats['aside_return']:,}"),
            ("read again", f"{guest.vmstat['pgdiscard_fault']:,}"),
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether there is cache that gets older, or reporting has something."""
        inactive = guest.inactive is not None and guest.inactive.pending
        return inactive or (self.report and self._reporting.pending(guest))
