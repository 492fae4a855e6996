"""emu run FILE.toml: many guests, each its own process, under one budget."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from emu.cli.command import again
from emu.cli.output import Output
from emu.errors import BadValue, EmuError
from emu.report.fleet import print_fleet
from emu.units import format_size

__all__ = ["fleet"]


def fleet(
    file: Path,
    *,
    limit: Annotated[str | None, Parameter(name="--max", allow_leading_hyphen=True)] = None,
    order: str | None = None,
    spread: bool | None = None,
    mechanism: Annotated[str | None, Parameter(name=["--mechanism", "-m"])] = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Run a fleet: guests as a TOML file describes them (emu.fleet.scenario), under one budget.

    Parameters
    ----------
    file
        The fleet.
    limit
        The budget, instead of the file's max.
    order
        The lines of defence, instead of the file's: "steal@low > epoch@low > purge@high >
        swap@max".
    spread
        Whether the guests' turns lie evenly in time, instead of what the file says.
    mechanism
        For all guests, instead of the file's: NAME[:key=value,...].
    as_json
        Print one JSON object.
    """
    if file.suffix != ".toml":
        raise BadValue(f"{str(file)!r} is neither a workload nor a fleet's TOML file: emu run --help")
    from emu.fleet import read_fleet, run_fleet

    given = {"max": limit, "order": order, "spread": spread}
    described = read_fleet(file, settings={k: v for k, v in given.items() if v is not None}, mechanism=mechanism)
    if as_json:
        result = run_fleet(described, command=again())
    else:
        with Console(stderr=True, highlight=False).status("starting the guests") as line:
            result = run_fleet(
                described,
                command=again(),
                on_sample=lambda s: line.update(
                    f"{s.t:.1f} s: charged {format_size(s.charged)}, RSS {format_size(s.rss)}, "
                    f"swapped {format_size(s.swapped)}"
                ),
            )
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print_fleet(result, Output())
    if failed := [guest for guest in result.guests if guest.state != "ok"]:
        raise EmuError(
            f"{len(failed)} of {len(result.guests)} guests didn't end well: {failed[0].name}: {failed[0].detail}"
        )
    if not result.ok:
        raise EmuError("frames held wrong bytes")
    return 0
