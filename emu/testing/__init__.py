"""What users of emu may use in their own tests.

rss_delta measures what a piece of code does to the residency of a buffer, a mapping, a GuestRam or a process; the
pytest plugin of this package gives it as a fixture to every project that has emu installed. BytesMemory and
ReferenceMemory stand in for a GuestRam where no fault is wanted, MemoryDisk for a disk whose operations are to be
watched or to fail; StepClock is the clock that tests step.
"""

from emu.clock import StepClock
from emu.testing.disk import MemoryDisk
from emu.testing.memory import BytesMemory, ReferenceMemory
from emu.testing.rss import RssDelta, rss_delta

__all__ = ["BytesMemory", "MemoryDisk", "ReferenceMemory", "RssDelta", "StepClock", "rss_delta"]
