"""The OOM killer: which process goes when nothing can be reclaimed (mm/oom_kill.c).

First whoever asked to be told may give memory back: the balloon driver with DEFLATE_ON_OOM is one (oom_notify_list). If
any came, nobody is killed. Else the process with the most points goes: its resident pages, and oom_score_adj
thousandths of all memory on top; -1000 exempts. Its memory is given back at once (the OOM reaper).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.units import FRAME_SIZE

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel
    from emu.guest.process import Process

__all__ = ["OomKiller"]

_EXEMPT = -1000  # OOM_SCORE_ADJ_MIN


class OomKiller:
    """The killer of one guest, and who is told before."""

    def __init__(self, kernel: "GuestKernel") -> None:
        self._kernel = kernel
        #: called when memory is out; return the frames that they have freed. Highest priority first
        self.notifiers: list[Callable[[], int]] = []

    def badness(self, process: "Process", pages: int) -> int | None:
        """Return the points of a process with so many pages; None: it is exempt (oom_badness)."""
        if process.oom_score_adj == _EXEMPT:
            return None
        return pages + process.oom_score_adj * (self._kernel.memory.frames // 1000)

    def select(self, current: "Process | None" = None, held: int = 0) -> "Process | None":
        """Return the process that would go; of equals, the youngest.

        held: pages that `current` has been given in the call under way, and that aren't in its page tables yet.
        """
        chosen, most = None, 0
        for process in self._kernel.processes:
            pages = process.rss_bytes // FRAME_SIZE + (held if process is current else 0)
            points = self.badness(process, pages)
            if points is not None and pages and (chosen is None or points >= most):
                chosen, most = process, points
        return chosen

    def out_of_memory(self, current: "Process | None" = None, held: int = 0) -> "Process | bool | None":
        """Find memory (out_of_memory): True if a notifier gave some, the process killed, or None: there is nobody."""
        if sum(notify() for notify in self.notifiers):
            return True
        victim = self.select(current, held)
        if victim is None:
            return None
        self._kernel.vmstat["oom_kill"] += 1
        victim.kill()
        return victim
