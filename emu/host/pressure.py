"""Real memory pressure, as the kernel tells it: stalls (PSI).

PSI (Documentation/accounting/psi.rst, 4.20): a file such as /proc/pressure/memory, or a cgroup's memory.pressure, with
the share of the last 10, 60 and 300 seconds in which some, or all, tasks waited for memory, in per cent.
"""

from pathlib import Path

from emu.errors import HostError

__all__ = ["stall_percent"]


def stall_percent(path: str | Path) -> float:
    """Return the per cent of the last 10 seconds in which some task waited, from a PSI file. Raises HostError."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise HostError(f"no memory pressure from {path}: {error.strerror} (CONFIG_PSI, psi=1?)") from error
    for line in text.splitlines():
        kind, _, fields = line.partition(" ")
        if kind == "some":
            try:
                return float(dict(field.partition("=")[::2] for field in fields.split())["avg10"])
            except (KeyError, ValueError):
                break
    raise HostError(f"{path} isn't a PSI file")
