"""NAME: one sentence. Copy this file, rename the class and its `name`, and add it to MECHANISMS in __init__.py.

Say who decides, whether guest code runs when memory is taken, and what it can't see. Then the settings: name, unit,
range, default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, Arrow
from emu.observe.pagemap import Stage
from emu.ranges import Ranges
from emu.units import parse_duration

__all__ = ["Eager"]


@dataclass(frozen=True, slots=True)
class Eager:
    """An example that works: every `period`, hand over every free block of order 10, with no flag and no budget."""

    period: float = 5.0

    name: ClassVar[str] = "eager"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {"period": lambda text: parse_duration(text, "period")}
    #: the stages that the live view shows, in the order in which memory goes, and the arrows between them
    chain: ClassVar[tuple[Stage, ...]] = (*GUEST_CHAIN, Stage.HOST_OWNED)
    arrows: ClassVar[tuple[Arrow, ...]] = GUEST_ARROWS

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Queue the first round. Raise BadValue here for settings out of range.

        A driver in the guest may look at the guest only; what it finds goes to the host.
        """

        if not 0.01 <= self.period <= 3600:
            raise BadValue(f"period {self.period!r} s must be from 0.01 to 3600")

        def round_() -> None:
            ranges = Ranges.of(
                (pfn, 1 << order)
                for zone in guest.zones
                for pfn, order, _, _ in zone.buddy.free_blocks()
                if order == 10
            )
            host.discard.frames(ranges)
            guest.timers.at(guest.clock.now() + self.period, round_, self)

        guest.timers.at(guest.clock.now() + self.period, round_, self)

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Stop: the round that is queued won't be run."""
        guest.timers.cancel(self)

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """What the live view shows."""
        return [("every", f"{self.period:g} s, order 10")]

    def pending(self, guest: GuestKernel) -> bool:
        """Nothing to wait for: it goes on for ever."""
        return False
