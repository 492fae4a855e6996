"""emu.guest.buddy: literal cases; tests/stateful/test_buddy.py holds it against a reference."""

import pytest

import emu
from emu.errors import AllocatorError, BadValue, OutOfMemory
from emu.guest.buddy import Buddy, MigrateType
from emu.guest.pcp import PerCpuPages


def blocks(buddy, order):
    return [pfn for pfn, o, _, _ in buddy.free_blocks() if o == order]


def test_boot_leaves_the_largest_blocks_in_ascending_order():
    """And the odd end in smaller ones."""
    buddy = Buddy(2 * 1024 + 512 + 3)
    assert blocks(buddy, 10) == [0, 1024]
    assert blocks(buddy, 9) == [2048]
    assert blocks(buddy, 1) == [2560]
    assert blocks(buddy, 0) == [2562]
    assert buddy.free_frames == 2563


def test_splitting_keeps_the_lower_half():
    """expand(): one frame out of 1024 leaves one block of each lower order behind it."""
    buddy = Buddy(1024)
    assert buddy.alloc(0) == 0
    assert [(pfn, order) for pfn, order, _, _ in buddy.free_blocks()] == [(1 << o, o) for o in range(10)]


def test_freeing_merges_all_the_way_up():
    """The last frame brings the block of order 10 back."""
    buddy = Buddy(1024)
    frames = [buddy.alloc(0) for _ in range(1024)]
    with pytest.raises(OutOfMemory) as caught:
        buddy.alloc(0)
    assert (caught.value.order, caught.value.wanted, caught.value.free) == (0, 1, 0)
    for pfn in reversed(frames):
        buddy.free(pfn, 0)
    assert buddy.nr_free == [0] * 10 + [1]


def test_a_freed_block_goes_to_the_head_unless_a_merge_is_likely():
    """buddy_merge_likely(): the buddy of the block it would merge into is free."""
    buddy = Buddy(64)
    frames = [buddy.alloc(0) for _ in range(64)]
    for pfn in (40, 20):
        buddy.free(pfn, 0)
    assert blocks(buddy, 0) == [20, 40]  # head
    buddy.free(2, 0)
    buddy.free(3, 0)  # an order-1 block 2-3
    buddy.free(0, 0)  # its higher buddy 2-3 is free: tail
    assert blocks(buddy, 0) == [20, 40, 0]
    assert frames[0] == 0


def test_the_report_hook_hears_the_merged_order():
    """Not the order that was freed."""
    heard = []
    buddy = Buddy(16, on_free=heard.append)
    frames = [buddy.alloc(0) for _ in range(4)]
    for pfn in frames:
        buddy.free(pfn, 0)
    assert heard == [0, 1, 0, 4]


@pytest.mark.parametrize("bulk", [False, True])
def test_a_double_free_raises_and_changes_nothing(bulk):
    """So does a free of what was never allocated, of the inside of a block, and outside."""
    buddy = Buddy(2048)
    one, huge = buddy.alloc(0), buddy.alloc(9)
    buddy.free(one, 0)
    before = list(buddy.free_blocks())
    for pfn, order, words in (
        (one, 0, "double free"),
        (huge, 0, "allocated with order 9, not 0"),
        (huge + 1, 0, "isn't allocated"),
        (2048, 0, "outside"),
        (-1, 0, "outside"),
    ):
        with pytest.raises(AllocatorError, match=None if bulk else words):
            buddy.free_bulk([(pfn, 1)]) if bulk else buddy.free(pfn, order)
    with pytest.raises(AllocatorError, match="order 9, not 8"):
        buddy.free(huge, 8)
    assert list(buddy.free_blocks()) == before
    buddy.free(huge, 9)


def test_a_bulk_free_with_one_bad_frame_frees_none():
    """Validation comes first."""
    buddy = Buddy(64)
    [(start, count)] = buddy.alloc_bulk(10)
    before = list(buddy.free_blocks())
    for ranges in ([(start, count), (start + 20, 1)], [(start, 5), (start + 4, 2)], [(start, 65)]):
        with pytest.raises(AllocatorError):
            buddy.free_bulk(ranges)
    assert list(buddy.free_blocks()) == before


@pytest.mark.parametrize("order", [-1, 11, 1.5, "9"])
def test_an_order_out_of_range_is_refused(order):
    """0 to 10."""
    with pytest.raises(BadValue, match="0 to 10"):
        Buddy(16).alloc(order)


