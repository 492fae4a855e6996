"""build: the shape of a compiler run, and of what follows it.

Jobs, one after another: a short process with anonymous memory reads a source, and headers that most jobs read, and
writes an object. Then a linker reads all objects and writes a program, `clean` removes them, and the guest is idle. By
such a run, and what is resident after it, HyperAlloc (EuroSys'25) compared free page reporting with its betters.

Sources come from a tree of the host, which is only read, or are made up; objects go to a temporary directory of the
host. Anonymous memory is verified before each process ends, objects when the linker reads them.
"""

import hashlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from emu.errors import BadValue
from emu.guest.process import Process
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_ram_size, parse_size
from emu.workloads import Step
from emu.workloads.tree import Tree, TreeFile

__all__ = ["Build"]

_HEADERS = 0.1  # of all sources, read by every job in part
_MADE_UP = 120  # sources, if no tree is given


class _Job(NamedTuple):
    number: int
    tree: Tree
    source: TreeFile
    headers: list[TreeFile]


class Build:
    """path: a tree with sources, or None; jobs; memory: anonymous bytes of the largest job; program: bytes of the
    compiler, which each job maps and runs through once; 0: none; hold: guest seconds."""

    name: ClassVar[str] = "build"

    def __init__(
        self,
        path: str | Path | None = None,
        jobs: int = 100,
        memory: int | str = "32MiB",
        *,
        program: int | str = 0,
        hold: float | str = 60.0,
        seed: int = 1,
    ) -> None:
        if not 1 <= jobs <= 100_000:
            raise BadValue(f"jobs {jobs!r} must be from 1 to 100000")
        self.path = path
        self.tree = None if path is None else Tree(path)
        self.jobs = jobs
        self.memory = parse_ram_size(memory, "job memory")
        self.program = parse_size(program, "program")
        self._text = b""
        self.hold = parse_duration(hold, "hold")
        self.seed = seed
        self.verified_frames = 0
        self.corrupt_frames = 0

    def parameters(self) -> dict[str, Any]:
        return {
            "path": None if self.path is None else str(self.path),
            "jobs": self.jobs,
            "memory": self.memory,
            "program": self.program,
            "hold": self.hold,
        }

    def measures(self) -> dict[str, Measure]:
        return {}

    def notes(self) -> list[str]:
        return [] if self.tree is None else self.tree.notes()

    def steps(self, machine: Machine) -> Iterator[Step]:
        with tempfile.TemporaryDirectory(prefix="emu-build-") as scratch:
            rng = random.Random(self.seed)
            tree = self.tree if self.tree is not None else Tree(self._make_up(Path(scratch, "src"), rng))
            Path(scratch, "obj").mkdir()
            tree.mount(machine)
            if self.program:
                self._text = rng.randbytes(self.program)
                Path(scratch, "bin").mkdir()
                Path(scratch, "bin", "cc").write_bytes(self._text)
                machine.add_disk(Path(scratch, "bin"), "bin", read_only=True)
            machine.add_disk(Path(scratch, "obj"), "obj")
            yield Step("boot")
            objects: dict[str, bytes] = {}
            headers = tree.first(_HEADERS)
            sources = tree.files[len(headers) :] or tree.files
            half = max(self.jobs // 2, 1)
            for number in range(self.jobs):
                job = _Job(number, tree, sources[number % len(sources)], headers)
                name, digest = self._compile(machine, job, rng)
                objects[name] = digest
                yield Step.pause(0.05)
                if number + 1 == half and half < self.jobs:
                    yield Step(f"{half} of {self.jobs} jobs")
            yield Step(f"{self.jobs} jobs done")
            self._link(machine, objects)
            yield Step("linked")
            if self.hold:
                yield Step(f"linked, {self.hold:g} s later", wait=self.hold)
            for name in objects:
                machine.guest.unlink(name)
            machine.guest.unlink("obj/program")
            yield Step("clean")
            if self.hold:
                yield Step(f"clean, {self.hold:g} s later", wait=self.hold)
            self.verified_frames += tree.verified_frames
            self.corrupt_frames += tree.corrupt_frames

    @staticmethod
    def _make_up(folder: Path, rng: random.Random) -> Path:
        folder.mkdir()
        for number in range(_MADE_UP):
            (folder / f"{number:04}.c").write_bytes(rng.randbytes(rng.randrange(2, 60) * 1024 + rng.randrange(1000)))
        return folder

    def _compile(self, machine: Machine, job: "_Job", rng: random.Random) -> tuple[str, bytes]:
        # returns the object's name and what it should hold, hashed
        guest = machine.guest
        process = guest.spawn("cc")
        if self.program:
            self._run_program(machine, process)
        size = max(int(self.memory * rng.uniform(0.2, 1.0)) // FRAME_SIZE, 1) * FRAME_SIZE
        memory = process.mmap(size)
        memory.fill(seed=self.seed + job.number)
        job.tree.read(machine, [job.source, *rng.sample(job.headers, min(len(job.headers), 10))])
        name = f"obj/{job.number:05}.o"
        content = rng.randbytes(job.source.size // 2 + 512)
        with guest.open(name, "w") as file:
            file.write(0, content)
        self.verified_frames += memory.pages
        self.corrupt_frames += len(memory.verify(seed=self.seed + job.number))
        process.exit()
        return name, hashlib.sha256(content).digest()

    def _run_program(self, machine: Machine, process: Process) -> None:
        # execve(): the program's file mapped privately, and each page of it used once
        with machine.guest.open("bin/cc") as file:
            text = process.mmap(-(-self.program // FRAME_SIZE) * FRAME_SIZE, file=file)
        seen = text.read(0, self.program)
        self.verified_frames += text.pages
        if seen != self._text:
            self.corrupt_frames += sum(
                seen[at : at + FRAME_SIZE] != self._text[at : at + FRAME_SIZE]
                for at in range(0, self.program, FRAME_SIZE)
            )

    def _link(self, machine: Machine, objects: dict[str, bytes]) -> None:
        guest = machine.guest
        process = guest.spawn("ld")
        memory = process.mmap(self.memory)
        memory.fill(seed=self.seed)
        at = 0
        with guest.open("obj/program", "w") as program:
            for name, digest in objects.items():
                with guest.open(name) as file:
                    content = file.read(0, file.size)
                frames = -(-len(content) // FRAME_SIZE)
                self.verified_frames += frames
                if hashlib.sha256(content).digest() != digest:
                    self.corrupt_frames += frames
                program.write(at, content)
                at += len(content)
            program.fsync()
        self.corrupt_frames += len(memory.verify(seed=self.seed))
        process.exit()

    def __str__(self) -> str:
        return f"{self.jobs} jobs of up to {format_size(self.memory)}"
