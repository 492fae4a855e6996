"""load: a guest process reads every file of a real directory tree into its memory and keeps them.

Then it frees the second half of them, waits, drains the per-CPU lists (which hide up to the low watermark from the
host), reads those files again into memory that faults back, and compares the SHA-256 of every file in guest memory with
the one taken when it was first read from the disk. Real data in real RAM: a frame that came back wrong, torn, or from
somebody else can't pass.

Regular files only (one that says it is empty, as those of /proc do, is empty here); links and special files are left
out, unreadable ones are counted and said.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.process import Process
from emu.guest.vma import Mapping
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import FRAME_SIZE, format_size, parse_duration
from emu.workloads import Step

__all__ = ["Load"]

_PART = 4 << 20  # bytes read, or hashed, at a time


@dataclass(slots=True)
class _File:
    path: Path
    size: int
    digest: bytes
    mapping: Mapping | None


class Load:
    """path: a directory (or one file) of the host; hold: guest seconds after the free."""

    name: ClassVar[str] = "load"

    def __init__(self, path: str | Path, hold: float | str = 40.0) -> None:
        if not str(path):
            raise BadValue("path '' is empty: name a directory")
        self.path = Path(path)
        self.hold = parse_duration(hold, "hold")
        self.verified_frames = 0
        self.corrupt_frames = 0
        self.unreadable: list[str] = []
        #: files whose bytes on the disk were others at the second reading
        self.changed: list[str] = []
        #: files that couldn't be read a second time: not verified
        self.gone: list[str] = []
        try:
            if self.path.is_dir():
                os.listdir(self.path)
            elif self.path.is_file() or not self.path.exists():
                with self.path.open("rb"):
                    pass
            else:
                raise BadValue(f"path {str(path)!r} is neither a directory nor a regular file")
        except OSError as error:
            raise BadValue(f"path {str(path)!r} can't be read: {error.strerror}") from None

    def parameters(self) -> dict[str, Any]:
        return {"path": str(self.path), "hold": self.hold}

    def _paths(self) -> Iterator[Path]:
        if self.path.is_file():
            yield self.path
            return

        def unreadable(error: OSError) -> None:
            self.unreadable.append(str(error.filename))

        for folder, folders, names in os.walk(self.path, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    yield path

    @staticmethod
    def _read(path: Path, process: Process) -> _File:
        # the mapping is made for the size at open; a file that grows meanwhile is cut, one that shrinks is shorter
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            mapping = process.mmap(-(-size // FRAME_SIZE) * FRAME_SIZE) if size else None
            digest = hashlib.sha256()
            at = 0
            try:
                while mapping is not None and at < size and (data := file.read(min(_PART, size - at))):
                    mapping.write(at, data)
                    digest.update(data)
                    at += len(data)
            except OSError:
                if mapping is not None:
                    mapping.munmap()
                raise
        return _File(path, at, digest.digest(), mapping)

    def _verify(self, file: _File) -> None:
        digest = hashlib.sha256()
        if file.mapping is not None:
            for at in range(0, file.size, _PART):
                digest.update(file.mapping.read(at, min(_PART, file.size - at)))
        frames = -(-file.size // FRAME_SIZE)
        self.verified_frames += frames
        if digest.digest() != file.digest:
            self.corrupt_frames += frames

    def notes(self) -> list[str]:
        return [
            f"{len(paths)} files {what}: {paths[0]}{' ...' if len(paths) > 1 else ''}"
            for what, paths in (
                ("unreadable, left out", self.unreadable),
                ("changed on the disk meanwhile", self.changed),
                ("gone from the disk meanwhile", self.gone),
            )
            if paths
        ]

    def measures(self) -> dict[str, Measure]:
        return {}

    def steps(self, machine: Machine) -> Iterator[Step]:
        yield Step("boot")
        process = machine.guest.spawn("load")
        files: list[_File] = []
        for path in self._paths():
            try:
                files.append(self._read(path, process))
            except OSError:
                self.unreadable.append(str(path))
        if not files:
            raise BadValue(f"path {str(self.path)!r} holds no file that can be read")
        total = sum(file.size for file in files)
        yield Step(f"read {len(files)} files, {format_size(total)}")

        freed = files[len(files) // 2 :]
        for file in freed:
            if file.mapping is not None:
                file.mapping.munmap()
        yield Step(f"freed {len(freed)} of them")
        yield from self._wait(machine)

        for file in list(freed):
            try:
                again = self._read(file.path, process)
            except OSError:
                self.gone.append(str(file.path))
                files.remove(file)
                continue
            if again.digest != file.digest:  # the disk's doing, not the guest's memory's
                self.changed.append(str(file.path))
            file.size, file.digest, file.mapping = again.size, again.digest, again.mapping
        yield Step(f"read {len(freed) - len(self.gone)} again")
        for file in files:
            self._verify(file)
        yield Step(f"verified {len(files)} by SHA-256")
        process.exit()
        yield Step("exited")
        yield from self._wait(machine)

    def _wait(self, machine: Machine) -> Iterator[Step]:
        if self.hold:
            yield Step(f"{self.hold:g} s later", wait=self.hold)
        machine.guest.drain_pages()
        yield Step(f"lists drained, {self.hold:g} s later", wait=self.hold)
