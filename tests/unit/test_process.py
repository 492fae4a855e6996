"""emu.guest.process and kernel, on memory without faults."""

import random

import pytest

from emu.errors import AllocatorError, BadValue, GuestError, GuestMemoryError, OomKilled, OutOfMemory
from emu.guest.kernel import GuestKernel
from emu.guest.memory import Op
from emu.testing import ReferenceMemory, StepClock

MIB = 1 << 20


def boot(size="64MiB", **options):
    memory = ReferenceMemory(size)
    return memory, GuestKernel(memory, StepClock(), **options)


def test_a_frame_comes_at_the_first_write_cleared():
    """What its last owner wrote is gone; a read takes no frame."""
    _, kernel = boot()
    process = kernel.spawn("a")
    memory = process.mmap("1MiB")
    memory.touch(write=False)
    assert kernel.used_bytes == 0
    assert memory.read(0, MIB) == bytes(MIB)
    memory.fill(seed=5)
    assert kernel.used_bytes == MIB
    assert memory.verify(seed=5) == []
    memory.munmap()
    assert kernel.used_bytes == 0
    again = process.mmap("1MiB")
    again.touch()
    assert again.read(0, MIB) == bytes(MIB)


def test_a_mixed_up_page_is_found():
    """Content follows from the page's place, so two swapped pages are two wrong ones."""
    _, kernel = boot()
    memory = kernel.spawn("a").mmap("64KiB")
    memory.fill(seed=1)
    table = memory._frame
    table[3], table[9] = table[9], table[3]
    assert memory.verify(seed=1) == [3 * 4096, 9 * 4096]
    assert memory.verify(seed=1, offset=4 * 4096, length=4096) == []


def test_bytes_written_are_bytes_read_across_pages():
    """Whatever the alignment."""
    _, kernel = boot()
    memory = kernel.spawn("a").mmap("64KiB")
    data = random.Random(1).randbytes(10000)
    memory.write(3001, data)
    assert memory.read(3001, 10000) == data
    assert memory.read(0, 3001) == bytes(3001)
    memory.write(4096, bytes(4096))
    assert memory.read(3001, 10000) == data[:1095] + bytes(4096) + data[5191:]


def test_parts_are_unmapped_and_can_not_be_used_any_more():
    """munmap of a part frees its frames; madvise_dontneed keeps the mapping."""
    _, kernel = boot()
    process = kernel.spawn("a")
    memory = process.mmap("1MiB")
    memory.fill(seed=2)
    memory.munmap("256KiB", "512KiB")
    assert process.rss_bytes == MIB // 2
    assert memory.verify(seed=2, length="256KiB") == []
    assert memory.verify(seed=2, offset="768KiB") == []
    with pytest.raises(BadValue, match="aren't mapped"):
        memory.touch("256KiB", 4096)
    memory.madvise_dontneed(0, "128KiB")
    assert memory.read(0, 4096) == bytes(4096)
    assert process.rss_bytes == MIB // 2 - MIB // 8
    process.exit()
    assert kernel.used_bytes == 0
    with pytest.raises(GuestError, match="has exited"):
        process.mmap(4096)


def test_huge_pages_are_taken_whole_and_split_when_cut():
    """thp=True on madvise; always; never."""
    _, kernel = boot()
    memory = kernel.spawn("a").mmap("8MiB", thp=True)
    memory.touch(0, 4096)
    assert kernel.used_bytes == 2 * MIB
    memory.fill(seed=1)
    assert kernel.vmstat["thp_fault_alloc"] == 4
    memory.munmap("1MiB", "2MiB")  # halves of the first two: their mappings are split, they aren't
    assert kernel.vmstat["thp_split_pmd"] == kernel.vmstat["thp_deferred_split_page"] == 2
    assert kernel.vmstat["thp_split_page"] == 0
    assert kernel.used_bytes == 8 * MIB
    assert memory.verify(seed=1, offset="3MiB") == []
    memory.munmap(0, "1MiB")  # the rest of the first: it goes whole
    assert kernel.used_bytes == 6 * MIB
    memory.munmap()
    assert kernel.used_bytes == 0
    assert kernel.deferred_split == []
    for thp, used in (("always", 2 * MIB), ("never", 4096)):
        _, kernel = boot(thp=thp)
        kernel.spawn("a").mmap("4MiB", thp=True).touch("2MiB", 4096)
        assert kernel.used_bytes == used


