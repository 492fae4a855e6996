"""Running rows: a warm-up, then round after round of ours and the reference, their order turned each time."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from emu.bench.once import in_its_own_process
from emu.bench.row import Row, Sides
from emu.bench.spread import CONFIDENCE, Estimate, estimate
from emu.bench.stage import Stage
from emu.errors import EmuError

__all__ = ["SCHEMA", "RowResult", "run_row", "run_rows"]

SCHEMA = "emu.bench/1"


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a row came to. samples are the rounds', in order: (ours, reference), the latter None in an absolute row."""

    row: Row
    samples: list[tuple[float, float | None]]
    #: why it couldn't be measured
    error: str | None = None

    @property
    def ours(self) -> Estimate:
        """Our value."""
        return estimate([ours for ours, _ in self.samples])

    @property
    def reference(self) -> Estimate | None:
        """The reference's value; None in an absolute row."""
        values = [reference for _, reference in self.samples if reference is not None]
        return estimate(values) if values else None

    @property
    def ratio(self) -> Estimate | None:
        """Ours over the reference, round by round; None in an absolute row."""
        ratios = [ours / reference for ours, reference in self.samples if reference]
        return estimate(ratios) if ratios else None

    @property
    def difference(self) -> Estimate | None:
        """Ours minus the reference, round by round; None in an absolute row."""
        differences = [ours - reference for ours, reference in self.samples if reference is not None]
        return estimate(differences) if differences else None

    @property
    def judged(self) -> Estimate:
        """What the target is about: the ratio, or ours where there is no reference."""
        return self.ratio or self.ours

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one, or with too few rounds to say (fewer than six)."""
        if self.row.target is None or self.error is not None or self.judged.confidence < CONFIDENCE:
            return None
        value = self.judged.median
        return value <= self.row.target if self.row.better == "lower" else value >= self.row.target

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON types. spread is relative: half of the interval over the median."""
        row = self.row
        facts: dict[str, Any] = {
            "name": row.name,
            "what": row.what,
            "unit": row.unit,
            "better": row.better,
            "target": row.target,
            "service": row.service,
            "placement": row.placement,
            "second_thread": row.second_thread,
        }
        if self.error is not None:
            return facts | {"error": self.error}
        reference, ratio = self.reference, self.ratio
        by = self.difference if row.difference else None
        return facts | {
            "rounds": len(self.samples),
            "ours": self.ours.median,
            "reference": reference.median if reference else None,
            "ratio": ratio.median if ratio else None,
            "spread": self.judged.spread,
            "interval": [self.judged.low, self.judged.high],
            "confidence": self.judged.confidence,
            "difference": [by.median, by.low, by.high] if by else None,
            "met": self.met,
            "samples": [list(sample) for sample in self.samples],
        }


def _rounds(sides: Sides, rounds: int, samples: list[tuple[float, float | None]]) -> None:
    for i in range(-1, rounds):
        gc.collect()
        if sides.reference is None:
            sample: tuple[float, float | None] = (sides.ours(), None)
        elif i % 2:
            ours = sides.ours()
            sample = (ours, sides.reference())
        else:
            reference = sides.reference()
            sample = (sides.ours(), reference)
        if i >= 0:  # the first was to warm up
            samples.append(sample)


def run_row(row: Row, stage: Stage, rounds: int) -> RowResult:
    """Measure one row. What keeps it from being measured is in the result."""
    samples: list[tuple[float, float | None]] = []
    try:
        with stage.placed(second_thread=row.second_thread, both=row.both):
            if row.own_process:
                samples += [(in_its_own_process(row), None) for _ in range(rounds)]
            else:
                with row.open(stage) as sides:
                    _rounds(sides, rounds, samples)
    except EmuError as error:
        return RowResult(row, samples, str(error))
    return RowResult(row, samples)


def run_rows(
    rows: Sequence[Row], stage: Stage, rounds: int, on_row: Callable[[RowResult], None] = lambda result: None
) -> list[RowResult]:
    """Measure rows in order; on_row hears of each when it is done."""
    results = []
    for row in rows:
        results.append(run_row(row, stage, rounds))
        on_row(results[-1])
    return results
