"""One measure of one row in a process of its own: `python -m emu.bench.once ROW` prints the value.

Where a row has no reference, nothing cancels what differs from process to process (where objects lie, the seed of
hashes): the same Python loop is up to a tenth faster in one process than in the next. So each round of such a row is a
process, and that is in its interval.
"""

import subprocess
import sys

from emu.bench.row import Row
from emu.errors import HostError

__all__ = ["in_its_own_process", "main"]


def in_its_own_process(row: Row) -> float:
    """Measure ours once in a new process, on the cores that this thread may use. Raises HostError with its last
    words."""
    done = subprocess.run(
        [sys.executable, "-m", "emu.bench.once", row.name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HostError(f"row {row.name} failed in its process: {lines[-1]}")
    return float(done.stdout)


def main(name: str) -> None:
    """Measure a row without a reference: once to warm up, then the value that counts."""
    from emu.bench.rows import ROWS

    row = next(row for row in ROWS if row.name == name)
    with row.open(None) as sides:
        sides.ours()
        print(sides.ours())


if __name__ == "__main__":
    main(sys.argv[1])
