"""aging: the thread's own proposal. Without any pressure, cache that nobody has used for a while is freed, then
reported.

Decided by the guest, by age; guest code runs: a walk of the file lists each generation (guest/aging.py). What is in use
stays, as a touch within aging_seconds only restamps a page. It doesn't see anonymous memory.

Settings: seconds (without an access until a page is freed, 60s; a generation is a quarter of it), feedback (no; yes:
slower when refaults show regret, faster when the guest is idle), regret (the share of freed pages that may come back,
0.05), order, delay (as of reporting).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.guest.aging import Aging
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.mechanisms.reporting import REPORTING_PARSERS, OverReporting, parse_yes
from emu.units import FRAME_SIZE, format_size, parse_duration

__all__ = ["AgingMechanism"]


@dataclass(frozen=True, slots=True)
class AgingMechanism(OverReporting):
    """Aging and reporting. seconds and delay are in guest seconds."""

    seconds: float = 60.0
    feedback: bool = False
    regret: float = 0.05

    name: ClassVar[str] = "aging"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "seconds": lambda text: parse_duration(text, "aging seconds"),
        "feedback": parse_yes,
        "regret": float,
        **REPORTING_PARSERS,
    }

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Start the worker, and reporting."""
        guest.aging = Aging(guest, seconds=self.seconds, feedback=self.feedback, regret=self.regret)
        try:
            self._reporting.attach(guest, host)
        except BaseException:
            guest.aging.stop()
            guest.aging = None
            raise

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Stop both."""
        if guest.aging is not None:
            guest.end_worker(guest.aging)
            guest.aging = None
        self._reporting.detach(guest, host)

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """The pace, the next walk, what has gone, and reporting's state."""
        worker = guest.aging
        if worker is None:
            return [("worker", "none")]
        return [
            ("free after", f"{worker.seconds:g} s"),
            ("next walk", f"{max(worker.next_walk - guest.clock.now(), 0.0):.1f} s"),
            ("freed", format_size(worker.counters["aging_freed"] * FRAME_SIZE)),
            ("refaults", f"{int(guest.memmap.stats.workingset_refault):,}"),
            *self._reporting.panel(guest, host)[:1],
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether there is cache that gets older, or reporting has something."""
        return (guest.aging is not None and guest.aging.pending) or self._reporting.pending(guest)
