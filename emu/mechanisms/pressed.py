"""What epoch and purge have in common: above a limit the host asks the guest for memory by the pressure queue.

Each asks for its own thing; what the guest frees goes home by free page reporting. Without a limit the guest has the
driver, and waits for a fleet's host to ask.
"""

from dataclasses import dataclass
from typing import ClassVar

from emu.guest.kernel import GuestKernel
from emu.guest.pressure import PressureDriver
from emu.host.budget import Budget
from emu.host.hypervisor import Hypervisor
from emu.host.squeeze import Squeeze
from emu.mechanisms.reporting import OverReporting
from emu.units import FRAME_SIZE, format_size

__all__ = ["Pressed"]


@dataclass(frozen=True, slots=True)
class Pressed(OverReporting):
    """The driver, reporting, and who looks at the footprint."""

    #: the name of its request, too (host.budget.Request), and by it the driver counts
    name: ClassVar[str]

    @property
    def _limit(self) -> int | None:
        """Bytes of footprint above which the guest is asked; None: when a fleet's host says so."""
        raise NotImplementedError

    def _budget(self, limit: int) -> Budget:
        raise NotImplementedError

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Give the guest the driver of the pressure queue, and reporting; start looking at the footprint."""
        budget = None if self._limit is None else self._budget(self._limit)
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
            ("above", "asked by a fleet" if self._limit is None else format_size(self._limit)),
            (f"{self.name}s", f"{counters[f'{self.name}s']:,}"),
            ("freed", format_size(counters[f"{self.name}_freed"] * FRAME_SIZE)),
            *self._reporting.panel(guest, host)[:1],
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether reporting has something; pressure comes when it comes."""
        return self._reporting.pending(guest)
