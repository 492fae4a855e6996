"""emu: a guest's memory on a desk. Real pages, real page faults, real RSS, no virtual machine."""

from emu import uffd
from emu.clock import Clock
from emu.clock import ScaledClock
from emu.clock import StepClock
from emu.errors import AllocatorError
from emu.errors import BadValue
from emu.errors import ClosedError
from emu.errors import DiscardFault
from emu.errors import EmuError
from emu.errors import ForkedError
from emu.errors import GuestError
from emu.errors import GuestIOError
from emu.errors import GuestMemoryError
from emu.errors import HostError
from emu.errors import OomKilled
from emu.errors import OutOfMemory
from emu.errors import RangeError
from emu.errors import ServiceDeadError
from emu.errors import UffdError
from emu.guest.buddy import Buddy
from emu.guest.buddy import MigrateType
from emu.machine import Machine
from emu.observe.snapshot import Snapshot
from emu.frames import Cause
from emu.frames import FrameState
from emu.frames import Said
from emu.frames import StealPolicy
from emu.frames import Usage
from emu.ram import GuestRam
from emu.ram import Histogram

__version__ = "0.1.0"

__all__ = [
    "AllocatorError",
    "BadValue",
    "Buddy",
    "Cause",
    "Clock",
    "ClosedError",
    "DiscardFault",
    "EmuError",
    "ForkedError",
    "FrameState",
    "GuestError",
    "GuestIOError",
    "GuestMemoryError",
    "GuestRam",
    "Histogram",
    "HostError",
    "Machine",
    "MigrateType",
    "OomKilled",
    "OutOfMemory",
    "RangeError",
    "Said",
    "ScaledClock",
    "ServiceDeadError",
    "Snapshot",
    "StealPolicy",
    "StepClock",
    "UffdError",
    "Usage",
    "__version__",
    "uffd",
]
