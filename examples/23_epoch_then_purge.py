"""The lines of defence, one after another: the epoch, then the purge request, and swapping only as the last.

Two guests full of page cache, and a third that needs memory. First there is room for all, and the epoch is moved
forward to keep a reserve; then there is less than the guests use without their caches, and only swapping is left at the
end. Prints:

    max 400 MiB   asked for: epoch                  swapped no    all guests well yes
    max 128 MiB   asked for: epoch, purge, swap     swapped yes   all guests well yes
    in that order: yes
"""

import random
import tempfile
from pathlib import Path
from typing import Any

from emu.fleet import read_fleet, run_fleet


def fleet(limits: dict[str, str], folder: str, tree: str) -> dict[str, Any]:
    cache = {"path": tree, "hold": "15s", "memory": "16MiB"}
    hog = {"size": "112MiB", "rounds": 1, "hold": "10s"}
    return {
        "fleet": {"speed": 10, "store": folder, "oldest": "2s", "step": "16MiB", "deadline": "1s", **limits},
        "guest": [
            {"name": "cache", "count": 2, "ram": "128MiB", "mechanism": "epoch", "workload": "cache", "args": cache},
            {"name": "hog", "ram": "128MiB", "workload": "memhog", "args": hog, "start": "1s"},
        ],
    }  # fmt: skip


def main() -> None:
    in_order = True
    with tempfile.TemporaryDirectory() as tree, tempfile.TemporaryDirectory() as folder:
        for n in range(20):
            Path(tree, f"f{n}").write_bytes(random.Random(n).randbytes(4 << 20))
        for limits in ({"max": "400MiB", "low": "200MiB"}, {"max": "128MiB"}):
            result = run_fleet(read_fleet(fleet(limits, folder, tree)))
            asked = sorted(result.first, key=result.first.__getitem__)
            in_order &= asked == ["epoch", "purge", "swap"][: len(asked)]
            swapped = "yes" if result.swap_bytes else "no"
            print(f"max {limits['max'][:-3]} MiB   asked for: {', '.join(asked):<22} swapped {swapped:<5} "
                  f"all guests well {'yes' if result.ok else 'no'}")  # fmt: skip
    print(f"in that order: {'yes' if in_order else 'no'}")


if __name__ == "__main__":
    main()
