"""Rows of the guest's page cache, beside the host's: hits, reclaim, and reading a tree from the disk.

Hits are compared with preadv and pread of a file that the host has cached, through Python on both sides. Reclaim is all
of it: the guest's lists, freeing, reports, discards, until RSS has fallen. The tree is made for the measure, in the
system's temporary folder; where that is in memory (tmpfs), there is no O_DIRECT, and the last row fails.
"""

import mmap
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

from emu.bench.row import Row, Sides
from emu.bench.rows.reclaim import bare_discard
from emu.bench.stage import Stage
from emu.clock import StepClock
from emu.errors import EmuError, HostError
from emu.machine import Machine
from emu.ram import GuestRam
from emu.ranges import Ranges
from emu.units import FRAME_SIZE
from emu.workloads.grep import Grep

__all__ = ["ROWS"]

_MIB = 1 << 20
_FILE = 64 * _MIB
_SMALL_READS = 16000
_RECLAIMED = 1 << 30
_TREE_FILES = 600


@contextmanager
def _cached_file() -> "Iterator[tuple[Machine, Path]]":
    with tempfile.TemporaryDirectory(prefix="emu-bench-") as folder:
        path = Path(folder, "data")
        path.write_bytes(random.Random(1).randbytes(_FILE))
        with Machine("256MiB", disk=folder, disk_read_only=True, clock=StepClock()) as machine:
            yield machine, path


@contextmanager
def hits_1mib(stage: Stage) -> Iterator[Sides]:
    """Blocks of 1 MiB into one buffer, MiB/ms."""
    with _cached_file() as (machine, path), open(path, "rb", buffering=0) as host:
        file, buffer = machine.guest.open("data"), bytearray(_MIB)
        blocks = range(0, _FILE, _MIB)
        for at in blocks:
            file.readinto(at, buffer)
            if os.preadv(host.fileno(), [buffer], at) != _MIB:
                raise EmuError("the host read less than it has")

        def ours() -> float:
            start = perf_counter_ns()
            for at in blocks:
                file.readinto(at, buffer)
            return len(blocks) * 1e6 / (perf_counter_ns() - start)

        def reference() -> float:
            fd = host.fileno()
            start = perf_counter_ns()
            for at in blocks:
                os.preadv(fd, [buffer], at)
            return len(blocks) * 1e6 / (perf_counter_ns() - start)

        yield Sides(ours, reference)


@contextmanager
def hits_4kib(stage: Stage) -> Iterator[Sides]:
    """Reads of a page, one after another, ns."""
    with _cached_file() as (machine, path), open(path, "rb", buffering=0) as host:
        file = machine.guest.open("data")
        offsets = range(0, _SMALL_READS * FRAME_SIZE, FRAME_SIZE)
        for at in offsets:
            if file.read(at, FRAME_SIZE) != os.pread(host.fileno(), FRAME_SIZE, at):
                raise EmuError("the guest reads something else than the host")

        def ours() -> float:
            start = perf_counter_ns()
            for at in offsets:
                file.read(at, FRAME_SIZE)
            return (perf_counter_ns() - start) / _SMALL_READS

        def reference() -> float:
            fd = host.fileno()
            start = perf_counter_ns()
            for at in offsets:
                os.pread(fd, FRAME_SIZE, at)
            return (perf_counter_ns() - start) / _SMALL_READS

        yield Sides(ours, reference)


@contextmanager
def reclaim(stage: Stage) -> Iterator[Sides]:
    """1 GiB of clean cache, from the lists' tails until RSS has fallen; beside a madvise a page over as many."""
    pages = _RECLAIMED // FRAME_SIZE
    single = Ranges.of((page, 1) for page in range(pages))
    with tempfile.TemporaryDirectory(prefix="emu-bench-") as folder:
        with open(Path(folder, "data"), "wb") as sparse:
            sparse.truncate(_RECLAIMED)
        with (
            Machine("2GiB", "reporting", disk=folder, disk_read_only=True, clock=StepClock()) as machine,
            GuestRam(_RECLAIMED) as bare,
        ):
            guest, buffer = machine.guest, bytearray(_MIB)
            file = guest.open("data")
            machine.settle()

            def ours() -> float:
                for at in range(0, _RECLAIMED, _MIB):
                    file.readinto(at, buffer)
                start = perf_counter_ns()
                freed = guest.reclaim.proactive(pages)
                guest.drain_pages()
                machine.settle()  # the clock is stepped: the reporting passes, and no waiting between them
                took = perf_counter_ns() - start
                if freed != pages or machine.rss_bytes > 64 * _MIB:
                    raise EmuError(f"{freed} of {pages} pages were reclaimed, and {machine.rss_bytes} bytes stay")
                return took / pages

            def reference() -> float:
                bare.touch(0, pages)
                return bare_discard(stage, bare, single)

            yield Sides(ours, reference)


def _make_tree(root: Path) -> None:
    rng = random.Random(7)
    for number in range(_TREE_FILES):
        folder = root / f"d{number % 20}"
        folder.mkdir(exist_ok=True)
        # from a header's size to a library's: 70 MiB in all
        size = int(2 ** rng.uniform(10, 20)) if number % 20 else 1_500_000
        with open(folder / f"f{number}", "wb") as file:
            file.write(rng.randbytes(size))
            os.fsync(file.fileno())


@contextmanager
def grep(stage: Stage) -> Iterator[Sides]:
    """A tree searched by the guest, nothing of it cached, beside reading the files with O_DIRECT and nothing else."""
    with tempfile.TemporaryDirectory(prefix="emu-bench-") as name:
        root = Path(name)
        _make_tree(root)
        with Machine("512MiB", "none", clock=StepClock()) as machine:
            work = Grep(root)
            work.tree.mount(machine)
            size = work.tree.size
            buffer = memoryview(mmap.mmap(-1, 2 * _MIB))

            def ours() -> float:
                machine.guest.drop_caches(3)
                before = machine.stats()["disk_direct_bytes"]
                start = perf_counter_ns()
                for file in work.tree.files:
                    work.search(machine, file.path)
                took = perf_counter_ns() - start
                if machine.stats()["disk_direct_bytes"] - before < size:
                    raise HostError(f"{name} can't be read with O_DIRECT: set TMPDIR to a folder on a disk")
                return size * 1e3 / took

            def reference() -> float:
                start = perf_counter_ns()
                for file in work.tree.files:
                    fd = os.open(root / file.path, os.O_RDONLY | os.O_DIRECT)
                    if os.preadv(fd, [buffer], 0) != file.size:
                        raise EmuError(f"{file.path} was read in part")
                    os.close(fd)
                return size * 1e3 / (perf_counter_ns() - start)

            yield Sides(ours, reference)


ROWS = [
    Row("cache-read-1MiB", "page cache hits in blocks of 1 MiB, beside os.preadv of a file that the host has cached",
        "MiB/ms", "higher", hits_1mib, target=0.5),
    Row("cache-read-4KiB", "page cache hits of 4 KiB, beside os.pread of a file that the host has cached",
        "ns/read", "lower", hits_4kib, target=5.0),
    Row("cache-reclaim", "1 GiB of clean cache: lists, freeing, reports, discards; beside a madvise a page",
        "ns/page", "lower", reclaim, target=2.0),
    Row("cache-grep", "a tree searched, nothing cached, beside reading its files with O_DIRECT and nothing else",
        "MB/s", "higher", grep, target=0.5),
]  # fmt: skip
