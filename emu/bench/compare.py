"""What changed between two benches, beyond what each of them says of its own spread.

Rows are compared by what they are judged by: the ratio to the reference, or, where there is none, our value, which
means something on one machine only. A row has changed when the intervals of its two medians share no value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from emu.bench.spread import Estimate
from emu.errors import BadValue

__all__ = ["Change", "compare", "machines_differ"]

Verdict = Literal["same", "better", "worse", "new", "gone", "not measured"]


@dataclass(frozen=True, slots=True)
class Change:
    """One row of both benches. old and new are None where it wasn't measured."""

    name: str
    verdict: Verdict
    old: Estimate | None
    new: Estimate | None


def _judged(row: Mapping[str, Any] | None) -> Estimate | None:
    if row is None or row.get("error"):
        return None
    value = row["ours"] if row["ratio"] is None else row["ratio"]
    low, high = row["interval"]
    return Estimate(value, low, high, row["confidence"])


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the changes, in the new bench's order, then what it lacks. Raises BadValue for what isn't a bench."""
    for bench in (old, new):
        if bench.get("schema") != "emu.bench/1":
            raise BadValue(f"not a bench: its schema is {bench.get('schema')!r}, and emu.bench/1 was expected")
    before = {row["name"]: row for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        was, now = _judged(before.pop(row["name"], None)), _judged(row)
        verdict: Verdict
        if now is None:
            verdict = "not measured"
        elif was is None:
            verdict = "new"
        elif was.overlaps(now):
            verdict = "same"
        else:
            verdict = "better" if (now.median < was.median) == (row["better"] == "lower") else "worse"
        changes.append(Change(row["name"], verdict, was, now))
    changes += (Change(name, "gone", _judged(row), None) for name, row in before.items())
    return changes


def machines_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in which facts that bear on a measurement the two environments differ, each as a line."""
    return [
        f"{key}: {old['environment'].get(key)} then, {new['environment'].get(key)} now"
        for key in ("kernel", "cpu", "cpus", "python", "thp", "uffd_rung")
        if old["environment"].get(key) != new["environment"].get(key)
    ]
