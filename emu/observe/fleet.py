"""What a fleet came to: its guests, one by one, and what they were together."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["SCHEMA", "Believed", "FleetResult", "GuestResult", "Sample"]

SCHEMA = "emu.fleet/1"


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at t seconds of the wall after its start, in bytes. charged: at the gate; the others by the kernel."""

    t: float
    charged: int
    rss: int
    side: int
    pool: int
    swapped: int
    used: int
    cached: int
    evicted: int
    disk_read: int


@dataclass(frozen=True, slots=True)
class Believed:
    """What a host can believe of a guest's use of memory, against what it was: mean of |error| / RAM, over all samples.

    balloon: RAM - available, by the guest's statistics; rss: by the kernel; sampled: by setting random frames aside.
    The truth is what the guest's processes hold (used).
    """

    samples: int = 0
    balloon: float = 0.0
    rss: float = 0.0
    sampled_samples: int = 0
    sampled: float = 0.0


@dataclass(slots=True)
class GuestResult:
    """One guest. Times are seconds of the wall; started and ended after the fleet's start, admitted after its own."""

    name: str
    mechanism: str
    workload: str
    ram_bytes: int
    #: ended: ok, failed, killed, silent, refused, lost
    state: str = "lost"
    detail: str = ""
    started: float | None = None
    admitted: float | None = None
    ended: float | None = None
    peak_rss_bytes: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    stolen_bytes: int = 0
    throttled: int = 0
    throttled_seconds: float = 0.0
    verified_frames: int = 0
    corrupt_frames: int = 0
    disk_read_bytes: int = 0
    #: messages refused, by reason, and statuses in which it claimed more than its process has ever held
    refused: dict[str, int] = field(default_factory=dict)
    lies: int = 0
    returned_bytes: int = 0
    believed: Believed = field(default_factory=Believed)
    result: dict[str, Any] | None = None

    @property
    def seconds(self) -> float | None:
        """How long the workload took."""
        return None if self.started is None or self.ended is None else self.ended - self.started


@dataclass(slots=True)
class FleetResult:
    """All of them."""

    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    max_bytes: int
    guests: list[GuestResult]
    peak_charged_bytes: int = 0
    #: what max was lowered to by the host's cgroups, at its lowest; None: it wasn't
    least_max_bytes: int | None = None
    peak_rss_bytes: int = 0
    rss_byte_seconds: float = 0.0
    seconds: float = 0.0
    #: requests by kind: made, answered, given up; bytes freed
    asked: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    freed: dict[str, int] = field(default_factory=dict)
    #: when the first request of a kind was made, seconds after the fleet's start
    first: dict[str, float] = field(default_factory=dict)
    #: the most in any second: cache evicted, bytes read from the guests' disks
    peak_evicted_rate: float = 0.0
    peak_disk_rate: float = 0.0
    refused_peers: int = 0
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def swap_bytes(self) -> int:
        """Swap traffic, both ways."""
        return sum(guest.swap_out_bytes + guest.swap_in_bytes for guest in self.guests)

    @property
    def ok(self) -> bool:
        """Whether every guest ended well, with every byte right."""
        return all(guest.state == "ok" and not guest.corrupt_frames for guest in self.guests)

    def as_json(self) -> dict[str, Any]:
        """Return it as one object of JSON types."""
        guests = [asdict(guest) | {"seconds": guest.seconds} for guest in self.guests]
        return {"schema": SCHEMA, **asdict(self), "guests": guests, "swap_bytes": self.swap_bytes, "ok": self.ok}
