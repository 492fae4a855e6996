"""cache: a guest reads a real tree, keeps using part of it, and reads all of it once more.

The shape that the complaint has: after one pass over many files the guest's memory is full of cache, of which it needs
little. A working set, the first files up to a share of all bytes, is read every few seconds; the rest isn't. Then the
whole tree is read again, and what was given away has to come from the disk. Every byte is compared with the file
itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import format_size, parse_duration, parse_ram_size
from emu.workloads import Step
from emu.workloads.tree import Tree, check_memory

__all__ = ["Cache"]


class Cache:
    """path: a directory of the host; working_set: the share that is read every `every` guest seconds, over `hold`;
    memory: anonymous bytes that the guest's process holds all the time."""

    name: ClassVar[str] = "cache"

    def __init__(
        self,
        path: str | Path,
        working_set: float = 0.2,
        *,
        every: float | str = 5.0,
        hold: float | str = 150.0,
        memory: int | str = "64MiB",
        seed: int = 1,
    ) -> None:
        if not 0 <= working_set <= 1:
            raise BadValue(f"working set {working_set!r} must be a share from 0 to 1")
        self.tree = Tree(path)
        self.working_set = working_set
        self.every = parse_duration(every, "every")
        self.hold = parse_duration(hold, "hold")
        self.memory = parse_ram_size(memory, "memory")
        self.seed = seed
        self._memory_wrong = 0
        self._memory_checked = 0
        if self.every < 0.1:
            raise BadValue(f"every {every!r} must be at least 0.1 s")

    @property
    def verified_frames(self) -> int:
        return self.tree.verified_frames + self._memory_checked

    @property
    def corrupt_frames(self) -> int:
        return self.tree.corrupt_frames + self._memory_wrong

    def parameters(self) -> dict[str, Any]:
        return {
            "path": str(self.tree.path),
            "working_set": self.working_set,
            "every": self.every,
            "hold": self.hold,
            "memory": self.memory,
        }

    def measures(self) -> dict[str, Measure]:
        return {}

    def notes(self) -> list[str]:
        return self.tree.notes()

    def steps(self, machine: Machine) -> Iterator[Step]:
        tree = self.tree
        check_memory(self.memory, machine.guest.ram_bytes)
        tree.mount(machine)
        memory = machine.guest.spawn("app").mmap(self.memory)
        memory.fill(seed=self.seed)
        yield Step(f"boot, {format_size(self.memory)} of its own")
        tree.read(machine, tree.files)
        yield Step(f"1: read {tree}")
        working_set = tree.first(self.working_set)
        yield from self._use(machine, working_set, 1)
        tree.read(machine, tree.files)
        yield Step("2: read all again")
        yield from self._use(machine, working_set, 2)
        self._memory_checked = memory.pages
        self._memory_wrong = len(memory.verify(seed=self.seed))

    def _use(self, machine: Machine, working_set: list[Any], number: int) -> Iterator[Step]:
        if not self.hold:
            return
        if not working_set:
            yield Step(f"{number}: idle, {self.hold:g} s", wait=self.hold)
            return
        start = machine.clock.now()
        end = start + self.hold
        half: float | None = start + self.hold / 2
        at = start + self.every
        while at <= end:
            if half is not None and at > half:
                yield Step(f"{number}: working set, {self.hold / 2:g} s", wait=max(half - machine.clock.now(), 0.0))
                half = None
            # on time, whatever the reading before it took
            yield Step.pause(at - machine.clock.now())
            self.tree.read(machine, working_set)
            at += self.every
        yield Step(f"{number}: working set, {self.hold:g} s", wait=max(end - machine.clock.now(), 0.0))
