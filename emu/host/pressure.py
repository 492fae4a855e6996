"""Real memory pressure, as the kernel tells it: stalls (PSI).

PSI (Documentation/accounting/psi.rst, 4.20): a file such as /proc/pressure/memory, or a cgroup's memory.pressure, with
the share of the last 10, 60 and 300 seconds in which some, or all, tasks waited for memory, in per cent.
"""

from dataclasses import dataclass
from pathlib import Path

from emu.errors import HostError

__all__ = ["Pressure", "read_psi"]


@dataclass(frozen=True, slots=True)
class Pressure:
    """Per cent of the last 10 seconds in which some tasks, or all, stalled; total: microseconds since boot."""

    some: float
    full: float
    some_total: int


def read_psi(path: str | Path = "/proc/pressure/memory") -> Pressure:
    """Read a PSI file. Raises HostError."""
    found: dict[str, dict[str, str]] = {}
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise HostError(f"no memory pressure from {path}: {error.strerror} (CONFIG_PSI, psi=1?)") from error
    for line in text.splitlines():
        kind, *fields = line.split()
        found[kind] = dict(field.partition("=")[::2] for field in fields)
    try:
        return Pressure(
            float(found["some"]["avg10"]),
            float(found.get("full", {}).get("avg10", 0.0)),
            int(found["some"]["total"]),
        )
    except (KeyError, ValueError):
        raise HostError(f"{path} isn't a PSI file") from None
