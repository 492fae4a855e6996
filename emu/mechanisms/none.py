"""none: nothing is given back. The reference: a guest's RSS is its high-water mark."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, Arrow
from emu.observe.pagemap import Stage

__all__ = ["NoMechanism"]


@dataclass(frozen=True, slots=True)
class NoMechanism:
    """Nothing."""

    name: ClassVar[str] = "none"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {}
    chain: ClassVar[tuple[Stage, ...]] = GUEST_CHAIN
    arrows: ClassVar[tuple[Arrow, ...]] = GUEST_ARROWS

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """There is nothing to wire: a guest without a balloon device."""

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Nor to undo."""

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        return [("gives back", "nothing")]

    def pending(self, guest: GuestKernel) -> bool:
        return False
