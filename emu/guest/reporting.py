"""Free page reporting: the guest tells the host which free blocks it may take (mm/page_reporting.c, Linux 6.1).

    idle --- a free merged up to `order` or more ---> requested --- `delay` later ---> active --- pass done ---> idle
                                                          ^                              |
                                                          +--- freed meanwhile, or a list out of budget

Only the step out of idle queues work, `delay` out: a burst of frees is one pass. A pass walks each zone's lists from
`order` up and pulls unreported blocks into a table of 32. A full table goes to the driver, which sleeps until the host
acknowledges; meanwhile the blocks are isolated, out of the allocator's reach. They come back to the tail of their
list, flagged Reported if they didn't merge. One pass makes at most ceil(nr_free / 512) + 1 reports from one list,
where nr_free counts the order's blocks of all types; so an idle guest is drained in some 16 passes, about 30 s at 2 s
each.

A zone is skipped when it has fewer free frames than its low watermark + (32 << order): with order 9 that is 64 MiB,
which ZONE_DMA never has.

The flag lives in the buddy (buddy.py) and dies there, by allocation, split or merge. Checked against a recorded guest:
the first drop 2.0 to 2.2 s after a free; 64 blocks of order 10 a pass from 470; 70.875 MiB a pass from six lists of
some 4,086 blocks.
"""

import enum
from collections.abc import Callable, Sequence

from emu.errors import BadValue
from emu.guest.buddy import MAX_ORDER, PAGEBLOCK_ORDER, MigrateType
from emu.guest.zone import Zone
from emu.timers import Timers

__all__ = ["CAPACITY", "DEFAULT_DELAY", "PageReporting", "ReportingState"]

CAPACITY = 32  # PAGE_REPORTING_CAPACITY: entries of one report
DEFAULT_DELAY = 2.0  # seconds, PAGE_REPORTING_DELAY
DEFAULT_ORDER = PAGEBLOCK_ORDER

#: Called with (pfn, order) entries; returns when the host has acknowledged them; False = the driver failed.
ReportFunction = Callable[[Sequence[tuple[int, int]]], bool]


class ReportingState(enum.Enum):
    """prdev->state."""

    IDLE = 0
    REQUESTED = 1
    ACTIVE = 2