def test_half_unmapped_huge_pages_are_split_when_memory_is_short():
    """deferred_split_scan(): the out-of-memory path gets the unmapped halves."""
    _, kernel = boot()
    process = kernel.spawn("a")
    memory = process.mmap("40MiB", thp=True)
    memory.fill(seed=1)
    for block in range(20):
        memory.madvise_dontneed(block * 2 * MIB, MIB)
    assert kernel.used_bytes == 40 * MIB
    other = kernel.spawn("b").mmap("30MiB")
    other.fill(seed=2)
    assert kernel.vmstat["thp_split_page"] == 20
    assert kernel.used_bytes == 50 * MIB
    assert other.verify(seed=2) == []
    assert len(memory.verify(seed=1)) == 20 * 256
    memory.fill(seed=3, length="4MiB")  # holes are refilled with small pages
    assert memory.verify(seed=3, length="4MiB") == []
    process.exit()
    assert kernel.used_bytes == 30 * MIB


def test_a_clear_that_stops_leaves_no_page_and_no_frame_behind():
    """Else the next touch would show what another process wrote."""
    memory, kernel = boot()
    old = kernel.spawn("old").mmap("8MiB")
    old.fill(seed=9)
    old.munmap()
    calls = memory.vcpu

    def stopping(op, ranges, arg=0, **options):
        if op is Op.SET:
            raise KeyboardInterrupt
        return calls(op, ranges, arg, **options)

    for thp in (False, True):
        mapping = kernel.spawn("new").mmap("4MiB", thp=thp)
        memory.vcpu = stopping
        with pytest.raises(KeyboardInterrupt):
            mapping.touch()
        memory.vcpu = calls
        assert kernel.used_bytes == 0
        mapping.touch()
        assert mapping.read(0, 4 * MIB) == bytes(4 * MIB)
        mapping.munmap()


def test_a_frame_that_the_host_lost_is_never_allocated_again():
    """And takes nothing else with it; neither when it is cleared nor when it is poisoned on its way back."""
    memory, kernel = boot()
    calls = memory.vcpu
    lost = set()

    def losing(op, ranges, arg=0, **options):
        for first, count, _ in ranges:
            for gfn in range(first, first + count):
                if gfn in lost:
                    raise GuestMemoryError(133, gfn, 0)
        return calls(op, ranges, arg, **options)

    memory.vcpu = losing
    for thp in (False, True):
        mapping = kernel.spawn("a").mmap("4MiB", thp=thp)
        [(pfn, _, _)] = kernel.alloc_frames(1)
        kernel.free_pages([(pfn, 1)])
        bad = (
            pfn if not thp else next(p for p, order, _, _ in kernel.zones[-1].buddy.free_blocks() if order == 10) + 700
        )
        lost.add(bad)
        for _ in range(20):
            try:
                mapping.fill(seed=1)
                break
            except GuestMemoryError:
                continue
        assert mapping.verify(seed=1) == []
        mapping.munmap()
        kernel.drain_pages()
    assert kernel.hwpoison <= lost
    assert kernel.used_bytes == len(kernel.hwpoison) * 4096 > 0
    lost.clear()  # those that were met are out for good; the others were never lost
    kernel.page_poison = 0xAA
    mapping = kernel.spawn("b").mmap("8MiB")
    mapping.touch()
    lost.add(mapping._frame[1000] - 1)
    used = len(kernel.hwpoison)
    mapping.munmap()
    assert kernel.used_bytes == (used + 1) * 4096


def test_whole_pages_are_written_once():
    """Into their new frames; only what was there before is overwritten."""
    memory, kernel = boot()
    mapping = kernel.spawn("a").mmap("1MiB")
    mapping.write(10 * 4096, b"x" * 4096)
    written = []
    calls = memory.write
    memory.write = lambda gpa, data: (written.append(len(data)), calls(gpa, data))
    data = random.Random(4).randbytes(30 * 4096 + 77)
    mapping.write(4096 - 7, data)
    assert sum(written) == len(data)
    assert mapping.read(4096 - 7, len(data)) == data


def test_a_pause_waits_for_what_is_under_way_and_nests():
    """Two pauses are over when both are."""
    _, kernel = boot()
    with kernel.paused():
        with kernel.paused():
            pass
        with pytest.raises(GuestError, match="paused"):
            kernel.spawn("a")
    kernel.spawn("a")


