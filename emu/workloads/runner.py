"""Running a workload on a machine: rows at its steps, samples in between, one result at the end.

footprint_byte_seconds is the integral of the footprint over guest time, taken at each sample; bloat is it divided by the
same integral of what the guest used. Samples are taken every second of guest time that is waited for, and around guest
work, whose guest time is what the clock says it took (none, on a stepped clock).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from emu.machine import Machine
from emu.mechanisms import settings_of
from emu.observe.environment import environment
from emu.observe.snapshot import Snapshot
from emu.workloads import Workload

__all__ = ["SCHEMA", "Phase", "RunResult", "run"]

SCHEMA = "emu.run/1"
_SAMPLE = 1.0  # guest seconds


@dataclass(frozen=True, slots=True)
class Phase:
    """A row: the machine at guest time t (seconds), in bytes."""

    name: str
    t: float
    guest_used_bytes: int
    guest_cached_bytes: int
    guest_free_bytes: int
    guest_pcp_bytes: int
    rss_bytes: int
    lazyfree_bytes: int
    footprint_bytes: int

    @property
    def bloat(self) -> float | None:
        """Footprint over what the guest uses; None when it uses nothing."""
        return self.footprint_bytes / self.guest_used_bytes if self.guest_used_bytes else None


@dataclass(slots=True)
class RunResult:
    """What `emu run --json` prints."""

    workload: str
    parameters: dict[str, Any]
    mechanism: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    seed: int
    ram_bytes: int
    environment: dict[str, Any]
    command: str
    phases: list[Phase] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    footprint_byte_seconds: float = 0.0
    used_byte_seconds: float = 0.0
    books_difference: int = 0
    verified_frames: int = 0
    corrupt_frames: int = 0
    seconds: float = 0.0

    @property
    def bloat(self) -> float | None:
        """Footprint over use, both integrated over guest time."""
        return self.footprint_byte_seconds / self.used_byte_seconds if self.used_byte_seconds else None

    def as_json(self) -> dict[str, Any]:
        """Return the result as one object of JSON types."""
        fields = ("name", "t", "guest_used_bytes", "guest_cached_bytes", "guest_free_bytes", "guest_pcp_bytes", "rss_bytes")
        return {
            "schema": SCHEMA,
            "workload": self.workload,
            "parameters": self.parameters,
            "mechanism": self.mechanism,
            "settings": self.settings,
            "machine": self.machine,
            "seed": self.seed,
            "speed": self.machine["clock"],
            "ram_bytes": self.ram_bytes,
            "environment": self.environment,
            "command": self.command,
            "phases": [
                {name: getattr(phase, name) for name in (*fields, "lazyfree_bytes", "footprint_bytes", "bloat")}
                for phase in self.phases
            ],
            "counters": self.counters,
            "notes": self.notes,
            "footprint_byte_seconds": self.footprint_byte_seconds,
            "bloat": self.bloat,
            "books_difference_bytes": self.books_difference,
            "verified_frames": self.verified_frames,
            "corrupt_frames": self.corrupt_frames,
            "wall_seconds": self.seconds,
        }


def run(
    machine: Machine,
    workload: Workload,
    *,
    seed: int,
    command: str = "",
    on_step: Callable[[str], None] = lambda name: None,
    on_sample: Callable[[Snapshot], None] = lambda snapshot: None,
) -> RunResult:
    """Run a workload to its end. on_step hears the name of each row, on_sample each snapshot."""
    started = time.monotonic()
    result = RunResult(
        workload=workload.name,
        parameters=workload.parameters(),
        mechanism=machine.mechanism.name,
        settings=settings_of(machine.mechanism),
        machine=machine.describe(),
        seed=seed,
        ram_bytes=machine.guest.ram_bytes,
        environment=environment(),
        command=command,
    )
    last = machine.snapshot()

    def sample() -> Snapshot:
        nonlocal last
        now = machine.snapshot()
        passed = now.t - last.t
        result.footprint_byte_seconds += passed * (now.footprint_bytes + last.footprint_bytes) / 2
        result.used_byte_seconds += passed * (now.guest_used_bytes + last.guest_used_bytes) / 2
        last = now
        on_sample(now)
        return now

    for step in workload.steps(machine):
        sample()
        end = last.t + step.wait
        while (left := end - machine.clock.now()) > 0:
            machine.run_for(min(left, _SAMPLE))
            sample()
        now = last
        result.phases.append(
            Phase(
                name=step.name,
                t=now.t,
                guest_used_bytes=now.guest_used_bytes,
                guest_cached_bytes=now.guest_cached_bytes,
                guest_free_bytes=now.guest_free_bytes,
                guest_pcp_bytes=now.guest_pcp_bytes,
                rss_bytes=now.rss_bytes,
                lazyfree_bytes=now.lazyfree_bytes,
                footprint_bytes=now.footprint_bytes,
            )
        )
        on_step(step.name)
    result.counters = last.counters
    result.books_difference = last.books_difference
    result.verified_frames = workload.verified_frames
    result.corrupt_frames = workload.corrupt_frames
    result.seconds = time.monotonic() - started
    return result
