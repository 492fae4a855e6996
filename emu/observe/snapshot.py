"""Snapshot: one immutable picture of a machine, for whoever watches.

Reporters get snapshots (or a recording of them), never guest or host. RSS and LazyFree are the kernel's words;
books_bytes is what our frame states say, and the difference of the two must be 0, or, where the kernel has dropped
lazily freed pages by itself, negative by those.
"""

from dataclasses import dataclass

from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.observe.vmstat import read_vmstat
from emu.ram import FrameState
from emu.units import FRAME_SIZE

__all__ = ["ReportingView", "Snapshot", "take_snapshot"]


@dataclass(frozen=True, slots=True)
class ReportingView:
    """The reporting worker: idle, requested or active; guest seconds until the next pass; bytes on either side."""

    state: str
    next_pass_in: float | None
    reported_bytes: int
    unreported_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine at guest time t (seconds). All sizes are bytes."""

    t: float
    mechanism: str
    ram_bytes: int
    guest_used_bytes: int
    guest_cached_bytes: int
    guest_free_bytes: int
    guest_pcp_bytes: int
    rss_bytes: int
    lazyfree_bytes: int
    footprint_bytes: int
    books_bytes: int
    #: bytes by frame state
    states: dict[str, int]
    #: free blocks, and of those the reported ones, by order
    free_area: tuple[int, ...]
    reported_area: tuple[int, ...]
    reporting: ReportingView | None
    counters: dict[str, int]

    @property
    def books_difference(self) -> int:
        """RSS minus our books, in bytes."""
        return self.rss_bytes - self.books_bytes


def take_snapshot(t: float, mechanism: str, guest: GuestKernel, host: Hypervisor) -> Snapshot:
    """Take a picture.

    Our own books cost one native call and no walk; smaps costs the kernel a walk over all that the process has mapped.
    """
    counters = read_vmstat(guest, host)
    look = host.ram.look()
    states = {state.name.lower(): counters[f"nr_{state.name.lower()}"] * FRAME_SIZE for state in FrameState}
    reporting = guest.reporting
    orders = range(len(guest.zones[0].buddy.nr_free))
    return Snapshot(
        t=t,
        mechanism=mechanism,
        ram_bytes=guest.ram_bytes,
        guest_used_bytes=guest.used_bytes,
        guest_cached_bytes=guest.cached_bytes,
        guest_free_bytes=guest.free_bytes,
        guest_pcp_bytes=guest.pcp_bytes,
        rss_bytes=look.rss,
        lazyfree_bytes=look.lazyfree,
        footprint_bytes=look.rss + host.ram.table_bytes,
        books_bytes=states["resident"] + states["lazy"],
        states=states,
        free_area=tuple(sum(zone.buddy.nr_free[order] for zone in guest.zones) for order in orders),
        reported_area=tuple(sum(zone.buddy.nr_reported[order] for zone in guest.zones) for order in orders),
        reporting=None
        if reporting is None
        else ReportingView(
            state=reporting.state.name.lower(),
            next_pass_in=None if reporting.next_pass is None else max(reporting.next_pass - t, 0.0),
            reported_bytes=reporting.reported_frames * FRAME_SIZE,
            unreported_bytes=reporting.unreported_frames * FRAME_SIZE,
        ),
        counters=counters,
    )
