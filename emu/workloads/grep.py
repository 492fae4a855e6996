"""grep: a guest searches every file of a tree, once or more.

One pass over many files, each read from its start to its end: what fills a guest's memory with cache most often. The
bytes are compared with the files themselves, and the matches with those of a search there; neither is timed.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu.errors import BadValue, GuestIOError
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size
from emu.workloads import Step
from emu.workloads.tree import Tree, TreeFile, check_memory

__all__ = ["Grep"]

_PART = 1 << 20  # bytes a read


class Grep:
    """path: a directory of the host; pattern: what to search for, as it stands; passes; hold: guest seconds at the
    end; memory: anonymous bytes that the guest holds all the time."""

    name: ClassVar[str] = "grep"

    def __init__(
        self,
        path: str | Path,
        pattern: str = "include",
        passes: int = 1,
        hold: float | str = 60.0,
        *,
        memory: int | str = 0,
        seed: int = 1,
    ) -> None:
        if not pattern:
            raise BadValue("pattern '' is empty: everything would match")
        if not 1 <= passes <= 1000:
            raise BadValue(f"passes {passes!r} must be from 1 to 1000")
        self.tree = Tree(path)
        self.pattern = pattern.encode()
        self.passes = passes
        self.hold = parse_duration(hold, "hold")
        self.memory = parse_size(memory, "memory")
        self.seed = seed
        self._memory_checked = self._memory_wrong = 0
        self._miscounted = 0
        self.matches = 0
        self.bytes = 0
        self.seconds = 0.0

    @property
    def verified_frames(self) -> int:
        return self.tree.verified_frames + self._memory_checked

    @property
    def corrupt_frames(self) -> int:
        return self.tree.corrupt_frames + self._miscounted + self._memory_wrong

    def parameters(self) -> dict[str, Any]:
        return {
            "path": str(self.tree.path),
            "pattern": self.pattern.decode(),
            "passes": self.passes,
            "hold": self.hold,
            "memory": self.memory,
        }

    def measures(self) -> dict[str, Measure]:
        if not self.seconds:
            return {}
        return {
            "grep": Measure(self.bytes / self.seconds / (1 << 20), "MiB/s", "read and searched by the guest"),
            "matches": Measure(self.matches, "matches", f"of {self.pattern.decode()!r}, over all passes"),
        }

    def notes(self) -> list[str]:
        return self.tree.notes()

    def _count(self, parts: Iterator[bytes]) -> int:
        # a match may lie across two reads: what is around each seam is searched apart, and is too short to hold another
        found, tail, keep = 0, b"", len(self.pattern) - 1
        for part in parts:
            self.bytes += len(part)
            found += part.count(self.pattern)
            if keep:
                found += self.pattern in tail + part[:keep]
                tail = (tail + part)[-keep:] if len(part) < keep else part[-keep:]
        return found

    def search(self, machine: Machine, path: str, digest: Any = None) -> int:
        """Have the guest search one file; return the matches. digest, if given, is updated with what was read,
        untimed."""

        def parts() -> Iterator[bytes]:
            start = time.perf_counter()
            with machine.guest.open(path) as file:
                at = 0
                while part := file.read(at, _PART):
                    at += len(part)
                    yield part
                    if digest is not None:
                        self.seconds += time.perf_counter() - start
                        digest.update(part)
                        start = time.perf_counter()
            self.seconds += time.perf_counter() - start

        return self._count(parts())

    def _search_and_check(self, machine: Machine, file: TreeFile) -> None:
        digest = hashlib.sha256()
        try:
            found = self.search(machine, file.path, digest)
        except GuestIOError:
            self.tree.unreadable.append(file.path)
            return
        self.matches += found
        if self.tree.check(file, digest.digest()) and found != self._on_the_host(file.path):
            self._miscounted += -(-file.size // FRAME_SIZE)

    def _on_the_host(self, path: str) -> int:
        with open(self.tree.path / path, "rb", buffering=0) as file:
            before = self.bytes
            found = self._count(iter(lambda: file.read(_PART), b""))
            self.bytes = before
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return found

    def steps(self, machine: Machine) -> Iterator[Step]:
        tree = self.tree
        check_memory(self.memory, machine.guest.ram_bytes)
        tree.mount(machine)
        memory = machine.guest.spawn("app").mmap(self.memory) if self.memory else None
        if memory is not None:
            memory.fill(seed=self.seed)
        yield Step(f"boot, {format_size(self.memory)} of its own" if self.memory else "boot")
        for number in range(1, self.passes + 1):
            for file in tree.files:
                self._search_and_check(machine, file)
            yield Step(f"pass {number}: {tree}")
        if self.hold:
            yield Step(f"{self.hold:g} s later", wait=self.hold)
        if memory is not None:
            self._memory_checked = memory.pages
            self._memory_wrong = len(memory.verify(seed=self.seed))