def test_unmovable_allocations_take_over_a_pageblock_and_stay_in_it():
    """__rmqueue_fallback(): the largest movable block is stolen whole, the next unmovable ones come from it."""
    buddy = Buddy(4096)
    first = buddy.alloc(0, MigrateType.UNMOVABLE)
    assert buddy.migratetype(first) == MigrateType.UNMOVABLE
    nearby = [buddy.alloc(0, MigrateType.UNMOVABLE) for _ in range(100)]
    assert all(pfn < 1024 for pfn in nearby)
    movable = [buddy.alloc(0) for _ in range(2000)]
    assert all(pfn >= 1024 for pfn in movable)


def test_a_small_steal_for_movable_takes_the_smallest_block():
    """A movable request that can't claim a pageblock splits the least."""
    buddy = Buddy(1024)
    buddy.alloc(0, MigrateType.UNMOVABLE)  # all 1024 are unmovable now: blocks of order 0..9 are left
    while buddy.nr_free[9] or buddy.nr_free[8] or buddy.nr_free[7] or buddy.nr_free[6] or buddy.nr_free[5]:
        buddy.alloc(next(o for o in (9, 8, 7, 6, 5) if buddy.nr_free[o]), MigrateType.UNMOVABLE)
    before = buddy.nr_free[:5]
    assert before == [1, 1, 1, 1, 1]
    buddy.alloc(0, MigrateType.MOVABLE)
    assert buddy.nr_free[:5] == [0, 1, 1, 1, 1]


def test_a_terabyte_boots_at_once():
    """Its arrays are virtual until used."""
    buddy = emu.Buddy(1 << 28)
    assert buddy.free_frames == 1 << 28
    assert buddy.alloc(9) == 0
    assert buddy.first(10, MigrateType.MOVABLE) == 1


def test_rotation_keeps_the_circle():
    """list_rotate_to_front()."""
    buddy = Buddy(8 * 1024)
    buddy.rotate_to_front(10, MigrateType.MOVABLE, 5)
    assert blocks(buddy, 10) == [1024 * n for n in (5, 6, 7, 0, 1, 2, 3, 4)]
    buddy.rotate_to_front(10, MigrateType.MOVABLE, 5)
    assert blocks(buddy, 10)[0] == 5 * 1024
    buddy.alloc(10)
    assert blocks(buddy, 10) == [1024 * n for n in (6, 7, 0, 1, 2, 3, 4)]


def test_the_reported_flag_dies_by_allocation_split_and_merge():
    """And a block that merges on its way back isn't flagged."""
    buddy = Buddy(2048)
    for block in (0, 1):
        buddy.isolate(10, block)
    for block in (0, 1):
        buddy.putback(10, block, reported=True)
    assert buddy.nr_reported[10] == 2
    pfn = buddy.alloc(0)  # split
    assert buddy.nr_reported[10] == 1
    assert not any(reported for _, order, _, reported in buddy.free_blocks() if order < 10)
    buddy.free(pfn, 0)  # merge
    assert buddy.nr_reported[10] == 1
    assert buddy.nr_free[10] == 2
    pfn = buddy.alloc(10)
    buddy.free(pfn, 10)
    assert buddy.nr_reported[10] == 1
    buddy.alloc(10)
    buddy.alloc(10)
    assert buddy.nr_reported[10] == 0
    # two buddies of order 9 put back one after the other
    buddy = Buddy(1024)
    pfn = buddy.alloc(9)
    buddy.isolate(9, 1)
    buddy.free(pfn, 9)
    buddy.putback(9, 1, reported=True)
    assert buddy.nr_free == [0] * 10 + [1]
    assert sum(buddy.nr_reported) == 0


def test_a_frame_on_a_per_cpu_list_can_not_be_freed_to_the_open_block():
    """The last frame that the open block gave away, freed to the lists and then once more."""
    buddy = Buddy(1024)
    lists = PerCpuPages(buddy, batch=8, high=64)
    pfn = buddy.alloc(0)
    lists.free(pfn, 0)
    with pytest.raises(AllocatorError, match="double free"):
        buddy.free(pfn, 0)
    lists.drain()
    assert buddy.nr_free == [0] * 10 + [1]
