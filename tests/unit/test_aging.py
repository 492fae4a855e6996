"""guest.aging: generations in guest seconds, what sinks and goes when, and feedback."""

import pytest

from emu.clock import StepClock
from emu.errors import BadValue
from emu.guest.aging import Aging
from emu.guest.kernel import GuestKernel
from emu.guest.page import Lru
from emu.testing import BytesMemory, MemoryDisk

PAGE = 4096


@pytest.fixture
def kernel():
    kernel = GuestKernel(BytesMemory("32MiB"), StepClock())
    kernel.mount(MemoryDisk({name: name.encode() * (64 * PAGE) for name in "abcd"}))
    return kernel


def run_to(kernel, t):
    while kernel.next_timer is not None and kernel.next_timer <= t:
        kernel.clock.sleep_until(kernel.next_timer)
        kernel.run_timers()
    kernel.clock.sleep_until(t)


def read(kernel, name):
    with kernel.open(name) as file:
        assert file.read(0, file.size) == name.encode() * (64 * PAGE)


def cached(kernel):
    return sorted(inode.path for inode in kernel.vfs.inodes.values() if inode.space.nr_pages)


def test_a_page_goes_between_aging_seconds_and_a_generation_more(kernel):
    """60 s, generations of 15: read at 0 it goes at 60; read at 1, in the same generation, at 75 at the latest."""
    aging = Aging(kernel, seconds=60)
    assert aging.generation == 15
    run_to(kernel, 1)
    read(kernel, "a")
    run_to(kernel, 59)
    assert cached(kernel) == ["a"]
    run_to(kernel, 60)
    assert cached(kernel) == []
    assert kernel.free_bytes == 32 << 20  # drained, for reporting
    assert aging.counters == {"aging_walks": 4, "aging_scanned": 256, "aging_sunk": 0, "aging_freed": 64}
    run_to(kernel, 61)
    read(kernel, "b")
    run_to(kernel, 119)
    assert cached(kernel) == ["b"]


def test_an_access_is_all_that_it_takes_to_stay(kernel):
    """Every 20 s is often enough for 60; the page isn't read again from the disk."""
    Aging(kernel, seconds=60)
    disk = kernel.vfs.disks[0]
    for t in range(0, 300, 20):
        run_to(kernel, t)
        read(kernel, "a")
        if t == 0:
            read(kernel, "b")
    assert cached(kernel) == ["a"]
    assert disk.counters["disk_read_bytes"] == 2 * 64 * PAGE
    assert kernel.memmap.nr(Lru.ACTIVE_FILE) == 64


def test_active_pages_sink_first_and_then_go(kernel):
    """After half of the time they are inactive, after all of it gone."""
    aging = Aging(kernel, seconds=40)
    read(kernel, "a")
    read(kernel, "a")
    assert kernel.memmap.nr(Lru.ACTIVE_FILE) == 64
    run_to(kernel, 20)
    assert (kernel.memmap.nr(Lru.ACTIVE_FILE), kernel.memmap.nr(Lru.INACTIVE_FILE)) == (0, 64)
    assert aging.counters["aging_sunk"] == 64
    run_to(kernel, 40)
    assert cached(kernel) == []


def test_dirty_and_mapped_pages_stay(kernel):
    """Dirty ones until the flusher has written them, mapped ones until they aren't."""
    Aging(kernel, seconds=8)
    with kernel.open("a", "r+") as file:
        file.write(0, b"x" * PAGE)
    with kernel.open("b") as file:
        mapping = kernel.spawn("p").mmap(4 * PAGE, file=file)
    mapping.read(0, 4 * PAGE)
    read(kernel, "c")
    run_to(kernel, 12)
    assert cached(kernel) == ["a", "b"]
    assert kernel.vfs.inodes[next(k for k, i in kernel.vfs.inodes.items() if i.path == "b")].space.nr_pages == 4
    run_to(kernel, 45)  # written at 35
    assert cached(kernel) == ["b"]
    mapping.process.exit()
    run_to(kernel, 60)
    assert cached(kernel) == []


def test_refaults_slow_it_down_and_idleness_speeds_it_up(kernel):
    """regret 5 %: what comes back within four generations doubles the time; a guest that reads nothing halves it."""
    aging = Aging(kernel, seconds=16, feedback=True)
    disk, t = kernel.vfs.disks[0], 0.0
    while aging.seconds < 32:
        read(kernel, "a")
        t += 24
        run_to(kernel, t)
        assert t < 200
    before = disk.counters["disk_read_bytes"]
    for _ in range(50):
        read(kernel, "a")
        t += 24
        run_to(kernel, t)
    # slow enough, most of the time, to keep what is used every 24 s: without feedback all 50 come from the disk
    assert disk.counters["disk_read_bytes"] - before <= 8 * 64 * PAGE
    run_to(kernel, t + 2000)
    assert aging.seconds == 4  # a quarter of what was set
    assert cached(kernel) == []


def test_it_stops(kernel):
    aging = Aging(kernel, seconds=4)
    read(kernel, "a")
    aging.stop()
    run_to(kernel, 100)
    assert cached(kernel) == ["a"]


@pytest.mark.parametrize(
    "options", [{"seconds": 0.1}, {"seconds": 1e9}, {"seconds": 60, "regret": 0}, {"seconds": 60, "regret": 2}]
)
def test_settings_out_of_range_are_refused(kernel, options):
    with pytest.raises(BadValue, match="aging"):
        Aging(kernel, **options)
