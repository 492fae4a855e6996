"""cmm2: the guest says what each page is worth, and the host takes what it wants without a word (CMM2).

Decided by the host; no guest code runs when memory is taken, and none is needed: it works while the guest is paused.
What the guest does all the time is to say something, of each page that it frees, reads, or uses (guest.page_states).
A page that was taken is read from the disk again when it is next used. `cmm2-light` is what was merged for s390 in
2008: only the allocator says something, so only free memory can be taken.

Settings: max (bytes of footprint above which the host takes, looked at four times a guest second, between two calls of
the guest: not a limit as swap's is; without it, the host takes when it is told to: host.steal),
policy (which pages of a kind go first: age, round or random), dirty (page: the machine has a dirty bit a page, as
s390 has; mapping: one a page-table entry, as x86 has), minor (yes: minor faults say nothing, and discard faults
repair), buffers (yes: pages that were written keep private data, and so stay), scan (between two looks at accessed
bits, 5s), memory, file (of a store for dirty pages that may be written through a mapping; without one they stay in
memory).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from emu.errors import BadValue
from emu.frames import StealPolicy
from emu.guest.kernel import GuestKernel
from emu.guest.page_states import PageStates, StatesSettings
from emu.host.hypervisor import Hypervisor
from emu.host.stealing import KINDS, Stealing
from emu.mechanisms.reporting import parse_yes
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, STATES_ARROWS, Arrow
from emu.observe.pagemap import Stage
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size

__all__ = ["Cmm2Light", "Cmm2Mechanism"]


def _policy(text: str) -> StealPolicy:
    try:
        return StealPolicy[text.upper()]
    except KeyError:
        raise BadValue(f"policy {text!r} isn't known: {', '.join(p.name.lower() for p in StealPolicy)}") from None


def _dirty(text: str) -> Literal["page", "mapping"]:
    if text not in ("page", "mapping"):
        raise BadValue(f"dirty {text!r} isn't known: page or mapping")
    return "page" if text == "page" else "mapping"


@dataclass(frozen=True, slots=True)
class Cmm2Mechanism:
    """Sizes are bytes, scan guest seconds."""

    max: int | None = None
    policy: StealPolicy = StealPolicy.AGE
    dirty: Literal["page", "mapping"] = "page"
    minor: bool = False
    buffers: bool = False
    scan: float = 5.0
    memory: int | None = None
    file: str | None = None

    name: ClassVar[str] = "cmm2"
    light: ClassVar[bool] = False
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "max": lambda text: parse_size(text, "cmm2 max"),
        "policy": _policy,
        "dirty": _dirty,
        "minor": parse_yes,
        "buffers": parse_yes,
        "scan": lambda text: parse_duration(text, "cmm2 scan"),
        "memory": lambda text: parse_size(text, "cmm2 memory"),
        "file": str,
    }
    chain: ClassVar[tuple[Stage, ...]] = (
        Stage.ANONYMOUS,
        Stage.DIRTY,
        Stage.INACTIVE,
        Stage.VOLATILE,
        Stage.DISCARDED,
        Stage.FREE,
    )
    arrows: ClassVar[tuple[Arrow, ...]] = (*GUEST_ARROWS, *STATES_ARROWS)

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Have the guest say what its pages are worth, and the host take what is over `max`."""
        self._check()
        if (self.memory is not None or self.file is not None) and not host.ram.has_store:
            host.ram.open_store(self.memory, file=self.file)
        host.aside.recall()  # what another mechanism was handed
        host.track_idle(self.scan)
        settings = StatesSettings(self.light, self.dirty, self.minor, self.buffers)
        PageStates(guest, settings).begin()
        host.stealing = Stealing(host, self.max, self.policy)

    def _check(self) -> None:
        if not isinstance(self.scan, int | float) or not 0.1 <= self.scan <= 3600:
            raise BadValue(f"{self.name} scan {self.scan!r} must be from 0.1 to 3600 s")
        if not isinstance(self.policy, StealPolicy):
            raise BadValue(
                f"{self.name} policy {self.policy!r} isn't a StealPolicy: {', '.join(StealPolicy.__members__)}"
            )
        if self.dirty not in ("page", "mapping"):
            raise BadValue(f"{self.name} dirty {self.dirty!r} isn't known: page or mapping")
        if not isinstance(self.minor, bool) or not isinstance(self.buffers, bool):
            raise BadValue(f"{self.name} minor {self.minor!r} and buffers {self.buffers!r} must be True or False")
        if self.max is not None and (not isinstance(self.max, int) or self.max < 0):
            raise BadValue(f"{self.name} max {self.max!r} must be a number of bytes, or None")

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """All is stable again. What was taken leaves the cache."""
        if host.stealing is not None:
            host.stealing.stop()
            host.stealing = None
        host.end_idle()
        if guest.page_states is not None:
            guest.page_states.end()

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """What was taken, of each kind, and what was said."""
        if guest.page_states is None:
            return [("states", "none")]
        stats, said = host.ram.stats(), host.ram.transitions()
        took = {kind: format_size(stats[f"steal_{kind}"] * FRAME_SIZE) for kind in KINDS}
        return [
            ("max, by", f"{'-' if self.max is None else format_size(self.max)}, {self.policy.name.lower()}"),
            ("stolen U", took["unused"]),
            ("V", took["volatile"]),
            ("P, kept", f"{took['potential']}, {took['preserved']}"),
            ("said, gone", f"{said.total:,}, {sum(said.gone.values()):,}"),
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Nothing is on its way by itself."""
        return False


@dataclass(frozen=True, slots=True)
class Cmm2Light(Cmm2Mechanism):
    """Stable and unused alone."""

    name: ClassVar[str] = "cmm2-light"
    light: ClassVar[bool] = True
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        key: parser for key, parser in Cmm2Mechanism.parsers.items() if key not in ("dirty", "minor", "buffers")
    }
    chain: ClassVar[tuple[Stage, ...]] = (*GUEST_CHAIN, Stage.HOST_OWNED)
