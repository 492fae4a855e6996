"""emu compare WORKLOAD: one workload under several mechanisms, each in a fresh process."""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from emu.bench.prices import measure_prices
from emu.cli.command import again
from emu.cli.output import Output
from emu.errors import BadValue, EmuError
from emu.mechanisms import MECHANISMS, make_mechanism
from emu.report.compare import print_compare

__all__ = ["compare"]

SCHEMA = "emu.compare/1"


def _run(words: list[str], mechanism: str) -> dict[str, Any]:
    # a process each: what one leaves behind, in caches or in Python, isn't the next one's
    command = [sys.executable, "-m", "emu", "run", *words, "-m", mechanism, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise BadValue(done.stderr.strip().removeprefix("emu: "))
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise EmuError(f"the run under {mechanism} ended with {done.returncode}: {done.stderr.strip()}") from None
    result["label"] = mechanism
    return result


def _price(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    # what the transitions of each run would be of the native time of its reads, faults and frees: measured now
    said = [row for row in rows if row["counters"].get("usage_said")]
    if not said:
        return None
    prices = measure_prices()
    for row in said:
        native = prices.native(row["counters"])
        by_hooks = row["counters"]["usage_said"] - row["counters"].get("said_other", 0)
        row["said_share"] = by_hooks * prices.transition / native if native else None
    return asdict(prices)


def compare(
    workload: str,
    *words: Annotated[str, Parameter(allow_leading_hyphen=True)],
    mechanism: Annotated[list[str] | None, Parameter(name=["--mechanism", "-m"])] = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Run a workload under several mechanisms and print them side by side.

    Parameters
    ----------
    workload
        As of `emu run`: cache, grep, build, fio, memhog, load, page_fault1, page_fault2.
    words
        The workload's own flags and the common ones, as of `emu run WORKLOAD --help`.
    mechanism
        NAME[:key=value,...], once for each run; all of them by default. A name may come twice with other settings.
    as_json
        Print one JSON object: {"rows": [what `emu run --json` prints, with its label, ...]}.
    """
    if workload.endswith(".toml"):
        raise BadValue(f"compare takes a workload, not a fleet: emu run {workload} -m NAME, once for each")
    chosen = mechanism or list(MECHANISMS)
    for text in chosen:
        make_mechanism(text)
    if repeated := {text for text in chosen if chosen.count(text) > 1}:
        raise BadValue(f"mechanism {min(repeated)!r} is named twice")
    for flag in ("--live", "--json"):
        if flag in words:
            raise BadValue(f"{flag} isn't for a comparison")
    status = Console(stderr=True, highlight=False)
    rows = []
    with status.status("starting") as line:
        for i, text in enumerate(chosen, start=1):
            line.update(f"{i} of {len(chosen)}: {workload} under {text}")
            rows.append(_run([workload, *words], text))
    prices = _price(rows)
    if as_json:
        print(json.dumps({"schema": SCHEMA, "command": again(), "prices": prices, "rows": rows}, indent=2))
    else:
        print_compare(rows, again(), Output(), prices)
    wrong = {row["label"]: row["corrupt_frames"] for row in rows if row["corrupt_frames"]}
    failed = [row["label"] for row in rows if row["error"]]
    if failed:
        raise EmuError(f"the guest failed under {', '.join(failed)}")
    if wrong:
        raise EmuError("frames held wrong bytes: " + ", ".join(f"{n} under {label}" for label, n in wrong.items()))
    return 0
