"""Ceiling: what a gate's max may be so that its processes stay within the limits of their cgroups.

A gate counts what its guests are charged; a cgroup counts pages. Charged without a page are frames with the shared
zero page (a write makes it a page without a fault that we see), stock, lazily freed pages that the kernel has dropped,
and what it has swapped. Each of these may become a page without another charge. So from the limit is taken what the
cgroup uses *besides* the guests' charged pages - their interpreters, the host, anything else in there - and what is
left is max:

    max = limit - spare - (usage - backed)

backed, a process's charged pages, is its anonymous memory without its own (interpreter, tables): own is at least what
it has had beyond its charge, at any time. Taken for too small, that makes backed too large, but never larger than the
charge.

Nothing here is read at one moment. Backed and charge are read before and after the usage, and the smaller counts:
what guests take or give back meanwhile makes max smaller, for the one tick.

spare: what may go over max by forced charges (csrc/gate.c).
"""

from collections.abc import Mapping
from pathlib import Path

from emu.gate import Gate
from emu.host.cgroup import memory_limits, room_bytes
from emu.units import FRAME_SIZE

__all__ = ["Ceiling"]


def _anonymous(pid: int) -> int:
    # Documentation/filesystems/proc.rst, table 1-3: size resident shared ...; gone: nothing
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * FRAME_SIZE


class Ceiling:
    """For the processes at a gate. spare: bytes."""

    def __init__(self, gate: Gate, spare: int) -> None:
        self._gate = gate
        self._spare = spare
        self._own: dict[int, int] = {}

    def most(self, processes: Mapping[int, int]) -> int | None:
        """Return the bytes that max may be now, perhaps below 0; None: there is no limit. processes: slot -> pid.

        Raises HostError if what is used can't be read.
        """
        before = self._look(processes)
        room = room_bytes(memory_limits(), self._spare)
        if room is None:
            return None
        after = self._look(processes)
        backed = 0
        for slot, pid in processes.items():
            (charge, memory), (charge_then, memory_then) = before[slot], after[slot]
            own = max(self._own.get(pid, 0), min(memory, memory_then) - max(charge, charge_then))
            self._own[pid] = own
            backed += max(min(charge, charge_then, memory - own, memory_then - own), 0)
        return room + backed

    def _look(self, processes: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        return {slot: (self._gate.slot(slot).charged, _anonymous(pid)) for slot, pid in processes.items()}
