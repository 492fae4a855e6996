"""Three ways to ask the kernel, held against each other; and rss_delta over everything it takes."""

import mmap
import os
import subprocess
import sys

import pytest

import emu
from emu import residency
from emu.errors import BadValue, HostError
from emu.testing import rss_delta as measure

PAGE = 4096


def test_smaps_is_present_less_zero_pages_and_mincore_is_an_upper_bound(open_ram):
    """What each counts and misses (emu/residency.py)."""
    ram = open_ram("16MiB")
    ram.touch(0, 1000)
    ram.touch(2000, 300, write=False)
    ram.poison([(3000, 5)])
    scan = ram.scan()
    if scan is None:
        pytest.skip("no PAGEMAP_SCAN (Linux 6.7)")
    assert (scan.present, scan.zeropage, scan.rss) == (1300 * PAGE, 300 * PAGE, 1000 * PAGE)
    assert ram.rss_bytes == scan.rss
    assert ram.mincore_bytes() == scan.present
    assert ram.smaps().anon_huge == 0
    ram.lazy_free([(0, 400)])
    assert ram.rss_bytes == 1000 * PAGE
    assert 0 < ram.lazyfree_bytes <= 400 * PAGE


def test_neighbouring_rams_never_share_a_vma():
    """Guard pages: without userfaultfd, adjacent anonymous mappings of one kind would merge."""
    rams = [emu.GuestRam("1MiB", uffd="off") for _ in range(8)]
    try:
        for i, ram in enumerate(rams):
            ram.touch(0, i * 10)
        assert [ram.rss_bytes for ram in rams] == [i * 10 * PAGE for i in range(8)]
    finally:
        for ram in rams:
            ram.close()


def test_smaps_of_a_part_of_a_vma_is_refused():
    """Its figures can't be told apart."""
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        start, lease = emu._native.address_of(mapping)
        with pytest.raises(HostError, match="reaches over"):
            residency.read_smaps(start + PAGE, PAGE)
        emu._native.ffi.release(lease)


def test_delta_of_a_guest_ram(rss_delta, open_ram):
    """The fixture, over a GuestRam: what the block touched, gave back, and nothing else."""
    ram = open_ram("4MiB")
    with rss_delta(ram) as d:
        ram.touch(0, 100)
        assert d.pages == 100
        ram.discard([(0, 30)])
    assert (d.pages, d.bytes) == (70, 70 * PAGE)
    ram.touch(500, 10)
    assert d.pages == 70  # the block has ended
    with rss_delta(ram) as d:
        ram.discard([(0, 1024)])
    assert d.pages == -80


@pytest.mark.pagemap_scan
def test_delta_of_a_private_mapping(rss_delta):
    """MADV_DONTNEED gives back; reading maps zero pages, which cost nothing."""
    with mmap.mmap(-1, 256 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        with rss_delta(mapping) as d:
            for page in range(0, 100):
                mapping[page * PAGE] = 1
        assert d.pages == 100
        with rss_delta(mapping) as d:
            mapping.madvise(mmap.MADV_DONTNEED, 0, 50 * PAGE)
            sum(mapping[page * PAGE] for page in range(100, 256))
        assert d.pages == -50


def test_delta_of_a_bytearray_counts_its_own_pages_only(rss_delta):
    """Exactly the pages that it lies in, though its VMA holds more."""
    buffer = bytearray(1 << 20)
    other = bytearray(8 << 20)
    with rss_delta(buffer) as d:
        other[:] = b"x" * len(other)
        buffer[0] = 1
    assert d.pages == 0
    with rss_delta(memoryview(b"")) as d:
        pass
    assert d.pages == 0


def test_delta_of_a_process(rss_delta):
    """By its pid: another process, whole."""
    code = (
        "import sys; sys.stdin.read(1); x = bytearray(b'x' * (64 << 20)); print('ready', flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with rss_delta(child.pid) as d:
            child.stdin.write("x")
            child.stdin.flush()
            child.stdout.readline()
        child.stdin.write("x")
        child.stdin.flush()
    assert 64 << 20 <= d.bytes <= 140 << 20


@pytest.mark.parametrize("target", ["text", 1.5, None, True, object()])
def test_delta_of_nothing_measurable_is_refused(target):
    """By its type."""
    with pytest.raises(BadValue, match="GuestRam, a buffer or a pid"):
        measure(target)


def test_a_process_that_is_gone_is_an_error():
    """With its pid."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(HostError, match=str(child.pid)), measure(child.pid):
        pass
    assert os.getpid() != child.pid


def test_without_pagemap_scan_a_buffer_is_measured_by_mincore(rss_delta, monkeypatch):
    """The rung below, by switching the upper one off."""
    monkeypatch.setenv("EMU_DISABLE", "pagemap_scan")
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        with rss_delta(mapping) as d:
            for page in range(10):
                mapping[page * PAGE] = 1
    assert d.pages == 10
