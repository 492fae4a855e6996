"""What CMM2 costs a guest: first counts, which no machine changes, then the share that any price of one would be.

Some workloads run under each form of CMM2 on a stepped clock and from one seed, so that two machines count alike. Of
each: the pages that it read from the cache, faulted in, wrote through a shared mapping, or freed, which are its
operations, and the transitions that its guest's kernel made, by kind and by cause. Then what two mechanisms do that get
the same memory back otherwise.

A price turns counts into time; the share is of the native time of the same operations (bench/prices.py), and of
reading in what wasn't cached.
"""

import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from emu.bench.prices import Prices
from emu.clock import StepClock
from emu.errors import EmuError
from emu.frames import Cause, Usage
from emu.machine import Machine
from emu.observe.result import Measure
from emu.observe.usages import LETTERS
from emu.units import FRAME_SIZE
from emu.workloads import Step, Workload
from emu.workloads.build import Build
from emu.workloads.grep import Grep
from emu.workloads.memhog import Memhog
from emu.workloads.page_fault import PageFault1

__all__ = ["FORMS", "HOOKS", "Reclaimed", "Work", "as_json", "count", "measure_reclaim", "price", "study"]

#: the forms that are counted
FORMS = ("cmm2", "cmm2:minor=yes", "cmm2:dirty=mapping", "cmm2-light")

#: where the guest's kernel says something: function of csrc, and the causes that it says it for
HOOKS: dict[str, tuple[Cause, ...]] = {
    "emu_pages_allocated": (Cause.ALLOC, Cause.DISCARDED),
    "emu_pages_release": (Cause.FREE, Cause.DISCARDED),
    "emu_space_insert": (Cause.READ,),
    "emu_space_lookup": (Cause.LOOKUP, Cause.MAP, Cause.MKWRITE, Cause.COW, Cause.PIN),
    "emu_pages_put": (Cause.PUT,),
    "emu_space_flag": (Cause.MKWRITE, Cause.WRITEBACK),
    "emu_pages_map": (Cause.UNMAP,),
    "shrink_active": (Cause.SINK,),
}

_RAM = "256MiB"
_FILES = 600
_WANTED = 24 << 20  # bytes that the host wants back
_MAPPED = 8 << 20
_IDLE = 60.0  # guest seconds before


@dataclass(frozen=True, slots=True)
class Work:
    """What a part of a workload did, in 4 KiB pages, and what was said meanwhile: (cause, from, to) -> frames."""

    workload: str
    form: str
    reads: int
    faults: int
    #: of those, pages of files that were mapped as they were in the cache
    maps: int
    frees: int
    #: pages that a shared mapping began to write
    mkwrites: int
    #: pages read from the disk
    fills: int
    said: dict[tuple[Cause, Usage, Usage], int]

    @property
    def total(self) -> int:
        """Transitions."""
        return sum(self.said.values())

    @property
    def operations(self) -> int:
        """Pages read from the cache, faulted in, freed, and written through a shared mapping."""
        return self.reads + self.faults + self.frees + self.mkwrites

    def per_thousand(self, n: int) -> float:
        """Of 1,000 operations."""
        return n * 1000 / self.operations

    def native(self, prices: Prices) -> float | None:
        """The native ns of its operations, and of reading in what wasn't cached; None with writes through mappings,
        whose price (and of their way to the disk) isn't measured."""
        if self.mkwrites:
            return None
        anonymous = (self.faults - self.maps) * prices.fault
        cached = self.reads * prices.read + self.maps * prices.map
        return anonymous + cached + self.frees * prices.free + self.fills * prices.fill

    def share(self, ns: float, prices: Prices) -> float | None:
        """What the transitions come to of that, at `ns` each."""
        native = self.native(prices)
        return None if native is None else self.total * ns / native

    def as_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "workload": self.workload,
            "form": self.form,
            "reads": self.reads,
            "faults": self.faults,
            "maps": self.maps,
            "mkwrites": self.mkwrites,
            "frees": self.frees,
            "fills": self.fills,
            "transitions": self.total,
            "transitions_per_1000": self.per_thousand(self.total),
            "said": [
                {
                    "cause": cause.name.lower(),
                    "from": LETTERS[a],
                    "to": LETTERS[b],
                    "frames": n,
                    "per_1000": self.per_thousand(n),
                }
                for (cause, a, b), n in sorted(self.said.items())
            ],
        }


