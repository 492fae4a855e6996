"""LiveState: what the live view is composed of: a snapshot, and what is kept of earlier ones for curves and rates."""

from collections import deque
from dataclasses import dataclass, field

from emu.observe.snapshot import Snapshot
from emu.observe.usages import LETTERS

__all__ = ["MINUTE", "LiveState", "Sample"]

MINUTE = 60.0  # guest seconds that the curves show
_RATE_OVER = 2.0  # guest seconds


@dataclass(frozen=True, slots=True)
class Sample:
    """What is kept of a snapshot for curves and rates."""

    t: float
    rss: int
    used: int
    footprint: int
    faults: int
    reports: int
    returned: int
    #: frames that have gone along each arrow of the chain
    flows: tuple[int, ...] = ()
    #: transitions to each usage, in the order of LETTERS (CMM2)
    said: tuple[int, ...] = ()

    @classmethod
    def of(cls, s: Snapshot) -> "Sample":
        counters = s.counters
        return cls(
            s.t,
            s.rss_bytes,
            s.guest_used_bytes,
            s.footprint_bytes,
            counters["pgfault"],
            counters.get("reports", 0),
            counters["discard_frames"] * 4096,
            tuple(flow.frames for flow in s.flows),
            () if s.usages is None else tuple(s.usages.said(usage) for usage in LETTERS),
        )


@dataclass(slots=True)
class LiveState:
    """What the view is composed of."""

    title: str
    snapshot: Snapshot | None = None
    history: deque[Sample] = field(default_factory=deque)
    #: (guest time, what), newest last
    events: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=50))
    status: str = "running"
    message: str = ""
    help: bool = False
    #: seconds: of one look, of all, and of the run; and how many
    look_seconds: float = 0.0
    looked_seconds: float = 0.0
    run_seconds: float = 0.0
    looks: int = 0
    unicode: bool = True
    #: whether there is a keyboard
    keys: bool = True

    def add(self, snapshot: Snapshot) -> None:
        """Take a new snapshot; of the history, the last minute and one sample before it stay."""
        self.snapshot = snapshot
        if self.history and snapshot.t < self.history[-1].t:
            self.history.clear()
        self.history.append(Sample.of(snapshot))
        while len(self.history) > 1 and self.history[1].t <= snapshot.t - MINUTE:
            self.history.popleft()

    def rates(self) -> Sample | None:
        """Return faults, reports and bytes given back per guest second; None before any has passed, or when stepped."""
        if not self.history or (self.snapshot is not None and self.snapshot.clock == "step"):
            return None  # stepped time passes where nothing is done: a rate over it means nothing
        last = self.history[-1]
        first = last
        for sample in reversed(self.history):
            first = sample
            if last.t - sample.t >= _RATE_OVER:
                break
        passed = last.t - first.t
        if passed <= 0:
            return None

        def per_second(new: int, old: int) -> int:
            return round((new - old) / passed)

        return Sample(
            passed,
            0,
            0,
            0,
            per_second(last.faults, first.faults),
            per_second(last.reports, first.reports),
            per_second(last.returned, first.returned),
            # after a switch of the mechanism the arrows are others
            tuple(per_second(new, old) for new, old in zip(last.flows, first.flows, strict=False))
            if len(last.flows) == len(first.flows)
            else (),
            tuple(per_second(new, old) for new, old in zip(last.said, first.said, strict=False)),
        )
