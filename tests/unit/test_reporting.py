"""emu.guest.reporting: the facts of a recorded guest, and the state machine."""

import pytest

from emu.errors import BadValue
from emu.guest.buddy import MAX_ORDER, Buddy, MigrateType
from emu.guest.reporting import CAPACITY, PageReporting, ReportingState
from emu.guest.zone import Watermarks, Zone
from emu.timers import Timers


class Rig:
    """Zones, a clock and a host that writes down what it is told."""

    def __init__(self, *sizes, order=9, delay=2.0, marks=None, ok=True):
        self.zones = []
        base = 0
        for i, frames in enumerate(sizes):
            mark = (marks or {}).get(i, Watermarks(0, 0, 0))
            self.zones.append(Zone(f"z{i}", Buddy(frames, base=base), mark, above=0, cpus=1))
            base += -(-frames // 1024) * 1024
        self.timers = Timers()
        self.t = 0.0
        self.calls = []  # (t, entries)
        self.ok = ok
        self.during = lambda: None
        self.reporting = PageReporting(self.zones, self.timers, lambda: self.t, self.report, order=order, delay=delay)

    def report(self, entries):
        self.calls.append((self.t, list(entries)))
        self.during()
        return self.ok

    def run_to(self, t):
        while self.timers.next_due is not None and self.timers.next_due <= t:
            self.t = self.timers.next_due
            self.timers.run_due(self.t)
        self.t = t

    def pages_of_pass(self, t):
        return sum(1 << order for at, entries in self.calls if at == t for _, order in entries)

    def drain(self):
        self.run_to(self.t + 1000)
        self.calls.clear()


def test_470_blocks_of_order_10_are_64_a_pass():
    """Fact 2: (ceil(470 / 512) + 1) * 32 = 64 blocks, 256 MiB, every 2 s; what's left follows at the same pace."""
    rig = Rig(470 * 1024)
    rig.run_to(16)
    per_pass = [rig.pages_of_pass(2.0 * n) // 1024 for n in range(1, 9)]
    assert per_pass == [64] * 7 + [22]
    assert rig.reporting.state is ReportingState.IDLE
    assert all(len(entries) == CAPACITY for _, entries in rig.calls[:-1])
    assert len(rig.calls[-1][1]) == 22


def test_six_lists_of_4086_blocks_are_70_875_mib_a_pass():
    """Fact 2: orders 0 to 5, 9 budgeted reports of 32 from each: 288 * 63 frames = 70.875 MiB."""
    rig = Rig(4086 * 64, order=0)
    rig.drain()
    buddy = rig.zones[0].buddy
    assert sum(count for _, count in buddy.alloc_bulk(4086 * 64)) == 4086 * 64
    for group in range(4086):  # keep the last frame of each 64: blocks of order 0 to 5 become free
        buddy.free_bulk([(64 * group, 63)])
    assert buddy.nr_free == [4086] * 6 + [0] * 5
    rig.run_to(rig.t + 2)
    first = rig.calls[0][0]
    assert rig.pages_of_pass(first) * 4096 == 70.875 * (1 << 20)


def test_the_first_report_comes_2_s_after_a_free_and_not_before():
    """Fact 1, and: a second free meanwhile doesn't push it back."""
    rig = Rig(64 * 1024)
    rig.drain()
    buddy = rig.zones[0].buddy
    start = rig.t
    pfn, other = buddy.alloc(10), buddy.alloc(10)
    buddy.free(pfn, 10)
    assert rig.reporting.state is ReportingState.REQUESTED
    rig.run_to(start + 1.5)
    buddy.free(other, 10)
    assert rig.calls == []
    rig.run_to(start + 10)
    assert [t - start for t, _ in rig.calls] == [2.0]
    assert len(rig.calls[0][1]) == 2


def test_a_free_below_the_order_triggers_nothing_until_it_merges_up():
    """The hook hears the merged order."""
    rig = Rig(64 * 1024)
    rig.drain()
    buddy = rig.zones[0].buddy
    frames = [buddy.alloc(0) for _ in range(1024)]
    for pfn in frames[:-1]:
        if pfn != frames[300]:
            buddy.free(pfn, 0)
    # 512..1022 without the last: nothing of order 9
    assert rig.reporting.state is ReportingState.IDLE
    rig.run_to(rig.t + 10)
    assert rig.calls == []
    buddy.free(frames[-1], 0)
    assert rig.reporting.state is ReportingState.REQUESTED
    rig.run_to(rig.t + 10)
    assert rig.calls[0][1] == [(frames[0] + 512, 9)]


def test_reported_blocks_are_out_of_reach_until_acknowledged():
    """Isolated: an allocator that looks meanwhile doesn't find them."""
    rig = Rig(64 * 1024)
    seen = []
    rig.during = lambda: seen.append(
        {pfn for pfn, _, _, _ in rig.zones[0].buddy.free_blocks()} & {pfn for pfn, _ in rig.calls[-1][1]}
    )
    rig.run_to(2)
    assert seen
    assert not any(seen)
    assert rig.zones[0].buddy.free_frames == 64 * 1024


def test_a_request_during_a_pass_queues_the_next_one():
    """ACTIVE -> REQUESTED -> queued again, 2 s out."""
    rig = Rig(64 * 1024)
    buddy = rig.zones[0].buddy
    held = buddy.alloc(10)
    done = []

    def free_once():
        if not done:
            done.append(buddy.free(held, 10))

    rig.during = free_once
    rig.run_to(2)
    assert rig.reporting.state is ReportingState.REQUESTED
    assert rig.reporting.next_pass == 4.0


def test_the_second_pass_reports_only_what_is_new():
    """The flag survives; a split block is reported again once it has merged."""
    rig = Rig(64 * 1024)
    rig.drain()
    assert rig.zones[0].buddy.nr_reported[10] == 64
    buddy = rig.zones[0].buddy
    pfn = buddy.alloc(0)
    buddy.free(pfn, 0)
    rig.run_to(rig.t + 10)
    assert [entries for _, entries in rig.calls] == [[(pfn & ~1023, 10)]]
    assert buddy.nr_reported[10] == 64


def test_a_zone_short_of_free_memory_is_skipped():
    """low watermark + (32 << order): 15 MiB never pass at order 9 and do at order 0 (fact 5)."""
    marks = {0: Watermarks(85, 106, 127)}
    rig = Rig(3840, 64 * 1024, marks=marks)
    rig.drain()
    assert rig.zones[0].buddy.nr_reported == [0] * 11
    assert rig.zones[1].buddy.nr_reported[10] == 64
    rig = Rig(3840, order=0, marks=marks)
    rig.drain()
    # all but the last block of order 10, whose isolation would leave no more than min + 1024 frames free
    assert rig.reporting.unreported_frames == 1024
    assert rig.zones[0].buddy.nr_reported == [0] * 8 + [1, 1, 2]
    # the gate is "more than", to the frame
    for extra, expected in ((0, 0), (1, 1)):
        low = 32 * 1024 - (CAPACITY << 9) - extra
        rig = Rig(32 * 1024, marks={0: Watermarks(0, low, low)})
        rig.run_to(2)
        assert min(len(rig.calls), 1) == expected


def test_one_kept_frame_in_each_64_blocks_everything_at_order_9_and_not_at_order_0():
    """Fact 6."""
    for order, unreported in ((9, 1), (0, 0)):
        rig = Rig(32 * 1024, 64 * 1024, order=order)
        rig.drain()
        buddy = rig.zones[0].buddy
        buddy.alloc_bulk(32 * 1024)
        for group in range(512):
            buddy.free_bulk([(64 * group + 1, 63)])
        rig.drain()
        reported = sum(count << o for o, count in enumerate(buddy.nr_reported))
        assert reported == (0 if unreported else 512 * 63)


def test_a_driver_error_ends_the_pass_and_flags_nothing():
    """page_reporting_drain(reported=false)."""
    rig = Rig(64 * 1024, ok=False)
    rig.run_to(2)
    assert len(rig.calls) == 1
    assert rig.zones[0].buddy.nr_reported == [0] * 11
    assert rig.zones[0].buddy.free_frames == 64 * 1024
    assert rig.reporting.report_errors == 1
    assert rig.reporting.report_pages == 0


def test_an_exception_in_the_host_loses_no_block_and_reporting_goes_on():
    """The blocks of the failed report come back, and the next free asks again."""
    rig = Rig(64 * 1024)

    def fail():
        rig.during = lambda: None
        raise RuntimeError("host")

    rig.during = fail
    with pytest.raises(RuntimeError):
        rig.run_to(2)
    buddy = rig.zones[0].buddy
    assert buddy.free_frames == 64 * 1024
    assert rig.reporting.state is ReportingState.IDLE
    buddy.free(buddy.alloc(10), 10)
    rig.run_to(100)
    assert rig.reporting.unreported_frames == 0


def test_a_list_cut_short_is_taken_up_where_it_was_left():
    """Rotation: no block is reported twice, none is forgotten."""
    rig = Rig(1000 * 1024)
    rig.run_to(1000)
    pfns = [pfn for _, entries in rig.calls for pfn, _ in entries]
    assert len(pfns) == len(set(pfns)) == 1000


def test_isolating_half_a_pageblock_makes_it_movable():
    """__isolate_free_page(): what comes back goes on the movable list."""
    rig = Rig(64 * 1024)
    buddy = rig.zones[0].buddy
    pfn = buddy.alloc(0, MigrateType.UNMOVABLE)
    assert buddy.migratetype(pfn) == MigrateType.UNMOVABLE
    buddy.free(pfn, 0)
    rig.drain()
    assert buddy.migratetype(pfn) == MigrateType.MOVABLE


@pytest.mark.parametrize("order", [-1, MAX_ORDER + 1, 1.5])
def test_an_order_out_of_range_is_refused(order):
    """0 to 10."""
    with pytest.raises(BadValue, match="0 to 10"):
        Rig(1024, order=order)


def test_a_delay_out_of_range_is_refused():
    """0 to an hour."""
    with pytest.raises(BadValue, match="3600"):
        Rig(1024, delay=-1)
