"""Sizes, times and frames: the one place that parses and prints them.

Sizes are bytes or text ("512MiB"); K, M, G, T and KiB, MiB ... are powers of 1024, kB, MB ... of 1000. Times are
seconds or text ("250ms"). A guest frame is 4 KiB, whatever the host.
"""

import re
from typing import NewType

from emu.errors import BadValue

__all__ = [
    "FRAME_SIZE",
    "Bytes",
    "Gfn",
    "Pages",
    "format_size",
    "mib_text",
    "parse_duration",
    "parse_ram_size",
    "parse_size",
    "seconds_text",
]

Gfn = NewType("Gfn", int)
Pages = NewType("Pages", int)
Bytes = NewType("Bytes", int)

FRAME_SIZE = 4096
_ADDRESS_BITS = 47  # user space of x86-64 and arm64 with four-level page tables

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
_UNIT = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
for _i, _letter in enumerate("kmgt", start=1):
    _UNIT[_letter] = _UNIT[_letter + "ib"] = 1024**_i
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m|min|h)?\s*\Z")
_SECONDS = {None: 1.0, "s": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size(value: int | str, what: str = "size") -> Bytes:
    """Return a size in bytes from bytes or text such as "512MiB".

    Raises BadValue for anything that isn't a whole number of bytes, 0 or more.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadValue(f"{what} {value!r} isn't a size: give bytes or text such as 512MiB")
    if isinstance(value, int):
        size: float = value
    else:
        match = _SIZE.match(value)
        unit = match and _UNIT.get(match[2].lower())
        if not match or unit is None:
            raise BadValue(f"{what} {value!r} isn't a size: give bytes or text such as 512MiB")
        size = int(match[1]) * unit if match[1].isdigit() else float(match[1]) * unit
    if size != int(size):
        raise BadValue(f"{what} {value!r} isn't a whole number of bytes")
    if size < 0:
        raise BadValue(f"{what} {value!r} is negative")
    return Bytes(int(size))


def parse_ram_size(value: int | str, what: str = "RAM size") -> Bytes:
    """Return a size that memory can have: above 0, whole frames, inside the address space."""
    size = parse_size(value, what)
    if size == 0:
        raise BadValue(f"{what} {value!r} is 0: at least one frame of {FRAME_SIZE} bytes is needed")
    if size % FRAME_SIZE:
        raise BadValue(f"{what} {value!r} = {size} bytes isn't a multiple of the frame size, {FRAME_SIZE}")
    limit = 1 << (_ADDRESS_BITS - 1)
    if size > limit:
        raise BadValue(f"{what} {value!r} is more than the address space can hold: at most {format_size(limit)}")
    return size


def parse_duration(value: float | str, what: str = "time") -> float:
    """Return seconds from seconds or text such as "250ms"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadValue(f"{what} {value!r} isn't a time: give seconds or text such as 250ms")
    if isinstance(value, str):
        match = _TIME.match(value)
        if not match:
            raise BadValue(f"{what} {value!r} isn't a time: give seconds or text such as 250ms")
        value = float(match[1]) * _SECONDS[match[2]]
    if not 0 <= value < float("inf"):
        raise BadValue(f"{what} {value!r} isn't a time: it must be 0 or more")
    return float(value)


def format_size(size: float) -> str:
    """Return a size as text with a binary unit: exact when short, else one decimal."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(size) >= 1024**power:
            number = size / 1024**power
            return f"{number:.0f} {unit}" if number == int(number) else f"{number:.1f} {unit}"
    return f"{size:.0f} B"


def mib_text(size: float) -> str:
    """Return bytes as MiB with one decimal, as tables have them."""
    return f"{size / (1 << 20):,.1f}"


def seconds_text(seconds: float) -> str:
    """Return guest time as m:ss.t, or h:mm:ss from an hour on."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02}:{int(seconds % 60):02}"
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
