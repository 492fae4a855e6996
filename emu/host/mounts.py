"""What is mounted where, as /proc/self/mountinfo has it (Documentation/filesystems/proc.rst, section 3.5)."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["IN_MEMORY", "Mount", "filesystem", "read_mounts"]

#: file systems whose files are memory
IN_MEMORY = frozenset({"tmpfs", "ramfs"})

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """device: major:minor; root: what of the file system is mounted at `point`; options: the file system's own."""

    device: str
    root: str
    point: Path
    kind: str
    options: frozenset[str]


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def read_mounts(path: str | Path = "/proc/self/mountinfo") -> tuple[Mount, ...]:
    """Return all mounts, the oldest first; none where they can't be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        place, _, kind = line.partition(" - ")
        fields, about = place.split(), kind.split()
        if len(fields) >= 6 and len(about) >= 3:
            options = frozenset(about[2].split(","))
            found.append(Mount(fields[2], _plain(fields[3]), Path(_plain(fields[4])), about[0], options))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _filesystem_of(device: int) -> str | None:
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in read_mounts() if mount.device == wanted), None)


def filesystem(of: int | str | Path) -> str | None:
    """Return the type of the file system that a file (open, or by name) is on; None: it can't be told.

    Raises OSError.
    """
    return _filesystem_of(os.stat(of).st_dev)  # os.statvfs has no f_type