class PageReporting:
    """The reporting worker of one guest. order: 0 to 10; delay: seconds; report: the driver's callback."""

    def __init__(
        self,
        zones: Sequence[Zone],
        timers: Timers,
        now: Callable[[], float],
        report: ReportFunction,
        *,
        order: int = DEFAULT_ORDER,
        delay: float = DEFAULT_DELAY,
    ) -> None:
        if not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
            raise BadValue(f"reporting order {order!r} must be from 0 to {MAX_ORDER}")
        if not 0 <= delay <= 3600:
            raise BadValue(f"reporting delay {delay!r} s must be from 0 to 3600")
        self.order = order
        self.delay = delay
        self.state = ReportingState.IDLE
        #: guest time of the next pass, while one is queued
        self.next_pass: float | None = None
        self.passes = 0
        self.reports = 0
        self.report_pages = 0  # frames reported
        self.report_errors = 0
        self._zones = zones
        self._timers = timers
        self._now = now
        self._report = report
        for zone in zones:
            zone.buddy.on_free = self.notify_free
        self._request()  # page_reporting_register() asks for a first pass

    def notify_free(self, order: int) -> None:
        """The allocator's hook: a free has ended with a block of this order (page_reporting_notify_free)."""
        if order >= self.order:
            self._request()

    def _request(self) -> None:
        # __page_reporting_request()
        if self.state is ReportingState.REQUESTED:
            return
        before, self.state = self.state, ReportingState.REQUESTED
        # if a pass is active, it will see the request when it ends
        if before is ReportingState.IDLE:
            self._queue()

    def _queue(self) -> None:
        self.next_pass = self._now() + self.delay
        self._timers.at(self.next_pass, self._process, self)

    def _process(self) -> None:
        # page_reporting_process()
        self.state = ReportingState.ACTIVE
        self.next_pass = None
        self.passes += 1
        try:
            for zone in self._zones:
                if not self._process_zone(zone):
                    break
        except BaseException:
            self.state = ReportingState.IDLE  # the next free asks again
            raise
        # cmpxchg: whoever asked meanwhile has made it REQUESTED
        if self.state is ReportingState.ACTIVE:
            self.state = ReportingState.IDLE
        else:
            self._queue()

    def _process_zone(self, zone: Zone) -> bool:
        # page_reporting_process_zone(). False = the driver failed.
        if self.gated(zone):
            return True
        table: list[tuple[int, int]] = []  # (order, block), isolated
        for order in range(self.order, MAX_ORDER + 1):
            for migratetype in MigrateType:
                if not self._cycle(zone, order, migratetype, table):
                    return False
        # what is left over from all the lists: one short report
        return self._flush(zone, table) if table else True

    def _cycle(self, zone: Zone, order: int, migratetype: MigrateType, table: list[tuple[int, int]]) -> bool:
        # page_reporting_cycle()
        buddy = zone.buddy
        block = buddy.first(order, migratetype)
        if block < 0:
            return True
        budget = -(-buddy.nr_free[order] // (CAPACITY * 16))
        ok = True
        while block >= 0:
            following = buddy.after(order, block)
            if buddy.reported(order, block):
                block = following
                continue
            if budget < 0:
                # asked for more than a pass may do: come back later, from here
                self.state = ReportingState.REQUESTED
                break
            if len(table) < CAPACITY:
                # __isolate_free_page() refuses below the min watermark
                if not zone.watermark_ok(0, zone.watermarks.min + (1 << order)):
                    break
                buddy.isolate(order, block)
                table.append((order, block))
                block = following
                continue
            # The table is full. The lock is dropped while the host works, so the place is kept as the list's head.
            buddy.rotate_to_front(order, migratetype, block)
            ok = self._flush(zone, table)
            budget -= 1
            block = buddy.first(order, migratetype)
            if not ok:
                break
        if block >= 0:
            buddy.rotate_to_front(order, migratetype, block)
        return ok

    def _flush(self, zone: Zone, table: list[tuple[int, int]]) -> bool:
        # The kernel fills its table from the end: the host sees the last one
        # first.
        buddy = zone.buddy
        entries = [(buddy.base + (block << order), order) for order, block in reversed(table)]
        ok = False
        try:
            ok = self._report(entries)
        finally:
            # whatever came back from the host, or didn't: the blocks are the guest's again
            self._drain(zone, table, ok)
        return ok

    def _drain(self, zone: Zone, table: list[tuple[int, int]], ok: bool) -> None:
        # page_reporting_drain()
        self.reports += 1
        if ok:
            self.report_pages += sum(1 << order for order, _ in table)
        else:
            self.report_errors += 1
        for order, block in reversed(table):
            zone.buddy.putback(order, block, reported=ok)
        table.clear()

    @property
    def counters(self) -> dict[str, int]:
        """Passes, reports, frames reported, reports that failed."""
        return {
            "report_passes": self.passes,
            "reports": self.reports,
            "report_pages": self.report_pages,
            "report_errors": self.report_errors,
        }

    def report_now(self) -> None:
        """Make passes until nothing is left to report, without the delay: somebody waits for the memory."""
        self._timers.cancel(self)
        before = -1
        while self.unreported_frames != before:
            before = self.unreported_frames
            self._process()
            self._timers.cancel(self)
        self.state = ReportingState.IDLE
        self.next_pass = None
        if self.unreported_frames:  # what a watermark keeps back: as if just asked for
            self._request()

    def stop(self) -> None:
        """End the worker (page_reporting_unregister): no more requests, and a queued pass isn't run."""
        self._timers.cancel(self)
        self.state = ReportingState.IDLE
        self.next_pass = None
        for zone in self._zones:
            zone.buddy.on_free = None

    @property
    def budget(self) -> int:
        """Full reports that the next pass may make at most, over all lists that hold unreported blocks."""
        return sum(
            -(-nr_free // (CAPACITY * 16)) + 1
            for zone in self._zones
            if not self.gated(zone)
            for nr_free, nr_reported in zip(
                zone.buddy.nr_free[self.order :], zone.buddy.nr_reported[self.order :], strict=True
            )
            if nr_free > nr_reported
        )

    @property
    def waiting_reports(self) -> int:
        """Reports that it takes to tell of all unreported blocks."""
        blocks = sum(
            sum(zone.buddy.nr_free[self.order :]) - sum(zone.buddy.nr_reported[self.order :])
            for zone in self._zones
            if not self.gated(zone)
        )
        return -(-blocks // CAPACITY)

    def gated(self, zone: Zone) -> bool:
        """Whether a pass would skip the zone now: too little free memory in it."""
        return not zone.watermark_ok(0, zone.watermarks.low + (CAPACITY << self.order))

    @property
    def unreported_frames(self) -> int:
        """Free frames in blocks that a pass would take, and hasn't yet."""
        return sum(
            (zone.buddy.nr_free[order] - zone.buddy.nr_reported[order]) << order
            for zone in self._zones
            for order in range(self.order, MAX_ORDER + 1)
        )

    @property
    def reported_frames(self) -> int:
        """Free frames that carry the Reported flag."""
        return sum(count << order for zone in self._zones for order, count in enumerate(zone.buddy.nr_reported))
