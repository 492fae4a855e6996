"""emu.guest.zone and emu.guest.pcp, against a recorded guest's /proc/zoneinfo."""

from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType
from emu.guest.pcp import PerCpuPages, zone_batchsize
from emu.guest.zone import Watermarks, Zone, zone_spans, zone_watermarks


def test_watermarks_are_the_recorded_guests():
    """Debian 6.1, 2 GiB, THP on: its /proc/zoneinfo, to the page."""
    assert zone_watermarks([3840, 502977], thp=True) == [Watermarks(85, 106, 127), Watermarks(11178, 13972, 16766)]


def test_without_thp_the_minimum_is_the_square_root():
    """min_free_kbytes = sqrt(16 * KiB): 4 MiB of 1 GiB."""
    [dma, dma32] = zone_watermarks([4096, 258048], thp=False)
    assert (dma.min, dma32.min) == (16, 1008)


def test_a_cpus_high_mark_is_the_low_watermark():
    """The recorded guest: "high: 13972" in DMA32; batch 63."""
    zone = Zone("DMA32", Buddy(502977), Watermarks(11178, 13972, 16766), above=0, cpus=1)
    assert (zone.pcp.high, zone.pcp.batch) == (13972, 63)
    assert zone_batchsize(3840) == 1


def test_zones_are_cut_at_16_mib_and_4_gib():
    """x86-64, without the hole."""
    assert zone_spans(2048) == [("DMA", 0, 2048)]
    assert zone_spans(1 << 21) == [("DMA", 0, 4096), ("DMA32", 4096, (1 << 20) - 4096), ("Normal", 1 << 20, 1 << 20)]


def pcp(frames=1 << 16, high=1000, batch=63):
    buddy = Buddy(frames)
    return buddy, PerCpuPages(buddy, batch=batch, high=high)


def take(lists, order, count):
    """count blocks in allocation order, refilling as the kernel does."""
    got = []
    while len(got) < count:
        if not lists.available(order, MigrateType.MOVABLE):
            assert lists.refill(order, MigrateType.MOVABLE)
        pfn, n, step = lists.alloc(order, MigrateType.MOVABLE, count - len(got))
        got += [pfn + step * (k << order) for k in range(n)]
    return got


def test_a_freed_frame_is_the_next_one_allocated():
    """Hot end first; nothing reaches the buddy below `high`."""
    buddy, lists = pcp()
    frames = take(lists, 0, 500)
    assert frames == list(range(500))
    free = buddy.free_frames
    lists.free(100, 0)
    lists.free(200, 0, 3)
    assert take(lists, 0, 4) == [202, 201, 200, 100]
    assert buddy.free_frames == free


def test_at_high_a_batch_goes_back_from_the_cold_end_and_doubles():
    """nr_pcp_free(): 63, 126, 252 ... while nothing is allocated, at most high - batch."""
    buddy, lists = pcp()
    take(lists, 0, 63 * 200)
    left = []
    free = buddy.free_frames
    for pfn in range(63 * 150):
        lists.free(pfn, 0)
        if buddy.free_frames != free:
            left.append(buddy.free_frames - free)
            free = buddy.free_frames
    assert left[:7] == [63, 126, 252, 504, 937, 937, 937]
    assert lists.count < 1000


def test_huge_pages_have_a_list_and_hide_in_it():
    """Order 9 goes through the lists, two at a refill."""
    buddy, lists = pcp(high=4096)
    assert take(lists, PAGEBLOCK_ORDER, 1) == [0]
    assert lists.available(PAGEBLOCK_ORDER, MigrateType.MOVABLE) == 1
    lists.free(0, PAGEBLOCK_ORDER)
    assert lists.count == 1024
    assert buddy.free_frames == (1 << 16) - 1024
    lists.drain()
    assert lists.count == 0
    assert buddy.nr_free[10] == 64


def test_freeing_frame_by_frame_or_as_a_run_leaves_the_same_lists():
    """The bulk path is single frees, done many at a time."""
    results = []
    for single in (True, False):
        buddy, lists = pcp()
        take(lists, 0, 63 * 100)
        if single:
            for pfn in range(37, 5000):
                lists.free(pfn, 0)
        else:
            lists.free(37, 0, 5000 - 37)
        results.append((list(buddy.free_blocks()), lists.count, lists.free_factor, take(lists, 0, 200)))
    assert results[0] == results[1]
