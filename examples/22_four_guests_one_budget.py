"""Four guests of 256 MiB, one after another using 192 MiB each, under a budget of 384 MiB.

Each guest is a process of its own; they share the budget by a page of counters, which each charges before it takes a
page. A guest that gives nothing back has to be swapped to make room for the next one; with free page reporting there is
nothing to swap. Prints:

                 ended well   swapped   over the budget   frames checked   wrong
    none         4 of 4       yes       no                       196,608       0
    reporting    4 of 4       no        no                       196,608       0
"""

import tempfile
from typing import Any

from emu.fleet import read_fleet, run_fleet


def fleet(mechanism: str, folder: str) -> dict[str, Any]:
    return {
        "fleet": {"max": "384MiB", "speed": 10, "store": folder},
        "guest": [
            {
                "name": "vm",
                "count": 4,
                "ram": "256MiB",
                "mechanism": mechanism,
                "workload": "memhog",
                "args": {"size": "192MiB", "rounds": 1, "hold": "2s"},
                "start": "in turn",
            }
        ],
    }


def main() -> None:
    print(f"{'':12} ended well   swapped   over the budget   frames checked   wrong")
    for mechanism in ("none", "reporting"):
        with tempfile.TemporaryDirectory() as folder:
            result = run_fleet(read_fleet(fleet(mechanism, folder)))
        well = f"{sum(guest.state == 'ok' for guest in result.guests)} of {len(result.guests)}"
        over = result.peak_charged_bytes > result.max_bytes + 4 * (2 << 20)
        checked = sum(guest.verified_frames for guest in result.guests)
        wrong = sum(guest.corrupt_frames for guest in result.guests)
        print(f"{mechanism:<12} {well:<12} {yes(result.swap_bytes > 0):<9} {yes(over):<17} {checked:14,} {wrong:7}")


def yes(it: bool) -> str:
    return "yes" if it else "no"


if __name__ == "__main__":
    main()
