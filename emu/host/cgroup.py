"""Memory limits of the cgroups that this process is in, and the room that is left below them.

v2 has memory.max and memory.current (Documentation/admin-guide/cgroup-v2.rst), v1 memory.limit_in_bytes and
memory.usage_in_bytes. A limit holds for everything below its folder, so every folder up to the root counts. Inactive
page cache isn't taken for used: the kernel drops it before it kills anybody.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryLimit", "memory_limits", "room_bytes"]

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_NONE = 1 << 60  # v1 writes "no limit" as a number of pages that no machine has


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A folder with a limit. Bytes; used: without inactive page cache."""

    folder: Path
    limit: int
    used: int


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _folders(proc: Path, mount: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    for line in _read(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, _V2
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", _V1
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder, names
        while folder != root and root in folder.parents:
            folder = folder.parent
            yield folder, names


def memory_limits(
    proc: str | Path = "/proc/self/cgroup", mount: str | Path = "/sys/fs/cgroup"
) -> tuple[MemoryLimit, ...]:
    """Return every limit above this process, from its own folder up; none where there is none, or none to be read."""
    found = []
    for folder, (limit, usage, inactive) in _folders(Path(proc), Path(mount)):
        text, used = _read(folder / limit), _read(folder / usage)
        if not text.isdigit() or int(text) >= _NONE:
            continue
        cache = dict(line.partition(" ")[::2] for line in _read(folder / "memory.stat").splitlines()).get(inactive, "0")
        found.append(MemoryLimit(folder, int(text), max(int(used or 0) - int(cache), 0)))
    return tuple(found)


def room_bytes(limits: tuple[MemoryLimit, ...]) -> int | None:
    """Return what may still be used below all of them but a 64th of each, which is left alone; None without any.

    Below 0: that much too much is used already.
    """
    return min((each.limit - each.limit // 64 - each.used for each in limits), default=None)
