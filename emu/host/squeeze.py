"""Squeeze: a budget for one guest, on its own machine: what a fleet's host does for many (emu.fleet), by the guest's
clock.

Its timer looks at the footprint once a period and makes the requests that the budget decides on. They are answered
before they return, as the guest and this host share a thread.
"""

from collections.abc import Callable

from emu.host.budget import Ask, Budget, GuestView, Request
from emu.host.hypervisor import Hypervisor
from emu.virtio.pressure import PressureDriver

__all__ = ["Squeeze"]


class Squeeze:
    """Applies a budget to one guest. driver: of the guest's pressure queue."""

    def __init__(self, host: Hypervisor, driver: PressureDriver, budget: Budget) -> None:
        self._host = host
        self._driver = driver
        self.budget = budget
        self._can = frozenset(request for line in budget.lines for request in line.requests)
        self._again()

    def _again(self) -> None:
        self._host.timers.at(self._host.now() + self.budget.period / 2, self._look, self)

    def _look(self) -> None:
        now = self._host.now()
        for ask in self.budget.decide(now, [GuestView("guest", self._host.footprint_bytes, self._can)]):
            do: Callable[[Ask], int] = {
                Request.EPOCH: lambda a: self._driver.epoch(a.age, a.size),
                Request.PURGE: lambda a: self._driver.purge(),
                Request.SWAP: lambda a: self._host.swap_out(a.size),
            }[ask.request]
            self.budget.answered(ask, do(ask))
        self._again()

    def stop(self) -> None:
        """End it."""
        self._host.timers.cancel(self)
