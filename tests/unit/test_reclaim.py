"""guest.reclaim, oom, lru: Linux's rules, literally."""

import errno

import pytest

from emu.clock import StepClock
from emu.errors import OomKilled, OutOfMemory
from emu.guest.kernel import GuestKernel
from emu.guest.page import Insert, Lookup, Lru, MemMap, Owner, PageFlag, Remove, Space
from emu.guest.reclaim import inactive_is_low
from emu.ranges import Ranges
from emu.testing import BytesMemory, MemoryDisk

PAGE = 4096
GIB = (1 << 30) // PAGE


def boot(ram="48MiB", size=40 << 20, **options):
    disk = MemoryDisk({"big": bytes(range(256)) * (size // 256)})
    kernel = GuestKernel(BytesMemory(ram), StepClock(), thp="never", **options)
    kernel.mount(disk)
    return kernel, disk


def read_all(kernel, name="big"):
    with kernel.open(name) as file:
        for at in range(0, file.size, 1 << 20):
            file.read(at, 1 << 20)


@pytest.mark.parametrize(
    ("inactive", "active", "low"),
    [
        # below a gigabyte 1:1
        (100, 100, False),
        (99, 100, True),
        # 1 GiB: int_sqrt(10) = 3; 10 GiB: 10; 100 GiB: 31; 1 TiB: 101
        (GIB // 4, GIB * 3 // 4, False),
        (GIB // 4 - 1, GIB * 3 // 4 + 1, True),
        (GIB * 10 // 11 + 1, 10 * GIB - GIB * 10 // 11 - 1, False),
        (GIB * 10 // 11 - 1, 10 * GIB - GIB * 10 // 11 + 1, True),
        (GIB * 100 // 32, 100 * GIB - GIB * 100 // 32, False),
        (GIB * 1024 // 102 - 1, 1024 * GIB - GIB * 1024 // 102 + 1, True),
    ],
)
def test_the_inactive_ratio(inactive, active, low):
    """mm/vmscan.c, inactive_is_low(): the table in its comment."""
    assert inactive_is_low(inactive, active) is low


def lists(frames=64, pages=64):
    memmap = MemMap(frames)
    return memmap, Space(memmap, pages)


def put(space, *indexes, first=0):
    for k, index in enumerate(indexes):
        space.insert(Ranges.of([(first + k, 1, index)]))


def test_two_touches_promote_and_reclaim_takes_the_rest():
    """0 is touched twice, 1 once, 2 never: all but 0 go, in the order in which they came."""
    memmap, space = lists()
    put(space, 0, 1, 2)
    space.lookup(0, 2, Lookup.MARK)
    space.lookup(0, 1, Lookup.MARK)
    assert list(memmap.list(Lru.ACTIVE_FILE)) == [0]
    assert list(memmap.list(Lru.INACTIVE_FILE)) == [2, 1]
    done = memmap.shrink(Lru.INACTIVE_FILE, 32)
    assert list(done.freed) == [1, 2]
    assert space.cached(0, 1) == 1


def test_a_mapped_page_that_was_accessed_gets_another_round_and_then_is_active():
    """folio_check_references(): accessed once keeps it, referenced; accessed again activates."""
    memmap, space = lists()
    put(space, 0)
    page = Ranges.of([(0, 1)])
    memmap.map(page, 1, young=True)
    done = memmap.shrink(Lru.INACTIVE_FILE, 1)
    assert (list(done.freed), list(done.mapped), done.activated) == ([], [], 0)
    assert memmap.look(0).flags == PageFlag.REFERENCED
    memmap.map(page, 0, young=True)
    assert memmap.shrink(Lru.INACTIVE_FILE, 1).activated == 1
    memmap.shrink(Lru.ACTIVE_FILE, 1)
    memmap.shrink(Lru.INACTIVE_FILE, 1)  # its reference of before is used up
    done = memmap.shrink(Lru.INACTIVE_FILE, 1)
    assert list(done.mapped) == [0]  # for whoever unmaps


def test_dirty_pages_wait_for_the_flusher_and_then_are_the_next_to_go():
    """Activated with PG_reclaim, rotated to the inactive tail at the end of writeback."""
    memmap, space = lists()
    put(space, 0, 1)
    space.flag(0, 1, PageFlag.DIRTY)
    done = memmap.shrink(Lru.INACTIVE_FILE, 1)
    assert (list(done.freed), done.dirty, done.activated) == ([], 1, 1)
    assert memmap.look(0).flags & (PageFlag.ACTIVE | PageFlag.RECLAIM) == PageFlag.ACTIVE | PageFlag.RECLAIM
    space.flag(0, 1, PageFlag.WRITEBACK, PageFlag.DIRTY)
    assert memmap.look(0).owner is Owner.WRITEBACK
    space.flag(0, 1, 0, PageFlag.WRITEBACK)
    assert list(memmap.list(Lru.INACTIVE_FILE)) == [1, 0]
    assert list(memmap.shrink(Lru.INACTIVE_FILE, 1).freed) == [0]


def test_a_refault_within_the_active_lists_length_is_activated():
    """mm/workingset.c: distance = evictions and activations since; at most the active list, or it starts inactive."""
    for active, others, activated in ((3, 2, True), (3, 3, False), (0, 0, False)):
        memmap, space = lists()
        put(space, *range(active), first=40)
        for _ in range(2):
            space.lookup(0, active, Lookup.MARK)
        assert memmap.nr(Lru.ACTIVE_FILE) == active
        put(space, 20, *range(30, 30 + others), first=0)
        # the page itself, and then so many others: distance is 1 + others
        assert list(memmap.shrink(Lru.INACTIVE_FILE, 1 + others).freed) == list(range(1 + others))
        space.insert(Ranges.of([(0, 1, 20)]))
        assert memmap.stats.workingset_refault == 1
        assert memmap.stats.workingset_activate == activated
        assert (PageFlag.ACTIVE in memmap.look(0).flags) is activated


def test_a_page_that_was_active_comes_back_as_workingset():
    """The shadow carries it: thrashing, and not just a refault."""
    memmap, space = lists()
    put(space, 0, 1, 2)
    for _ in range(2):
        space.lookup(0, 3, Lookup.MARK)
    memmap.shrink(Lru.ACTIVE_FILE, 1)
    memmap.shrink(Lru.INACTIVE_FILE, 1)
    space.insert(Ranges.of([(10, 1, 0)]))
    assert memmap.stats.workingset_restore == 1
    assert PageFlag.WORKINGSET | PageFlag.ACTIVE in memmap.look(10).flags


def test_a_rewritten_page_is_no_refault():
    """filemap_add_folio() with __GFP_WRITE; and truncation takes shadows along, as drop_caches leaves none."""
    memmap, space = lists()
    put(space, 0, 1, 2)
    assert len(space.remove(0, 3, Remove.EVICT)) == 3
    space.insert(Ranges.of([(0, 1, 0)]), Insert.WRITE)
    assert memmap.stats.workingset_refault == 0
    space.remove(0, 1, Remove.INVALIDATE)
    space.insert(Ranges.of([(0, 1, 0)]))
    assert memmap.stats.workingset_refault == 0
    space.resize(2)
    space.resize(3)
    space.insert(Ranges.of([(2, 1, 2)]))
    assert memmap.stats.workingset_refault == 0
    space.insert(Ranges.of([(1, 1, 1)]))
    assert memmap.stats.workingset_refault == 1


def test_kswapd_keeps_memory_between_low_and_high():
    """Cache fills a guest up to its low watermark, and then the oldest of it gives way: no direct reclaim, no OOM."""
    kernel, _ = boot()
    read_all(kernel)
    assert kernel.vmstat["pgsteal_kswapd"] == kernel.vmstat["pgsteal_direct"] == 0
    again = MemoryDisk({"more": bytes(30 << 20)})
    kernel.mount(again, "m")
    read_all(kernel, "m/more")
    assert kernel.vmstat["pgsteal_kswapd"] > 0
    assert kernel.vmstat["allocstall"] == kernel.vmstat["pgsteal_direct"] == 0
    low = sum(zone.watermarks.low for zone in kernel.zones) * PAGE
    assert kernel.free_bytes + kernel.pcp_bytes >= low * 9 // 10
    assert kernel.vmstat["pgscan_kswapd"] >= kernel.vmstat["pgsteal_kswapd"]
    # what was read last is there, what was read first isn't
    with kernel.open("m/more") as new, kernel.open("big") as old:
        assert new.cached_bytes > old.cached_bytes
        assert old.inode.space.cached(0, 1) == 0
        assert new.inode.space.cached((30 << 20) // PAGE - 1, 1) == 1


def test_the_order_is_kswapd_then_direct_reclaim_then_the_oom_killer():
    """Each is tried only when the one before has nothing more to give."""
    kernel, _ = boot("32MiB")
    order = []
    for name in ("kswapd", "direct"):
        real = getattr(kernel.reclaim, name)
        setattr(kernel.reclaim, name, lambda real=real, name=name: (order.append(name), real())[1])
    real_oom = kernel.oom.out_of_memory
    kernel.oom.out_of_memory = lambda *args: (order.append("oom"), real_oom(*args))[1]
    process = kernel.spawn("a")
    process.mmap("20MiB").touch()
    assert order == []
    with pytest.raises(OomKilled):
        process.mmap("20MiB").touch()
    assert order[0] == "kswapd"
    assert order.index("kswapd") < order.index("direct") < order.index("oom")
    assert order.count("oom") == 1
    assert kernel.vmstat["allocstall"] == order.count("direct")


def test_cache_gives_way_to_a_burst_of_four_fifths_of_the_ram():
    """No OOM: all of the cache is reclaimable."""
    kernel, _ = boot("48MiB")
    read_all(kernel)
    assert kernel.cached_bytes > 35 << 20
    process = kernel.spawn("burst")
    memory = process.mmap((48 << 20) * 8 // 10 // PAGE * PAGE)
    memory.fill(seed=1)
    assert memory.verify(seed=1) == []
    assert kernel.vmstat["oom_kill"] == 0
    assert kernel.vmstat["pgsteal_kswapd"] + kernel.vmstat["pgsteal_direct"] > 5000
    with kernel.open("big") as file:
        assert file.read(0, 1000) == bytes(range(256)) * 3 + bytes(range(232))


def test_dirty_cache_gives_way_too_by_being_written():
    """Reclaim wakes the flusher when it meets nothing else."""
    kernel, disk = boot("48MiB")
    kernel.writeback.dirty_background_ratio = kernel.writeback.dirty_ratio = 100
    with kernel.open("big", "r+") as file:
        for at in range(0, 36 << 20, 1 << 20):
            file.write(at, b"D" * (1 << 20))
    assert kernel.memmap.count(Owner.DIRTY) > 8000
    kernel.spawn("burst").mmap("30MiB").fill(seed=1)
    assert kernel.vmstat["flusher_woken"] > 0
    assert kernel.vmstat["oom_kill"] == 0
    kernel.sync()
    assert disk.files["big"][: 36 << 20] == b"D" * (36 << 20)


def test_dirty_cache_that_cant_be_written_isnt_dropped():
    """The disk fails: the burst dies, and every byte is still there."""
    kernel, disk = boot("48MiB")
    kernel.writeback.dirty_background_ratio = kernel.writeback.dirty_ratio = 100
    disk.before = lambda op, path, offset: errno.EIO if op == "write" else 0
    with kernel.open("big", "r+") as file:
        for at in range(0, 30 << 20, 1 << 20):
            file.write(at, b"D" * (1 << 20))
        with pytest.raises(OomKilled):
            kernel.spawn("burst").mmap("30MiB").fill(seed=1)
        disk.before = None
        assert file.read(0, 30 << 20) == b"D" * (30 << 20)
        with pytest.raises(OSError, match="earlier writeback failed"):
            file.fsync()
        file.fsync()
    assert disk.files["big"][: 30 << 20] == b"D" * (30 << 20)


def test_mapped_pages_are_unmapped_and_taken_and_fault_in_again():
    """try_to_unmap(): reclaim may, drop_caches may not."""
    kernel, disk = boot("48MiB")
    with kernel.open("big") as file:
        mapping = kernel.spawn("reader").mmap(8 << 20, file=file)
    mapping.touch(write=False)
    assert kernel.memmap.stats.nr_mapped == 2048
    assert kernel.drop_caches(3) == 0
    kernel.spawn("burst").mmap("42MiB").fill(seed=1)
    assert kernel.memmap.stats.nr_mapped < 2048
    before = disk.counters["disk_read_bytes"]
    assert mapping.read(0, 8 << 20) == bytes(range(256)) * (8 << 12)
    assert disk.counters["disk_read_bytes"] > before
    assert kernel.vmstat["pgmajfault"] > 0


def test_the_oom_killer_takes_the_largest_by_points():
    """Resident pages, and oom_score_adj thousandths of all memory; -1000 is spared."""
    kernel, _ = boot("64MiB")
    small, large, spared, adjusted = (kernel.spawn(name) for name in ("small", "large", "spared", "adjusted"))
    for process, size in ((small, 1), (large, 8), (spared, 12), (adjusted, 2)):
        process.mmap(size << 20).touch()
    spared.oom_score_adj, adjusted.oom_score_adj = -1000, 50
    assert kernel.oom.select() is large
    adjusted.oom_score_adj = 200  # 200/1000 of 16,384 pages, and 512
    assert kernel.oom.select() is adjusted
    kernel.oom.out_of_memory()
    assert kernel.oom.select() is large
    for _ in range(2):
        kernel.oom.out_of_memory()
    assert kernel.oom.select() is None
    assert kernel.oom.out_of_memory() is None
    assert kernel.used_bytes == spared.rss_bytes == 12 << 20
    with pytest.raises(OutOfMemory):
        spared.mmap("60MiB").touch()


def test_anonymous_pages_are_on_their_lists_and_come_off_them():
    """Inactive at first, as since 5.9; not scanned, since there is no swap."""
    kernel, _ = boot("32MiB")
    process = kernel.spawn("a")
    memory = process.mmap("4MiB")
    memory.touch()
    assert kernel.memmap.nr(Lru.INACTIVE_ANON) == kernel.memmap.count(Owner.ANON) == 1024
    file = kernel.create_file("1MiB")
    file.fill(seed=1)
    assert kernel.memmap.nr(Lru.UNEVICTABLE) == kernel.memmap.count(Owner.SHMEM) == 256
    kernel.reclaim.direct()
    memory.madvise_dontneed("1MiB", "1MiB")
    assert kernel.memmap.nr(Lru.INACTIVE_ANON) == 768
    process.exit()
    file.unlink()
    assert [kernel.memmap.nr(lru) for lru in Lru] == [0] * 5