def test_a_double_free_in_the_kernel_raises_and_changes_nothing():
    """Through the per-CPU lists, too."""
    _, kernel = boot()
    [(pfn, _, _)] = kernel.alloc_frames(1)
    kernel.free_pages([(pfn, 1)])
    free = (kernel.free_bytes, kernel.pcp_bytes)
    with pytest.raises(AllocatorError, match="double free"):
        kernel.free_pages([(pfn, 1)])
    for outside in (-1, kernel.memory.frames):
        with pytest.raises((AllocatorError, GuestError)):
            kernel.free_pages([(outside, 1)])
    assert (kernel.free_bytes, kernel.pcp_bytes) == free


def test_out_of_memory_kills_the_largest_process():
    """It was the one that asked: its call raises, all its memory is back, and others go on."""
    _, kernel = boot()
    process = kernel.spawn("hog")
    memory = process.mmap("128MiB")
    small = kernel.spawn("other").mmap(4096)
    small.touch()
    with pytest.raises(OomKilled, match=r"process 1 \(hog\) was killed") as caught:
        memory.fill(seed=3)
    assert caught.value.wanted > 0
    assert caught.value.pid == 1
    assert process.rss_bytes == 0
    assert kernel.used_bytes == small.process.rss_bytes == 4096
    assert kernel.vmstat["oom_kill"] == 1
    with pytest.raises(GuestError, match="killed by the OOM killer"):
        memory.touch()
    with pytest.raises(GuestError, match="killed"):
        process.mmap(4096)
    assert small.process in kernel.processes
    assert process not in kernel.processes


def test_nobody_is_killed_who_is_exempt():
    """Then the call fails, and what was had stays mapped; the min watermark and the reserve stay free."""
    _, kernel = boot()
    process = kernel.spawn("hog")
    process.oom_score_adj = -1000
    memory = process.mmap("128MiB")
    with pytest.raises(OutOfMemory, match=r"process 1 \(hog\).*min watermark"):
        memory.fill(seed=3)
    assert process.rss_bytes == kernel.used_bytes > 40 * MIB
    assert kernel.free_bytes >= sum(zone.watermarks.min for zone in kernel.zones) * 4096
    assert kernel.vmstat["oom_kill"] == 0
    process.exit()
    again = kernel.spawn("next").mmap("40MiB")
    again.fill(seed=4)
    assert again.verify(seed=4) == []


def test_used_free_and_per_cpu_add_up_to_the_ram():
    """At any time."""
    _, kernel = boot()
    rng = random.Random(3)
    maps = []
    for _ in range(200):
        if maps and rng.random() < 0.5:
            maps.pop(rng.randrange(len(maps))).munmap()
        else:
            maps.append(kernel.spawn("p").mmap(4096 * rng.randrange(1, 300), thp=rng.random() < 0.3))
            maps[-1].touch()
        assert kernel.used_bytes + kernel.free_bytes + kernel.pcp_bytes == kernel.ram_bytes
        assert kernel.used_bytes == sum(m.present for m in maps) * 4096


def test_a_paused_guest_runs_nothing():
    """Neither calls nor timers."""
    _, kernel = boot()
    memory = kernel.spawn("a").mmap(4096)
    seen = []
    kernel.timers.at(0, lambda: seen.append(1))
    with kernel.paused():
        with pytest.raises(GuestError, match="paused"):
            memory.touch()
        kernel.run_timers()
        assert kernel.next_timer is None
        assert seen == []
    kernel.run_timers()
    assert seen == [1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.touch(1), "multiples of the page size"),
        (lambda m: m.touch(0, "2MiB"), "outside the mapping"),
        (lambda m: m.read(MIB - 1, 2), "outside the mapping"),
        (lambda m: m.write(MIB, b"x"), "outside the mapping"),
        (lambda m: m.munmap(0, 5000), "multiples"),
        (lambda m: m.process.mmap(0), "is 0"),
        (lambda m: m.process.mmap(5000), "multiple of the frame size"),
    ],
)
def test_bad_ranges_are_refused(call, words):
    """With the numbers."""
    _, kernel = boot()
    memory = kernel.spawn("a").mmap("1MiB")
    with pytest.raises(BadValue, match=words):
        call(memory)