def _made_tree(root: Path) -> Path:
    # sizes as in a tree of sources: most files have a few pages
    rng = random.Random(7)
    for number in range(_FILES):
        folder = root / f"d{number % 20}"
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"f{number:03}").write_bytes(rng.randbytes(int(2 ** rng.uniform(9, 19))))
    return root


@dataclass(slots=True)
class _Counts:
    counters: Mapping[str, int]
    said: dict[tuple[Cause, Usage, Usage], int]

    @classmethod
    def of(cls, machine: Machine) -> "_Counts":
        said: dict[tuple[Cause, Usage, Usage], int] = {}
        if machine.ram.tracks_usages:
            for cause, kinds in machine.ram.transitions().moved.items():
                said |= {(cause, a, b): n for (a, b), n in kinds.items()}
        return cls(machine.stats(), said)

    def since(self, before: "_Counts", workload: str, form: str) -> Work:
        def grown(name: str) -> int:
            return self.counters[name] - before.counters[name]

        said = {kind: n - before.said.get(kind, 0) for kind, n in self.said.items()}
        return Work(
            workload,
            form,
            grown("guest_pgaccess"),
            grown("guest_pgfault"),
            grown("guest_filemap_map_pages"),
            grown("guest_pgfree"),
            grown("guest_pgmkwrite"),
            grown("guest_pgpgin") // (FRAME_SIZE // 1024),
            {kind: n for kind, n in said.items() if n},
        )


class _MappedWrites:
    # A database's way: files mapped shared, every page written, then synced, some times: what the two forms of the
    # dirty bit differ by.
    name: ClassVar[str] = "mapped writes"

    def __init__(self, rounds: int = 3) -> None:
        self._rounds = rounds
        self.verified_frames = self.corrupt_frames = 0

    def steps(self, machine: Machine) -> Iterator[Step]:
        with tempfile.TemporaryDirectory(prefix="emu-cmm2-") as folder:
            Path(folder, "data").write_bytes(bytes(_MAPPED))
            machine.add_disk(folder, "")
            yield Step("boot")
            with machine.guest.open("data", "r+") as file:
                mapping = machine.guest.spawn("writer").mmap(_MAPPED, file=file, shared=True)
                for seed in range(self._rounds):
                    mapping.fill(seed=seed)
                    file.fsync()
                self.verified_frames = mapping.pages
                self.corrupt_frames = len(mapping.verify(seed=self._rounds - 1))
                mapping.munmap()
            yield Step("written")

    def measures(self) -> dict[str, Measure]:
        return {}

    def notes(self) -> list[str]:
        return []

    def parameters(self) -> dict[str, Any]:
        return {"rounds": self._rounds}


def _parts(tree: Path) -> Iterator[tuple[Workload, tuple[str, ...]]]:
    # a workload, and the names of what lies between its first step and each of the next ones that count
    yield PageFault1("64MiB", iterations=4, hold=0), ("page_fault1",)
    yield Grep(tree, passes=2, hold=0), ("grep", "grep, cached")
    yield Build(tree, 30, "8MiB", program="8MiB", hold=0, seed=1), ("build",)
    yield Memhog("96MiB", rounds=2, hold=0), ("memhog",)
    yield _MappedWrites(), ("mapped writes",)


