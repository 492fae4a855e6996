"""What the kernel says is resident: three ways, and what each one counts.

                     own page   shared zero page   swapped     lazily freed   poison marker
    smaps Rss          yes            no              no            yes             no
    PAGEMAP_SCAN       yes     yes, and says so    says so          yes        as swapped
    mincore            yes           yes              no            yes             no

(measured on Linux 6.18). So Rss = present - zeropage, and mincore is an upper bound: tests hold the three against each
other. None of them shows that the frames of a partly discarded huge page are still in use.

smaps is exact to the page and works on every kernel, but it reports whole VMAs. `GuestRam` has guard pages on both
sides, so that its VMAs hold nothing else; for any other buffer PAGEMAP_SCAN (Linux 6.7) is used, which takes an address
range. /proc is read for this process only, or for one given by its pid.
"""

import errno
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from emu import _native
from emu._native import ffi, lib
from emu.errors import HostError

__all__ = ["Look", "Scan", "Smaps", "has_pagemap", "mincore_bytes", "read_smaps", "rollup", "scan"]

_HEADER = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_FIELD = re.compile(rb"^(\w+): +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Smaps:
    """Bytes, summed over the VMAs of a range."""

    rss: int
    lazyfree: int
    swap: int
    anon_huge: int


class Scan(NamedTuple):
    """Bytes by PAGEMAP_SCAN. present includes zeropage; rss = present - zeropage."""

    present: int
    zeropage: int
    swapped: int
    huge: int

    @property
    def rss(self) -> int:
        return self.present - self.zeropage


class Look(NamedTuple):
    """Bytes by a look that a tick can afford. exact: the whole figure is of now; source: "PAGEMAP_SCAN" or "smaps"."""

    rss: int
    lazyfree: int
    exact: bool
    source: str


def _fields(text: bytes) -> Smaps:
    kb = {name: int(value) * 1024 for name, value in _FIELD.findall(text)}
    return Smaps(kb.get(b"Rss", 0), kb.get(b"LazyFree", 0), kb.get(b"Swap", 0), kb.get(b"AnonHugePages", 0))


def read_smaps(start: int, length: int) -> Smaps:
    """Return what smaps says of the VMAs inside [start, start + length) of this process.

    Raises HostError if a VMA reaches over the range's ends: its figures couldn't be told apart.
    """
    try:
        with open("/proc/self/smaps", "rb") as file:
            text = file.read()
    except OSError as error:
        raise HostError(f"can't read /proc/self/smaps: {error.strerror}") from error
    end = start + length
    total = [0, 0, 0, 0]
    headers = list(_HEADER.finditer(text))
    for i, header in enumerate(headers):
        first, last = int(header[1], 16), int(header[2], 16)
        if last <= start or first >= end:
            continue
        if first < start or last > end:
            raise HostError(f"the VMA {first:x}-{last:x} reaches over [{start:x}, {end:x}): use a page-exact source")
        body = text[header.end() : headers[i + 1].start() if i + 1 < len(headers) else len(text)]
        fields = _fields(body)
        for k, value in enumerate((fields.rss, fields.lazyfree, fields.swap, fields.anon_huge)):
            total[k] += value
    return Smaps(*total)


def rollup(pid: int | str = "self") -> Smaps:
    """Return the figures of a whole process."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return _fields(file.read())
    except OSError as error:
        raise HostError(f"can't read /proc/{pid}/smaps_rollup: {os.strerror(error.errno or 0)}") from error


def has_pagemap() -> bool:
    """Whether this process may read where its own pages are: not without /proc, nor when it isn't dumpable."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            return len(file.read(8)) == 8
    except OSError:
        return False


def scan(start: int, length: int) -> Scan | None:
    """Return what PAGEMAP_SCAN says of the pages in [start, start + length); None before Linux 6.7."""
    if "pagemap_scan" in _native.disabled():
        return None
    result = ffi.new("struct emu_residency *")
    err = lib.emu_residency_scan(start, length, result)
    if err in (-errno.ENOTTY, -errno.ENOENT, -errno.EACCES):
        return None
    if err:
        raise HostError(f"PAGEMAP_SCAN: {os.strerror(-err)}")
    size = lib.EMU_FRAME_SIZE
    return Scan(result.present * size, result.zeropage * size, result.swapped * size, result.huge * size)


def mincore_bytes(start: int, length: int) -> int:
    """Return what mincore(2) counts in the range: resident pages and mapped zero pages."""
    pages = lib.emu_residency_mincore(start, length)
    if pages < 0:
        raise HostError(f"mincore: {os.strerror(-pages)}")
    return int(pages) * int(lib.EMU_FRAME_SIZE)
