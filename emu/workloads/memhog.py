"""memhog: allocate, fill, check, free; then do it again, so that the freed frames fault back; drain the per-CPU lists.

The shape by which free page reporting was argued for (A. Duyck's "memhog 32g"), with every byte checked.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import format_size, parse_duration, parse_ram_size
from emu.workloads import Step

__all__ = ["Memhog"]


class Memhog:
    """size: bytes or text a round; rounds; hold: guest seconds after each free; seed of the content."""

    name: ClassVar[str] = "memhog"

    def __init__(
        self, size: int | str = "512MiB", rounds: int = 2, hold: float | str = 40.0, seed: int = 1, thp: bool = False
    ) -> None:
        self.size = parse_ram_size(size, "memhog size")
        if not 1 <= rounds <= 10000:
            raise BadValue(f"rounds {rounds!r} must be from 1 to 10000")
        self.rounds = rounds
        self.hold = parse_duration(hold, "hold")
        self.seed = seed
        self.thp = thp
        self.verified_frames = 0
        self.corrupt_frames = 0

    def parameters(self) -> dict[str, Any]:
        return {"size": self.size, "rounds": self.rounds, "hold": self.hold, "thp": self.thp}

    def notes(self) -> list[str]:
        return []

    def measures(self) -> dict[str, Measure]:
        return {}

    def steps(self, machine: Machine) -> Iterator[Step]:
        if self.size > machine.guest.ram_bytes:
            raise BadValue(
                f"memhog size {self.size} ({format_size(self.size)}) is larger than the RAM, "
                f"{format_size(machine.guest.ram_bytes)}"
            )
        yield Step("boot")
        for round_ in range(1, self.rounds + 1):
            process = machine.guest.spawn("memhog")
            memory = process.mmap(self.size, thp=self.thp)
            memory.fill(seed=self.seed + round_)
            self.verified_frames += memory.pages
            self.corrupt_frames += len(memory.verify(seed=self.seed + round_))
            yield Step(f"{round_}: touched {format_size(self.size)}")
            process.exit()
            yield Step(f"{round_}: freed")
            if self.hold:
                yield Step(f"{round_}: freed, {self.hold:g} s later", wait=self.hold)
        machine.guest.drain_pages()  # what is left on the per-CPU lists, as drop_caches would
        yield Step(f"lists drained, {self.hold:g} s later", wait=self.hold)
