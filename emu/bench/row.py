"""Row: one line of the bench: what is measured, in which unit, beside what, and what it should come to."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Row", "Sides"]


class Sides(NamedTuple):
    """What one round calls: each measures once and returns a value in the row's unit. No reference: an absolute row."""

    ours: Callable[[], float]
    reference: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row. open(stage) prepares what all rounds share, yields the two sides, and gives everything back.

    target is a bound on the ratio (ours / reference), or, where there is no reference, on ours; None: only watched.
    service and placement say who served the faults, and where; second_thread: another thread of the process ran.
    """

    name: str
    what: str
    unit: str
    better: Literal["lower", "higher"]
    open: Callable[[Any], AbstractContextManager[Sides]]
    target: float | None = None
    service: str = "-"
    placement: str = "one core"
    second_thread: bool = False
    #: the measuring thread and its helpers may use both cores
    both: bool = False
    #: a process of its own for each round; such a row has no reference and needs no stage
    own_process: bool = False
    #: say by how much the two differ, in the row's unit
    difference: bool = False