def count(tree: Path, form: str) -> list[Work]:
    """Run all workloads under a form of CMM2, and count."""
    done = []
    for workload, names in _parts(tree):
        with Machine(_RAM, form, clock=StepClock()) as machine:
            steps = workload.steps(machine)
            next(steps)
            before = _Counts.of(machine)
            if len(names) > 1:
                for name, _step in zip(names, steps, strict=False):
                    now = _Counts.of(machine)
                    done.append(now.since(before, name, form))
                    before = now
                continue
            for step in steps:
                machine.run_for(step.wait)
            done.append(_Counts.of(machine).since(before, names[0], form))
        if workload.corrupt_frames:
            raise EmuError(f"{workload.name} under {form}: {workload.corrupt_frames} frames held wrong bytes")
    return done


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Getting memory back from a guest that has read a tree and uses a fifth of it: by whom, and what for.

    before: transitions while it filled; then what the guest did when the memory was wanted: pages scanned, freed and
    reported, messages; bytes that the host got, and that were read again when the guest used everything once more.
    """

    mechanism: str
    before: int
    scanned: int
    freed: int
    reported: int
    messages: int
    said: int
    back: int
    read_again: int


def measure_reclaim(tree: Path, mechanism: str) -> Reclaimed:
    """Measure it for reporting (which has nothing to give), epoch, or a form of CMM2."""
    with Machine(_RAM, mechanism, clock=StepClock()) as machine:
        work = Grep(tree, hold=0)
        steps = work.steps(machine)
        next(steps)
        machine.settle()
        start = _Counts.of(machine)
        next(steps)
        used = work.tree.first(0.2)
        for _ in range(int(_IDLE // 5)):
            work.tree.read(machine, used)
            machine.run_for(5)
        full = _Counts.of(machine)
        footprint = machine.ram.footprint_bytes
        if machine.host.stealing is not None:
            machine.host.steal(_WANTED)
        elif machine.guest.pressure is not None:
            machine.guest.pressure.epoch(30, _WANTED)
            machine.settle()
        taken = _Counts.of(machine)
        back = footprint - machine.ram.footprint_bytes
        work.tree.read(machine, work.tree.files)
        last = machine.stats()

    def grown(*names: str) -> int:
        return sum(taken.counters.get(name, 0) - full.counters.get(name, 0) for name in names)

    return Reclaimed(
        mechanism,
        sum(full.said.values()) - sum(start.said.values()),
        grown("epoch_scanned"),
        grown("guest_pgfree"),
        grown("report_pages"),
        grown("reports", "epochs"),
        sum(taken.said.values()) - sum(full.said.values()),
        back,
        last["disk_read_bytes"] - taken.counters["disk_read_bytes"],
    )


def study() -> tuple[list[Work], list[Reclaimed], int]:
    """Count everything: some seconds. The last: bytes of the tree that the guests read."""
    with tempfile.TemporaryDirectory(prefix="emu-cmm2-") as folder:
        tree = _made_tree(Path(folder))
        works = [work for form in FORMS for work in count(tree, form)]
        reclaimed = [measure_reclaim(tree, name) for name in ("reporting", "epoch", "cmm2", "cmm2:minor=yes")]
        size = sum(path.stat().st_size for path in tree.rglob("f*"))
    return works, reclaimed, size


def as_json(works: list[Work], reclaimed: list[Reclaimed], tree_bytes: int) -> dict[str, Any]:
    """Return the counts as JSON types, with what is so by construction."""
    return {
        "work": [work.as_json() for work in works],
        "reclaim": [asdict(row) for row in reclaimed],
        "scenario": {"wanted": _WANTED, "tree": tree_bytes, "idle": _IDLE},
        "hooks": {function: [cause.name.lower() for cause in causes] for function, causes in HOOKS.items()},
        # csrc/usage.c: usage and state share a byte; PG_discarded and PG_writable (csrc/emu.h)
        "space": {"bits": 4, "bytes_per_gib": (1 << 30) // FRAME_SIZE, "page_flags": 2},
    }


def price(
    study: dict[str, Any], works: list[Work], prices: Prices, exchange: float | None, more: Mapping[str, float]
) -> None:
    """Add prices, costs of a transition, and shares. exchange: ns of a bare one; more: ns by name, of the reader's."""
    ghz = _gigahertz()
    costs = {"in a row": prices.in_a_row, "one by one": prices.transition}
    if exchange is not None:
        costs["exchange"] = exchange
    if ghz is not None:
        costs["100 cycles"] = 100 / ghz
    costs |= {"1 us": 1000.0, "2 us": 2000.0} | dict(more)
    study["prices"], study["costs"], study["ghz"] = asdict(prices), costs, ghz
    for work, row in zip(works, study["work"], strict=True):
        row["shares"] = {name: work.share(ns, prices) for name, ns in costs.items()}


def _gigahertz() -> float | None:
    frequency = psutil.cpu_freq()
    return frequency.current / 1000 if frequency and frequency.current else None
