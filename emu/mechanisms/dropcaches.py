"""reporting+dropcaches: free page reporting, and a cron job in the guest that drops its caches.

What people do today about the cache that reporting can't see. Decided by the guest's administrator, by period, after a
memory-heavy process, or both; guest code runs. It can't tell what will be used again: all clean cache goes, and the
next reads pay.

Settings: every (seconds or text between two drops, 30s; 0: never), after (bytes: a process that ends with at least so
much resident causes a drop; off by default), sync (yes: write dirty pages first, so that they can be dropped), order,
delay (as of reporting).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue, GuestIOError
from emu.guest.kernel import GuestKernel
from emu.guest.process import Process
from emu.host.hypervisor import Hypervisor
from emu.mechanisms.reporting import REPORTING_PARSERS, OverReporting, parse_yes
from emu.units import format_size, parse_duration, parse_size

__all__ = ["DropCaches"]


@dataclass(frozen=True, slots=True)
class DropCaches(OverReporting):
    """Reporting and drop_caches. every and delay are in seconds, after in bytes."""

    every: float = 30.0
    after: int | None = None
    sync: bool = True

    name: ClassVar[str] = "reporting+dropcaches"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "every": lambda text: parse_duration(text, "every"),
        "after": lambda text: parse_size(text, "after"),
        "sync": parse_yes,
        **REPORTING_PARSERS,
    }

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Bind reporting, and queue the first drop."""
        if self.every and not 0.01 <= self.every <= 86400:
            raise BadValue(f"every {self.every!r} s must be 0, or from 0.01 to 86400")
        if not self.every and self.after is None:
            raise BadValue("neither every nor after is given: nothing would be dropped")
        self._reporting.attach(guest, host)
        if self.every:
            self._queue(guest, self.every, again=True)
        if self.after is not None:
            guest.exit_hooks[self.name] = lambda process: self._exited(guest, process)

    def _queue(self, guest: GuestKernel, delay: float, *, again: bool) -> None:
        def drop() -> None:
            if self.sync:
                try:
                    guest.sync()
                except GuestIOError:
                    pass  # its pages stay dirty, and so stay; fsync will tell who wrote them
            guest.drop_caches(3)
            if again:
                self._queue(guest, self.every, again=True)

        guest.timers.at(guest.clock.now() + delay, drop, self)

    def _exited(self, guest: GuestKernel, process: Process) -> None:
        if self.after is not None and process.rss_bytes >= self.after:
            self._queue(guest, 0.0, again=False)

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Stop."""
        guest.timers.cancel(self)
        guest.exit_hooks.pop(self.name, None)
        self._reporting.detach(guest, host)

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """When it drops, and reporting's first lines."""
        when = [f"{self.every:g} s"] if self.every else []
        if self.after is not None:
            when.append(f"{format_size(self.after)} exit")
        dropped = guest.vmstat["drop_pagecache"]
        return [
            ("drops", ", ".join(when)),
            ("dropped", f"{dropped:,} times"),
            *self._reporting.panel(guest, host)[:3],
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether there is cache that the next drop takes, or reporting has something."""
        return (self.every > 0 and guest.cached_bytes > 0) or self._reporting.pending(guest)
