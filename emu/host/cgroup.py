"""Memory limits of the cgroups that this process is in, and the room that is left below them.

v2 has memory.max, memory.high and memory.current (Documentation/admin-guide/cgroup-v2.rst), v1 memory.limit_in_bytes
and memory.usage_in_bytes. A limit holds for everything below its folder, so every folder up to the root of what is
mounted counts. memory.high doesn't kill, but nothing runs well above it: it counts as a limit, too.

Inactive page cache isn't taken for used, since the kernel drops it before it kills anybody. memory.stat's inactive_file
has more in it: anonymous pages that were freed by MADV_FREE (mm/swap.c, lru_lazyfree). Those are somebody's who counts
them himself, so no more is taken off than there is page cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emu.errors import HostError
from emu.host.mounts import read_mounts

__all__ = ["MemoryLimit", "memory_limits", "room_bytes"]

_NONE = 1 << 60  # v1 writes "no limit" as a number of pages that no machine has


@dataclass(frozen=True, slots=True)
class _Names:
    limits: tuple[str, ...]
    usage: str
    inactive: str
    cache: str
    shmem: str


_V2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file", "file", "shmem")
_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "total_cache", "total_shmem")


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


def _folders(cgroup: Path, mountinfo: Path) -> Iterator[tuple[Path, _Names]]:
    mounts = [mount for mount in read_mounts(mountinfo) if mount.kind in ("cgroup", "cgroup2")]
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, trees = _V2, [mount for mount in mounts if mount.kind == "cgroup2"]
        elif "memory" in controllers.split(","):
            names, trees = _V1, [mount for mount in mounts if "memory" in mount.options]
        else:
            continue
        for mount in trees:
            root = mount.root.rstrip("/")
            below = path.removeprefix(root)
            # a mount may begin further down (a container's), or this process be outside of what it shows
            if not path.startswith(root) or below[:1] not in ("", "/") or ".." in below.split("/"):
                continue
            folder = mount.point / below.strip("/")
            yield folder, names
            while folder != mount.point:
                folder = folder.parent
                yield folder, names
            break


def memory_limits(
    cgroup: str | Path = "/proc/self/cgroup", mountinfo: str | Path = "/proc/self/mountinfo"
) -> tuple[MemoryLimit, ...]:
    """Return every limit above this process, from its own folder up; none where there is none, or none to be seen.

    Raises HostError if there is a limit, but not what is used of it.
    """
    found = []
    for folder, names in _folders(Path(cgroup), Path(mountinfo)):
        limits = [int(text) for name in names.limits if (text := _read(folder / name)).isdigit()]
        if min(limits, default=_NONE) >= _NONE:
            continue
        # first: what is used more meanwhile counts as used
        stat = dict(line.partition(" ")[::2] for line in _read(folder / "memory.stat").splitlines())
        inactive, cache, shmem = (int(stat.get(name, 0)) for name in (names.inactive, names.cache, names.shmem))
        usage = _read(folder / names.usage)
        if not usage.isdigit():
            raise HostError(f"{folder} has a memory limit, but {names.usage} can't be read")
        found.append(MemoryLimit(folder, min(limits), int(usage) - max(min(inactive, cache - shmem), 0)))
    return tuple(found)


def room_bytes(limits: tuple[MemoryLimit, ...], spare: int = 0) -> int | None:
    """Return what may still be used below all of them, but a 64th of each, and `spare` bytes; None without any.

    Below 0: that much too much is used already.
    """
    return min((each.limit - each.limit // 64 - spare - each.used for each in limits), default=None)
