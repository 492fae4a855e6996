"""Snapshot: one immutable picture of a machine, for whoever watches.

Reporters get snapshots (or a recording of them), never guest or host. RSS and LazyFree are the kernel's words;
books_bytes is what our frame states say, and the difference of the two must be 0, or, where the kernel has dropped
lazily freed pages by itself, negative by those.
"""

from dataclasses import dataclass

from emu.frames import FrameState
from emu.guest.kernel import GuestKernel
from emu.histogram import Histogram
from emu.host.hypervisor import Hypervisor
from emu.observe.chain import Arrow, Flow, flows
from emu.observe.pagemap import PageMap, Stage, take_page_map
from emu.observe.usages import UsageView, take_usage_view
from emu.observe.vmstat import read_vmstat
from emu.units import FRAME_SIZE

__all__ = ["FaultView", "ReportingView", "Snapshot", "take_snapshot"]


@dataclass(frozen=True, slots=True)
class ReportingView:
    """The reporting worker: idle, requested or active; guest seconds until the next pass; bytes on either side."""

    state: str
    next_pass_in: float | None
    reported_bytes: int
    unreported_bytes: int


@dataclass(frozen=True, slots=True)
class FaultView:
    """Faults: who serves them and where, and how long sampled ones took, in ns (the floor of a histogram's bucket)."""

    kind: str
    service: str
    placement: str
    samples: int
    p50_ns: int
    p99_ns: int
    max_ns: int

    @classmethod
    def of(cls, kind: str, service: str, placement: str, latency: Histogram) -> "FaultView":
        return cls(kind, service, placement, latency.count, latency.percentile(50), latency.percentile(99), latency.max)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine at guest time t (seconds). All sizes are bytes."""

    t: float
    clock: str
    mechanism: str
    ram_bytes: int
    guest_used_bytes: int
    guest_cached_bytes: int
    guest_free_bytes: int
    guest_pcp_bytes: int
    guest_ballooned_bytes: int
    guest_available_bytes: int
    rss_bytes: int
    #: whether all of rss_bytes was asked of the kernel for this snapshot (csrc/rss.c)
    rss_exact: bool
    lazyfree_bytes: int
    footprint_bytes: int
    books_bytes: int
    #: bytes by frame state
    states: dict[str, int]
    #: bytes by stage: they add up to ram_bytes; the mechanism's own ones first named in `chain`
    stages: dict[Stage, int]
    chain: tuple[Stage, ...]
    flows: tuple[Flow, ...]
    #: free blocks, and of those the reported ones, by order
    free_area: tuple[int, ...]
    reported_area: tuple[int, ...]
    reporting: ReportingView | None
    #: what the guest says of its frames; None: nothing
    usages: UsageView | None
    #: the mechanism's own lines for a viewer: label, text
    panel: tuple[tuple[str, str], ...]
    write_faults: FaultView
    read_faults: FaultView
    #: accesses that brought a frame back from aside, and from the store
    returns: tuple[FaultView, FaultView]
    #: by the kernel: frames aside and copies not yet swept up; the store's pool in memory
    side_bytes: int
    pool_bytes: int
    counters: dict[str, int]
    page_map: PageMap | None

    @property
    def books_difference(self) -> int:
        """RSS minus our books, in bytes."""
        return self.rss_bytes - self.books_bytes


def _placement(host: Hypervisor) -> str:
    if host.ram.service == "thread":
        return "any core" if host.ram.service_cpu is None else f"core {host.ram.service_cpu}"
    return "the faulting vCPU's core"


def take_snapshot(
    guest: GuestKernel,
    host: Hypervisor,
    *,
    t: float,
    clock: str,
    mechanism: str,
    panel: list[tuple[str, str]],
    chain: tuple[Stage, ...],
    arrows: tuple[Arrow, ...],
    exact: bool = False,
    cells: int = 0,
) -> Snapshot:
    """Take a picture.

    Our own books cost two native calls: counters, and a tally of all frames, which takes 0.1 ms a GiB that is used. RSS
    costs what GuestRam.look() does, or, exact, a walk of smaps over all that the process has mapped.
    """
    ram = host.ram
    usages = take_usage_view(ram)
    counters = read_vmstat(guest, host, usages)
    if exact:
        smaps = ram.smaps()
        rss, lazyfree, rss_exact = smaps.rss, smaps.lazyfree, True
    else:
        look = ram.look()
        rss, lazyfree, rss_exact = look.rss, look.lazyfree, look.exact
    side, pool = ram.side_bytes, ram.store.pool_resident
    states = {state.name.lower(): counters[f"nr_{state.name.lower()}"] * FRAME_SIZE for state in FrameState}
    reporting = guest.reporting
    page_map = take_page_map(guest, ram, max(cells, 1))
    orders = range(len(guest.zones[0].buddy.nr_free))
    service, placement = ram.service, _placement(host)
    return Snapshot(
        t=t,
        clock=clock,
        mechanism=mechanism,
        ram_bytes=guest.ram_bytes,
        guest_used_bytes=guest.used_bytes,
        guest_cached_bytes=guest.cached_bytes,
        guest_free_bytes=guest.free_bytes,
        guest_pcp_bytes=guest.pcp_bytes,
        guest_ballooned_bytes=guest.ballooned_bytes,
        guest_available_bytes=guest.available_bytes,
        rss_bytes=rss,
        rss_exact=rss_exact,
        lazyfree_bytes=lazyfree,
        footprint_bytes=rss + side + pool + ram.table_bytes,
        side_bytes=side,
        pool_bytes=pool,
        books_bytes=states["resident"] + states["lazy"],
        states=states,
        stages={stage: n * FRAME_SIZE for stage, n in zip(Stage, page_map.totals, strict=True)},
        chain=chain,
        flows=flows(arrows, counters),
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
        usages=usages,
        panel=tuple(panel),
        write_faults=FaultView.of("write", service, placement, ram.latency(write=True)),
        read_faults=FaultView.of("read", service, placement, ram.latency(write=False)),
        returns=(
            FaultView.of("aside return", service, placement, ram.return_latency()),
            FaultView.of("swap-in", service, placement, ram.return_latency(stored=True)),
        ),
        counters=counters,
        page_map=page_map if cells else None,
    )
