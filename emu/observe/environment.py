"""The machine that emu runs on: what every measurement must say of it, and what `emu doctor` finds by trying.

A feature counts as there when it did what it should, on memory of our own, not when a version number promises it.
"""

import errno
import mmap
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from emu import residency
from emu._native import disabled
from emu.errors import EmuError
from emu.host.cgroup import memory_limits
from emu.host.disk import DirectoryDisk
from emu.ram import GuestRam
from emu.uffd import Features, Probe, probe
from emu.units import FRAME_SIZE, format_size

__all__ = ["Check", "check_features", "environment"]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _chosen(path: str) -> str:
    # "always [madvise] never" -> madvise
    text = _read(path) or ""
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else text or "unknown"


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Return the facts about this machine that bear on a measurement. Sizes are bytes; None = no limit."""
    rlimit = resource.getrlimit(resource.RLIMIT_AS)[0]
    can = probe()
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "swap_bytes": psutil.swap_memory().total,
        "thp": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "cgroup_limit_bytes": min((each.limit for each in memory_limits()), default=None),
        "overcommit_memory": int(_read("/proc/sys/vm/overcommit_memory") or -1),
        "rlimit_as_bytes": None if rlimit == resource.RLIM_INFINITY else rlimit,
        "uffd_rung": can.rung.name.lower(),
        "uffd_door": can.door,
        "uffd_why": can.why,
        "uffd_features": [feature.name or hex(feature) for feature in can.features],
    }


@dataclass(frozen=True, slots=True)
class Check:
    """One thing tried: whether it worked, what was seen, and what emu does without it."""

    name: str
    ok: bool
    seen: str
    instead: str


_SIZE = 1 << 20
_FRAMES = _SIZE // 4096


def _expect(got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise EmuError(f"{what}: {got}, wanted {wanted}")


def _try_inline() -> str:
    with GuestRam(_SIZE, service="inline") as ram:
        ram.touch(0, _FRAMES)
        _expect(ram.rss_bytes, _SIZE, "RSS after touching")
        return f"{_FRAMES} faults served by SIGBUS"


def _try_thread() -> str:
    with GuestRam(_SIZE, service="thread") as ram:
        ram.touch(0, _FRAMES)
        _expect(ram.rss_bytes, _SIZE, "RSS after touching")
        return f"{_FRAMES} faults served by a thread"


def _try_poison(can: Probe) -> str:
    if Features.POISON not in can.features:
        raise EmuError("no UFFD_FEATURE_POISON (Linux 6.6)" if can.features else "no userfaultfd")
    if "poison" in disabled():
        raise EmuError("switched off")
    with GuestRam(_SIZE, service="thread") as ram:
        ram.poison([(3, 1)])
        try:
            ram.read(3 * 4096, 1)
        except EmuError:
            return "a poisoned frame raised, and didn't read as zero"
        raise EmuError("a poisoned frame could be read")


def _try_process_madvise() -> str:
    with GuestRam(_SIZE, uffd="off") as ram:
        if not ram.vectored:
            raise EmuError("a process can't MADV_DONTNEED itself by process_madvise (Linux 6.13)")
        ram.touch(0, _FRAMES)
        ram.discard([(gfn, 1) for gfn in range(0, _FRAMES, 2)])
        _expect(ram.rss_bytes, _SIZE // 2, "RSS after discarding every other frame")
        return f"{_FRAMES // 2} ranges in {ram.stats()['discard_calls']} call"


def _try_pagemap_scan() -> str:
    with GuestRam(_SIZE, uffd="off") as ram:
        ram.touch(0, 100)
        ram.touch(100, 10, write=False)
        scan = residency.scan(ram.address, ram.size)
        if scan is None:
            raise EmuError("no PAGEMAP_SCAN (Linux 6.7)")
        _expect((scan.rss, scan.zeropage), (100 * 4096, 10 * 4096), "resident and zero pages")
        return "resident and zero pages told apart"


def _try_lazy() -> str:
    with GuestRam(_SIZE, uffd="off") as ram:
        ram.fill(0, _FRAMES, seed=1)
        ram.lazy_free([(0, _FRAMES)])
        ram.fill(0, 16, seed=2)
        dropped = ram.lazy_drop()
        _expect(ram.verify(0, 16, seed=2), [], "written frames that were dropped")
        if not dropped:
            raise EmuError("MADV_PAGEOUT dropped nothing")
        return f"{dropped} of {_FRAMES - 16} lazily freed frames dropped on demand"


def _try_aside(how: str, without: str) -> str:
    with GuestRam(_SIZE, disable=without) as ram:
        if ram.aside_how != how:
            raise EmuError(
                "no UFFDIO_MOVE (Linux 6.8), or no /proc/self/pagemap"
                if how == "move"
                else "no write protection (Linux 5.7)"
            )
        ram.fill(0, _FRAMES, seed=1)
        _expect(ram.set_aside([(0, _FRAMES)]), _FRAMES, "frames set aside")
        _expect((ram.rss_bytes, ram.side_bytes), (0, _SIZE), "RSS and aside")
        _expect(ram.verify(0, _FRAMES, seed=1), [], "wrong frames after they came back")
        return f"{_FRAMES} frames left and came back at a touch"


def _try_store() -> str:
    with GuestRam(_SIZE) as ram, tempfile.TemporaryDirectory(prefix="emu-doctor-") as folder:
        ram.open_store(0, file=folder)
        ram.fill(0, _FRAMES, seed=1)
        _expect(ram.swap_out([(0, _FRAMES)]), _FRAMES, "frames swapped out")
        _expect(ram.verify(0, _FRAMES, seed=1), [], "wrong frames after they came back")
        return ram.store_text.replace(folder, str(Path(folder).parent))


def _try_disk() -> str:
    # through the guest: written, synced, and read back from the disk
    with tempfile.TemporaryDirectory(prefix="emu-doctor-") as folder:
        disk = DirectoryDisk(folder)
        try:
            file = disk.open("f", write=True, create=True)
            with mmap.mmap(-1, 2 * FRAME_SIZE) as buffer, memoryview(buffer) as data:
                data[:] = b"emu!" * (len(data) // 4)
                file.write(0, data)
                file.sync()
                data[:] = bytes(len(data))
                _expect(file.read(0, data), len(data), "bytes read back")
                _expect(bytes(data[:8]), b"emu!emu!", "what was written")
            file.close()
            try:
                disk.open("../f")
            except OSError as error:
                _expect(error.errno, errno.EXDEV, "a path that leads out")
        except OSError as error:
            raise EmuError(f"{folder}: {error.strerror}") from None
        finally:
            disk.close()
        how = {"direct": "O_DIRECT", "buffered": "the host's cache, dropped behind", "memory": "in memory (tmpfs)"}
        return f"in {Path(folder).parent}: {how[file.access]}"


def check_features(mechanisms: Mapping[str, Callable[[], str]]) -> list[Check]:
    """Try each feature that emu uses, then each mechanism; nothing raises."""
    can = probe()

    def rung() -> str:
        if can.rung == 0:
            raise EmuError(can.why or "no userfaultfd")
        return f"{can.rung.name.lower()}, by {can.door}"

    tries: list[tuple[str, Callable[[], str], str]] = [
        ("userfaultfd", rung, "the kernel zero-fills; discard and reporting work, the books are kept by the accesses"),
        ("inline fault service", _try_inline, "the thread service"),
        ("thread fault service", _try_thread, "the inline service, or none"),
        (
            "UFFDIO_POISON",
            lambda: _try_poison(can),
            "lost frames are made inaccessible (a call raises, a raw access dies by SIGSEGV)",
        ),
        (
            "process_madvise on ourselves",
            _try_process_madvise,
            "one madvise per range: 3x the time for scattered frames",
        ),
        ("PAGEMAP_SCAN", _try_pagemap_scan, "RSS by smaps; buffers that aren't a whole VMA by mincore"),
        ("MADV_FREE and MADV_PAGEOUT", _try_lazy, "--return lazy gives memory back only when the kernel wants it"),
        (
            "set aside by UFFDIO_MOVE",
            lambda: _try_aside("move", ""),
            "by write protection and a copy; without that: no grace, inactive, swap",
        ),
        ("set aside by a copy", lambda: _try_aside("wp", "move"), "-"),
        ("swap to a store", _try_store, "-m swap can't be had"),
        ("a guest's disk", _try_disk, "Machine(disk=...) and the workloads over files can't be had"),
        *((f"mechanism {name}", attempt, "-") for name, attempt in mechanisms.items()),
    ]
    checks = []
    for name, attempt, instead in tries:
        try:
            checks.append(Check(name, True, attempt(), ""))
        except EmuError as error:
            checks.append(Check(name, False, str(error), instead))
    return checks


def describe_limits(facts: dict[str, Any]) -> list[str]:
    """Return what stands in the way of a large guest, each with its remedy."""
    notes = []
    if facts["overcommit_memory"] == 2:
        notes.append("vm.overcommit_memory=2 counts a guest's whole RAM as used when it is mapped: set it to 0 or 1")
    if facts["rlimit_as_bytes"] is not None:
        notes.append(
            f"RLIMIT_AS is {format_size(facts['rlimit_as_bytes'])}: a larger guest can't be mapped (ulimit -v)"
        )
    if facts["cgroup_limit_bytes"] is not None:
        notes.append(
            f"the cgroup holds at most {format_size(facts['cgroup_limit_bytes'])}: a guest touching more is killed"
        )
    return notes
