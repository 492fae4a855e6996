"""What the workloads over a directory tree share: the files, what they should hold, and the comparison.

The expected digests are taken from the host's files themselves, not through the guest, and the host's own cache is
dropped behind that reading.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emu.errors import BadValue, GuestIOError
from emu.machine import Machine
from emu.units import FRAME_SIZE, format_size

__all__ = ["Tree", "TreeFile", "check_memory"]

_PART = 1 << 20  # bytes a read


def check_memory(memory: int, ram_bytes: int) -> None:
    """Raise BadValue for more memory of the guest's own than it has RAM."""
    if memory > ram_bytes:
        raise BadValue(f"memory {format_size(memory)} is more than the RAM, {format_size(ram_bytes)}")


@dataclass(slots=True)
class TreeFile:
    """A file: its path in the guest, its size in bytes, and what the host's own reading of it hashes to."""

    path: str
    size: int
    digest: bytes


class Tree:
    """A directory of the host as the guest's disk, read-only."""

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise BadValue("path '' is empty: name a directory")
        self.path = Path(path)
        if not self.path.is_dir():
            raise BadValue(f"path {str(path)!r} isn't a directory")
        self.files: list[TreeFile] = []
        #: left out, or not comparable
        self.unreadable: list[str] = []
        self.changed: list[str] = []
        self.verified_frames = 0
        self.corrupt_frames = 0

    def mount(self, machine: Machine) -> None:
        """Mount it at the guest's root, and take the digests."""
        machine.add_disk(self.path, "", read_only=True)
        for path, size in machine.guest.walk():
            try:
                digest = self._digest(path)
            except OSError:
                self.unreadable.append(path)
                continue
            if size:
                self.files.append(TreeFile(path, size, digest))
        if not self.files:
            raise BadValue(f"path {str(self.path)!r} holds no file with anything in it that can be read")

    def _digest(self, path: str) -> bytes:
        with open(self.path / path, "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return digest

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        return f"{len(self.files):,} files, {format_size(self.size)}"

    def first(self, share: float) -> list[TreeFile]:
        """Return the first files that make up a share of all bytes."""
        chosen, size = [], 0
        for file in self.files:
            if size >= share * self.size:
                break
            chosen.append(file)
            size += file.size
        return chosen

    def read(self, machine: Machine, files: list[TreeFile]) -> int:
        """Have the guest read files whole, and compare each with the host's; return the bytes."""
        total = 0
        for file in files:
            digest = hashlib.sha256()
            try:
                for part in self.parts(machine, file):
                    digest.update(part)
                    total += len(part)
            except GuestIOError:
                self.unreadable.append(file.path)
                continue
            self.check(file, digest.digest())
        return total

    def check(self, file: TreeFile, digest: bytes) -> bool:
        """Count a file's frames as checked, and as wrong if its digest is; False if the host's file was changed
        since."""
        frames = -(-file.size // FRAME_SIZE)
        if digest != file.digest:
            if self._changed(file):
                self.changed.append(file.path)
                return False
            self.corrupt_frames += frames
        self.verified_frames += frames
        return True

    def _changed(self, file: TreeFile) -> bool:
        # somebody may have written it on the host since
        try:
            return self._digest(file.path) != file.digest
        except OSError:
            return True

    @staticmethod
    def parts(machine: Machine, file: TreeFile) -> Iterator[bytes]:
        """Yield a file's bytes as the guest reads them."""
        with machine.guest.open(file.path) as opened:
            at = 0
            while part := opened.read(at, _PART):
                at += len(part)
                yield part

    def notes(self) -> list[str]:
        """Return what the result must say."""
        notes = []
        for what, paths in (
            ("unreadable, left out", self.unreadable),
            ("changed on the host meanwhile, not compared", self.changed),
        ):
            if paths:
                notes.append(f"{len(paths)} files {what}: {paths[0]}{' ...' if len(paths) > 1 else ''}")
        return notes
