"""Workloads: what a guest does. One file each: a generator of steps over a machine.

A step does some guest work and yields; the runner then lets `wait` seconds of guest time pass, sampling, and records a
row under the step's name. A workload counts the frames whose content it checked, and the wrong ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from emu.machine import Machine
from emu.observe.result import Measure

__all__ = ["Step", "Workload"]


@dataclass(frozen=True, slots=True)
class Step:
    """A row of the result: its name, and the guest seconds to let pass before it is taken; without a row, only
    those."""

    name: str
    wait: float = 0.0
    row: bool = True

    @classmethod
    def pause(cls, seconds: float) -> "Step":
        """Let guest time pass in the middle of a step: it is sampled, and there is no row."""
        return cls("", max(seconds, 0.0), row=False)


class Workload(Protocol):
    """One workload with its parameters."""

    name: ClassVar[str]

    @property
    def verified_frames(self) -> int:
        """Frames whose content was compared."""

    @property
    def corrupt_frames(self) -> int:
        """Those of them that differed."""

    def steps(self, machine: Machine) -> Iterator[Step]:
        """Work on the machine's guest, yielding after each step."""

    def measures(self) -> dict[str, Measure]:
        """Return what it measured of itself, by name; called when it has ended."""

    def notes(self) -> list[str]:
        """Return what the result must say besides: files left out, and why."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters, for the result."""
