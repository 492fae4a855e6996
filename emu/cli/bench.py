"""emu bench: what emu's operations cost beside the bare system calls, here and now."""

import datetime
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from emu.bench import cmm2
from emu.bench.compare import compare, machines_differ
from emu.bench.prices import measure_prices
from emu.bench.reference import SOURCES, Reference
from emu.bench.row import Row
from emu.bench.rows import ROWS
from emu.bench.runner import SCHEMA, run_rows
from emu.bench.spread import Estimate, estimate
from emu.bench.stage import Stage
from emu.cli.command import again, whole
from emu.cli.output import Output
from emu.errors import BadValue, EmuError
from emu.observe.environment import environment
from emu.report.bench import print_bench, print_changes
from emu.report.cmm2 import print_counts, print_shares
from emu.units import parse_duration

__all__ = ["bench"]


def _chosen(names: tuple[str, ...]) -> list[Row]:
    for name in names:
        if not any(name in row.name for row in ROWS):
            raise BadValue(f"no row has {name!r} in its name: {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if not names or any(name in row.name for name in names)]


def _read(path: Path) -> dict[str, Any]:
    try:
        bench = json.loads(path.read_bytes())
    except OSError as error:
        raise BadValue(f"{path} can't be read as a bench: {error.strerror}") from None
    except ValueError:
        raise BadValue(f"{path} can't be read as a bench: it isn't JSON") from None
    if not isinstance(bench, dict) or bench.get("schema") != SCHEMA or not isinstance(bench.get("rows"), list):
        raise BadValue(f"{path} isn't what `emu bench` writes: no schema {SCHEMA}")
    return bench


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise BadValue(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise BadValue(f"no folder {path.parent}: make it, or name another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadValue(f"{path} can't be written: no permission")


def _price(text: str) -> float:
    # ns: a bare number would be seconds, which nobody means
    if not text or text[-1].isdigit():
        raise BadValue(f"transition {text!r} needs a unit, such as {text or 300}ns or 1us")
    ns = parse_duration(text, "transition") * 1e9
    if ns <= 0:
        raise BadValue(f"transition {text!r} must be more than nothing")
    return ns


def _flat(value: Estimate | None) -> tuple[float, float, float] | None:
    return None if value is None else (value.median, value.low, value.high)


def bench(
    *names: str,
    rounds: Annotated[int, Parameter(converter=whole)] = 10,
    compare_with: Annotated[Path | None, Parameter(name="--compare")] = None,
    output: Annotated[Path | None, Parameter(name=["-o", "--output"])] = None,
    check: bool = False,
    transition: Annotated[list[str] | None, Parameter(negative=())] = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Measure emu beside plain C loops of system calls, by turns, and print medians with their intervals.

    `emu bench cmm2` says besides what CMM2 costs: what a guest's kernel has to say, counted, and what share of native
    work that comes to, by what saying it takes (docs/cmm2-overhead.md).

    Parameters
    ----------
    names
        Only rows with one of these in their names.
    rounds
        Of each row; at least 10 for an interval worth having.
    compare_with
        An earlier result: say what changed beyond the two intervals.
    output
        Where to write the result; benchmarks/results/ of the clone by default, when all rows are measured.
    check
        Exit with 1 if a target isn't met, or, with --compare, a row got worse.
    transition
        With cmm2: a price of a transition to count with besides, such as 300ns or 5us; may be given several times.
    as_json
        Print the result as JSON instead of a table.
    """
    costs = {text: _price(text) for text in transition or ()}
    if costs and "cmm2" not in names:
        raise BadValue("--transition is for emu bench cmm2")
    if not 2 <= rounds <= 1000:
        raise BadValue(f"rounds {rounds!r} must be from 2 to 1000")
    rows = _chosen(names)
    old = None if compare_with is None else _read(compare_with)
    if old is not None and names:
        old["rows"] = [row for row in old["rows"] if any(name in row["name"] for name in names)]
    if output is not None:
        _check_writable(output)
    started = time.monotonic()
    status = Console(stderr=True, highlight=False)
    with Reference() as reference, status.status("building the references") as line:
        done = 0

        def on_row(result: object) -> None:
            nonlocal done
            done += 1
            if done < len(rows):
                line.update(f"{done + 1} of {len(rows)}: {rows[done].name}")

        works: list[cmm2.Work] = []
        study: dict[str, Any] = {}
        if "cmm2" in names:
            line.update("counting transitions")
            works, reclaimed, tree = cmm2.study()
            study = cmm2.as_json(works, reclaimed, tree)
        line.update(f"1 of {len(rows)}: {rows[0].name}")
        results = run_rows(rows, Stage(reference), rounds, on_row)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": again(),
        "environment": environment(),
        "rounds": rounds,
        "confidence": estimate(range(rounds)).confidence,
        "seconds": round(time.monotonic() - started, 1),
        "rows": [row.as_json() for row in results],
    }
    if works:
        batched = next(r for r in results if r.row.name == "cmm2-batched")
        exchange = batched.reference.median if batched.error is None and batched.reference else None
        cmm2.price(study, works, measure_prices(rounds), exchange, costs)
        result["cmm2"] = study
    path = output
    if path is None and not names:
        name = f"{result['time'][:19].replace(':', '')}-linux-{result['environment']['kernel']}.json"
        path = SOURCES / "results" / name
        path.parent.mkdir(exist_ok=True)
    changes = [] if old is None else compare(old, result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console = Output()
        if "cmm2" in result:
            print_counts(study, console)
        print_bench(result, console)
        if "cmm2" in result:
            console.print()
            print_shares(study, console)
        if old is not None:
            console.print()
            print_changes(
                [(c.name, c.verdict, _flat(c.old), _flat(c.new)) for c in changes],
                machines_differ(old, result),
                console,
            )
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
        status.print(f"written: {path}", soft_wrap=True)
    failed = [r.row.name for r in results if r.met is False or r.error is not None]
    failed += [c.name for c in changes if c.verdict == "worse"]
    if check and failed:
        raise EmuError(f"missed, not measured or worse than before: {', '.join(failed)}")
    return 0
