"""What a run came to: rows at its steps, and the totals that `emu run --json` prints.

footprint_byte_seconds is the integral of the footprint over guest time; bloat is it divided by the same integral of
what the guest used.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from emu.observe.pagemap import LABELS
from emu.observe.snapshot import FaultView, Snapshot
from emu.units import FRAME_SIZE

__all__ = ["SCHEMA", "Measure", "Phase", "RunResult"]

SCHEMA = "emu.run/1"


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
    guest_ballooned_bytes: int
    #: outside the guest's RSS: frames aside (by the kernel), content in the store, and the pool's memory (by the
    #: kernel)
    aside_bytes: int
    swapped_bytes: int
    pool_bytes: int
    #: since the machine started
    disk_read_bytes: int
    disk_written_bytes: int
    refaults: int
    #: bytes by stage; and along each arrow since the machine started: from, to, bytes
    stages: dict[str, int]
    flows_since_start: tuple[dict[str, Any], ...]
    #: frames by what the guest says of them (S, U, P, V) and what the host holds (r, p, z); None: nothing is said
    usages: dict[str, dict[str, int]] | None

    @classmethod
    def of(cls, name: str, s: Snapshot) -> "Phase":
        """Make a row of a snapshot."""
        return cls(
            name=name,
            t=s.t,
            guest_used_bytes=s.guest_used_bytes,
            guest_cached_bytes=s.guest_cached_bytes,
            guest_free_bytes=s.guest_free_bytes,
            guest_pcp_bytes=s.guest_pcp_bytes,
            rss_bytes=s.rss_bytes,
            lazyfree_bytes=s.lazyfree_bytes,
            footprint_bytes=s.footprint_bytes,
            guest_ballooned_bytes=s.guest_ballooned_bytes,
            aside_bytes=s.side_bytes,
            swapped_bytes=s.states["preserved"],
            pool_bytes=s.pool_bytes,
            disk_read_bytes=s.counters["disk_read_bytes"],
            disk_written_bytes=s.counters["disk_written_bytes"],
            refaults=s.counters["guest_workingset_refault_file"],
            stages={LABELS[stage]: size for stage, size in s.stages.items()},
            flows_since_start=tuple(
                {"from": LABELS[f.source], "to": LABELS[f.target], "bytes": f.frames * FRAME_SIZE} for f in s.flows
            ),
            usages=None if s.usages is None else s.usages.as_json(),
        )

    @property
    def bloat(self) -> float | None:
        """Footprint over what the guest uses; None when it uses nothing."""
        return self.footprint_bytes / self.guest_used_bytes if self.guest_used_bytes else None


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that a workload measured of itself."""

    value: float
    unit: str
    what: str


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
    measures: dict[str, Measure] = field(default_factory=dict)
    faults: list[FaultView] = field(default_factory=list)
    footprint_byte_seconds: float = 0.0
    used_byte_seconds: float = 0.0
    #: estimates of the guest's working set, one a period, beside the truth: bytes, at guest time t
    working_set: list[dict[str, Any]] = field(default_factory=list)
    books_difference: int = 0
    verified_frames: int = 0
    corrupt_frames: int = 0
    seconds: float = 0.0
    #: why the guest couldn't go on, if it couldn't
    error: str | None = None

    @property
    def bloat(self) -> float | None:
        """Footprint over use, both integrated over guest time."""
        return self.footprint_byte_seconds / self.used_byte_seconds if self.used_byte_seconds else None

    def as_json(self) -> dict[str, Any]:
        """Return the result as one object of JSON types."""
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
            "phases": [asdict(phase) | {"bloat": phase.bloat} for phase in self.phases],
            "counters": self.counters,
            "notes": self.notes,
            "measures": {name: asdict(measure) for name, measure in self.measures.items()},
            "fault_latency": [asdict(view) for view in self.faults],
            "working_set": self.working_set,
            "footprint_byte_seconds": self.footprint_byte_seconds,
            "bloat": self.bloat,
            "books_difference_bytes": self.books_difference,
            "verified_frames": self.verified_frames,
            "corrupt_frames": self.corrupt_frames,
            "wall_seconds": self.seconds,
            "error": self.error,
        }
