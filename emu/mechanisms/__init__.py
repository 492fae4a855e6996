"""Mechanisms: one file each, a registry of names, and how "reporting:order=0,delay=250ms" becomes one.

To add one, copy _template.py, and name it in MECHANISMS below.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from emu.errors import BadValue
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.mechanisms.aging import AgingMechanism
from emu.mechanisms.balloon import BalloonMechanism
from emu.mechanisms.cmm2 import Cmm2Light, Cmm2Mechanism
from emu.mechanisms.dropcaches import DropCaches
from emu.mechanisms.epoch import EpochMechanism
from emu.mechanisms.inactive import InactiveMechanism
from emu.mechanisms.none import NoMechanism
from emu.mechanisms.purge import PurgeMechanism
from emu.mechanisms.reporting import Reporting
from emu.mechanisms.swap import SwapMechanism
from emu.observe.chain import Arrow
from emu.observe.pagemap import Stage

__all__ = ["ALIASES", "MECHANISMS", "Mechanism", "make_mechanism"]


class Mechanism(Protocol):
    """A way of giving memory back: guest drivers and a host policy, wired together.

    A dataclass; its fields are its settings.
    """

    name: ClassVar[str]
    #: field -> how to read it from text
    parsers: ClassVar[dict[str, Callable[[str], Any]]]
    #: the stages that its memory goes through, and the ways between them
    chain: ClassVar[tuple[Stage, ...]]
    arrows: ClassVar[tuple[Arrow, ...]]

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Wire guest and host together, once, before the guest does anything."""

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Undo attach(): the guest goes on with another mechanism. What was given back stays given back."""

    def pending(self, guest: GuestKernel) -> bool:
        """Whether something is still on its way back (Machine.settle waits for it)."""

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """Return what the live view shows of it: at most five lines, label and text, together
        at most 27 characters."""


MECHANISMS: dict[str, type[Mechanism]] = {
    cls.name: cls
    for cls in (
        NoMechanism,
        Reporting,
        DropCaches,
        AgingMechanism,
        BalloonMechanism,
        InactiveMechanism,
        EpochMechanism,
        PurgeMechanism,
        SwapMechanism,
        Cmm2Mechanism,
        Cmm2Light,
    )
}
ALIASES = {"fpr": "reporting", "free-page-reporting": "reporting"}


def make_mechanism(text: str) -> Mechanism:
    """Return a mechanism from its name and settings, NAME[:key=value,...]. Raises BadValue."""
    name, _, rest = text.partition(":")
    name = ALIASES.get(name, name)
    if name not in MECHANISMS:
        raise BadValue(f"mechanism {name!r} isn't known: {', '.join([*MECHANISMS, *ALIASES])}")
    cls = MECHANISMS[name]
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in cls.parsers or not equals:
            known = ", ".join(f"{key}=..." for key in cls.parsers) or "it has none"
            raise BadValue(f"setting {item!r} of mechanism {name} isn't known: {known}")
        try:
            settings[key] = cls.parsers[key](value)
        except BadValue:
            raise
        except ValueError:
            raise BadValue(f"setting {key}={value!r} of mechanism {name} can't be read") from None
    return cls(**settings)


def settings_of(mechanism: Mechanism) -> dict[str, Any]:
    """Return a mechanism's settings by name."""
    assert dataclasses.is_dataclass(mechanism)
    return {
        name: value.name.lower() if isinstance(value, enum.Enum) else value
        for name, value in dataclasses.asdict(mechanism).items()
    }
