"""guest.writeback: limits, expiry and throttling, in pages and guest seconds."""

import errno

import pytest

from emu.clock import StepClock
from emu.errors import GuestIOError
from emu.guest.kernel import GuestKernel
from emu.guest.page import Lru, Owner
from emu.testing import BytesMemory, MemoryDisk

PAGE = 4096
MIB = 1 << 20


def boot(ram="128MiB"):
    disk = MemoryDisk()
    kernel = GuestKernel(BytesMemory(ram), StepClock(), thp="never")
    kernel.mount(disk)
    return kernel, disk


def run_to(kernel, t):
    while kernel.next_timer is not None and kernel.next_timer <= t:
        kernel.clock.sleep_until(kernel.next_timer)
        kernel.run_timers()
    kernel.clock.sleep_until(t)
    kernel.run_timers()


def written(disk):
    return disk.counters["disk_written_bytes"] // PAGE


def test_limits_are_shares_of_dirtyable_memory():
    """10 and 20 % of free beyond the reserves and of the file lists; not of anonymous memory."""
    kernel, _ = boot()
    free = kernel.free_bytes // PAGE - kernel.totalreserve_pages
    assert kernel.writeback.dirtyable_pages == free + 1
    assert kernel.writeback.limits == ((free + 1) * 10 // 100, (free + 1) * 20 // 100)
    file = kernel.open("f", "x")
    file.write(0, b"x" * MIB)
    assert kernel.memmap.nr(Lru.INACTIVE_FILE) == 256
    assert abs(kernel.writeback.dirtyable_pages - free) < kernel.pcp_bytes // PAGE + 2
    before = kernel.writeback.dirtyable_pages
    kernel.spawn("a").mmap("40MiB").touch()
    assert kernel.writeback.dirtyable_pages < before - 9000
    kernel.writeback.dirty_background_ratio = 30
    background, limit = kernel.writeback.limits
    assert background == limit // 2


def test_pages_are_written_after_30_seconds_by_a_flusher_that_wakes_every_5():
    """Dirty at 1 s, woken at 6, 11 ...: written at 31 at the earliest, that is at 31."""
    kernel, disk = boot()
    run_to(kernel, 1)
    file = kernel.open("f", "x")
    file.write(0, b"x" * (10 * PAGE))
    assert kernel.next_timer == 6
    run_to(kernel, 30.9)
    assert written(disk) == 0
    file.write(20 * PAGE, b"y" * PAGE)  # an inode's time is that of its first dirty page
    run_to(kernel, 31)
    assert written(disk) == 11
    assert kernel.memmap.count(Owner.DIRTY) == 0
    run_to(kernel, 40)
    assert kernel.next_timer is None  # nothing dirty, no timer
    assert kernel.vmstat["nr_written"] == 11


def test_above_the_background_limit_the_flusher_writes_the_oldest_first():
    """When the writer has returned, and down to the limit only."""
    kernel, disk = boot()
    background, limit = kernel.writeback.limits
    a, b = kernel.open("a", "x"), kernel.open("b", "x")
    a.write(0, b"a" * (background // 2 * PAGE))
    assert kernel.next_timer == 5
    b.write(0, b"b" * ((background // 2 + 200) * PAGE))
    assert written(disk) == 0
    assert kernel.next_timer == 0
    assert kernel.vmstat["balance_dirty_pages"] == 0
    run_to(kernel, 0)
    assert b.inode.space.nr_dirty > a.inode.space.nr_dirty
    assert kernel.memmap.count(Owner.DIRTY) <= kernel.writeback.limits[0] < limit


def test_a_writer_is_held_up_above_the_free_run_ceiling():
    """Half-way between the limits: dirty memory never passes the limit, and its own data is what goes to the disk."""
    kernel, disk = boot()
    file = kernel.open("f", "x")
    most = 0
    for at in range(0, 60 * MIB, 128 << 10):
        file.write(at, b"w" * (128 << 10))
        most = max(most, kernel.writeback.nr_dirty / kernel.writeback.limits[1])
    assert kernel.vmstat["balance_dirty_pages"] > 0
    assert kernel.vmstat["nr_throttled_written"] > 0
    assert 0.5 < most <= 1
    assert kernel.clock.now() == 0
    file.fsync()
    assert disk.files["f"] == b"w" * (60 * MIB)


def test_fsync_writes_this_file_and_waits_for_the_disk():
    kernel, disk = boot()
    a, b = kernel.open("a", "x"), kernel.open("b", "x")
    a.write(0, b"a" * PAGE)
    b.write(0, b"b" * PAGE)
    a.fsync()
    assert bytes(disk.files["a"]) == b"a" * PAGE
    assert bytes(disk.files["b"]) == b""
    assert [entry[0] for entry in disk.log if entry[1] == "a"] == ["write", "sync"]


def test_a_disk_that_cant_sync_is_told_too():
    kernel, disk = boot()
    file = kernel.open("f", "x")
    file.write(0, b"x")
    disk.before = lambda op, path, offset: errno.EIO if op == "sync" else 0
    with pytest.raises(GuestIOError, match="fsync failed"):
        file.fsync()
    disk.before = None
    file.fsync()
    assert bytes(disk.files["f"]) == b"x"


def test_one_failing_file_doesnt_hold_the_others_up():
    """It goes to the end of the queue, dirty; sync() writes the rest and raises."""
    kernel, disk = boot()
    for name in "abc":
        kernel.open(name, "x").write(0, name.encode() * PAGE)
    disk.before = lambda op, path, offset: errno.EIO if (op, path) == ("write", "a") else 0
    run_to(kernel, 36)
    assert kernel.memmap.count(Owner.DIRTY) == 1
    assert [inode.path for inode in kernel.writeback.dirty_inodes()] == ["a"]
    with pytest.raises(GuestIOError, match="a: writing it back failed"):
        kernel.sync()
    disk.before = None
    kernel.sync()
    assert bytes(disk.files["a"]) == b"a" * PAGE
