"""fio: random reads and writes of blocks over one large file, as the tool of that name does.

Blocks are drawn evenly, or so that some are far more popular than others (Zipf). Each block says which one it is and
how often it was written; a read is compared with that, and after the last fsync the file on the host is, block by
block.
"""

import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.machine import Machine
from emu.observe.result import Measure
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size
from emu.workloads import Step

__all__ = ["Fio"]

_HEAD = struct.Struct("<QQQ")
_PART = 1 << 20


class Fio:
    """size of the file, block, in bytes or text; ops; reads: the share of reads; zipf: how uneven, 0 is even."""

    name: ClassVar[str] = "fio"

    def __init__(
        self,
        size: int | str = "256MiB",
        block: int | str = "4KiB",
        ops: int = 20000,
        *,
        reads: float = 0.7,
        zipf: float = 0.0,
        hold: float | str = 60.0,
        folder: str | Path | None = None,
        seed: int = 1,
    ) -> None:
        self.size = parse_size(size, "fio size")
        self.block = parse_size(block, "fio block")
        if self.block < 64 or self.block > 1 << 20 or self.size < self.block or self.size % self.block:
            raise BadValue(f"fio size {size!r} must be a multiple of the block, {block!r}, of 64 bytes to 1 MiB")
        if not 1 <= ops <= 100_000_000:
            raise BadValue(f"ops {ops!r} must be from 1 to 100000000")
        if not 0 <= reads <= 1:
            raise BadValue(f"reads {reads!r} must be a share from 0 to 1")
        if not 0 <= zipf <= 5:
            raise BadValue(f"zipf {zipf!r} must be from 0 to 5")
        self.ops, self.reads, self.zipf = ops, reads, zipf
        self.hold = parse_duration(hold, "hold")
        self.folder = folder
        self.seed = seed
        self.verified_frames = 0
        self.corrupt_frames = 0
        self._seconds = 0.0
        self._versions: dict[int, int] = {}

    def parameters(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "block": self.block,
            "ops": self.ops,
            "reads": self.reads,
            "zipf": self.zipf,
            "hold": self.hold,
        }

    def measures(self) -> dict[str, Measure]:
        if not self._seconds:
            return {}
        return {"ops": Measure(self.ops / self._seconds, "ops/s", f"of {format_size(self.block)}, Python and disk")}

    def notes(self) -> list[str]:
        return []

    def _content(self, block: int) -> bytes:
        head = _HEAD.pack(self.seed, block, self._versions.get(block, 0))
        return (head * (self.block // len(head) + 1))[: self.block]

    def _blocks(self, rng: random.Random) -> Iterator[int]:
        n = self.size // self.block
        if not self.zipf:
            while True:
                yield rng.randrange(n)
        weights, total = [], 0.0
        for rank in range(1, n + 1):
            total += rank**-self.zipf
            weights.append(total)
        order = list(range(n))
        rng.shuffle(order)  # popular blocks aren't neighbours
        while True:
            yield from (order[rank] for rank in rng.choices(range(n), cum_weights=weights, k=1000))

    def _check(self, block: int, data: bytes) -> None:
        frames = -(-self.block // FRAME_SIZE)
        self.verified_frames += frames
        if data != self._content(block):
            self.corrupt_frames += frames

    def steps(self, machine: Machine) -> Iterator[Step]:
        with tempfile.TemporaryDirectory(prefix="emu-fio-", dir=self.folder) as scratch:
            room = shutil.disk_usage(scratch).free
            if self.size > room:
                raise BadValue(f"fio size {format_size(self.size)}: {scratch} has {format_size(room)} free")
            machine.add_disk(scratch, "")
            rng = random.Random(self.seed)
            file = machine.guest.open("data", "w")
            per_part = max(_PART // self.block, 1)
            blocks = self.size // self.block
            for first in range(0, blocks, per_part):
                part = b"".join(self._content(b) for b in range(first, min(first + per_part, blocks)))
                file.write(first * self.block, part)
            yield Step(f"wrote {format_size(self.size)}")
            file.fsync()
            yield Step("fsync")
            drawn = self._blocks(rng)
            fifth = max(self.ops // 5, 1)
            for op in range(1, self.ops + 1):
                block = next(drawn)
                start = time.perf_counter()
                if rng.random() < self.reads:
                    data = file.read(block * self.block, self.block)
                    self._seconds += time.perf_counter() - start
                    self._check(block, data)
                else:
                    self._versions[block] = self._versions.get(block, 0) + 1
                    data = self._content(block)
                    file.write(block * self.block, data)
                    self._seconds += time.perf_counter() - start
                if op % 100 == 0:
                    yield Step.pause(0.1)  # the flusher's turn: a thousand operations a guest second
                if op % fifth == 0:
                    yield Step(f"{op:,} operations")
            file.fsync()
            yield Step("fsync again")
            self._check_disk(Path(scratch, "data"))
            file.close()
            if self.hold:
                yield Step(f"closed, {self.hold:g} s later", wait=self.hold)

    def _check_disk(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            for block in range(self.size // self.block):
                data = b""
                while len(data) < self.block and (part := file.read(self.block - len(data))):
                    data += part
                self._check(block, data)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
