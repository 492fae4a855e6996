"""A thread of the host steals, swaps and lets the guest's kernel reclaim, while the guest works on files of a disk.

Every read is compared with a model of bytes, whoever has taken the page meanwhile; after each fsync, and at the end,
the files on the disk are. --storm: 10^6 operations over all settings.
"""

import random
import threading

import pytest

import emu
from emu._native import disabled
from emu.frames import StealPolicy
from emu.testing import StepClock

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
SIZE = 512 * KIB
FILES = 20
MAPPED = ("f0", "f1", "f2")
SETTINGS = [
    "cmm2:memory=8MiB",
    "cmm2",
    "cmm2:dirty=mapping,memory=8MiB",
    "cmm2:minor=yes,memory=1MiB",
    "cmm2:buffers=yes,max=20MiB,policy=random",
]
pytestmark = [pytest.mark.uffd, pytest.mark.inline, pytest.mark.skipif("wp" in disabled() and "move" in disabled(),
              reason="nothing leaves a running guest here")]  # fmt: skip


class Storm:
    """The guest's side: operations by chance, and the model."""

    def __init__(self, machine, folder, seed):
        self.rng = random.Random(seed)
        self.folder = folder
        self.m = machine
        self.files = {name: machine.guest.open(name, "r+") for name in self.names()}
        self.model = {name: bytearray((folder / name).read_bytes()) for name in self.files}
        self.mapped = {
            name: machine.guest.spawn("app").mmap(SIZE, file=self.files[name], shared=True) for name in MAPPED
        }
        self.private = machine.guest.spawn("private").mmap(SIZE, file=self.files["f3"])
        self.heap = machine.guest.spawn("heap").mmap(4 * MIB)
        self.heap.fill(seed=1)
        self.done = dict.fromkeys(("read", "write", "mapped", "heap", "cut", "fsync", "memory"), 0)

    @staticmethod
    def names():
        return [f"f{i}" for i in range(FILES)]

    def step(self):
        rng = self.rng
        kind = rng.random()
        name = rng.choice(MAPPED) if rng.random() < 0.3 else f"f{rng.randrange(FILES)}"
        content = self.model[name]
        at, n = rng.randrange(SIZE - 6 * PAGE), rng.randrange(1, 6 * PAGE)
        if kind < 0.20:
            data = rng.randbytes(n)
            self.files[name].write(at, data)
            if len(content) < at:
                content.extend(bytes(at - len(content)))
            content[at : at + n] = data
            self.done["write"] += 1
        elif kind < 0.45:
            self.use_mapping(at, n)
            self.done["mapped"] += 1
        elif kind < 0.50:
            offset = rng.randrange(1024) * PAGE
            assert self.heap.verify(seed=1, offset=offset, length=min(16 * PAGE, 4 * MIB - offset)) == []
            self.done["heap"] += 1
        elif kind < 0.51 and name not in MAPPED and name != "f3":
            size = rng.randrange(SIZE)
            self.files[name].truncate(size)
            del content[size:]
            content.extend(bytes(size - len(content)))
            self.done["cut"] += 1
        elif kind < 0.513:
            self.files[name].fsync()
            assert (self.folder / name).read_bytes() == content
            self.done["fsync"] += 1
        elif kind < 0.52:
            self.memory()
            self.done["memory"] += 1
        else:
            assert self.files[name].read(at, n) == content[at : at + n]
            self.done["read"] += 1

    def use_mapping(self, at, n):
        rng = self.rng
        if rng.random() < 0.2:
            assert self.private.read(at, n) == self.model["f3"][at : at + n]
            return
        name = rng.choice(MAPPED)
        mapping, content = self.mapped[name], self.model[name]
        if rng.random() < 0.5:
            assert mapping.read(at, n) == content[at : at + n]
            return
        data = rng.randbytes(n)
        mapping.write(at, data)
        content[at : at + n] = data

    def memory(self):
        guest, what = self.m.guest, self.rng.randrange(5)
        if what == 0:
            guest.drop_caches(1)
        elif what == 1:
            guest.reclaim.proactive(500)
        elif what == 2:
            self.m.run_for(31)  # the flusher writes what is dirty, and asks for it
        elif what == 3:
            name = self.rng.choice(MAPPED)
            self.mapped[name].munmap()
            self.mapped[name] = guest.spawn("again").mmap(SIZE, file=self.files[name], shared=True)
        else:
            burst = guest.spawn("burst").mmap("4MiB")
            burst.fill(seed=2)
            assert burst.verify(seed=2) == []
            burst.munmap()

    def end(self):
        self.m.guest.sync()
        for name, content in self.model.items():
            assert (self.folder / name).read_bytes() == content
            assert self.files[name].read(0, SIZE) == content
        assert self.heap.verify(seed=1) == []
        for file in self.files.values():
            file.close()


def storm(settings, folder, operations, seed):
    """Returns the frames that the host has taken, and what the guest has done."""
    for name in Storm.names():
        (folder / name).write_bytes(random.Random(name).randbytes(SIZE))
    stop, taken, broken = threading.Event(), [], []
    with emu.Machine("32MiB", settings, disk=folder, clock=StepClock()) as m:

        def host():
            seed = 0
            try:
                while not stop.is_set():
                    seed += 1
                    taken.append(m.ram.steal(1 + seed % 300, policy=StealPolicy(seed % 3), seed=seed))
                    if seed % 5 == 0:
                        m.host.swap_out("1MiB") if m.ram.has_store else None
            except BaseException as error:  # an end of the thread alone would make it a storm without a host
                broken.append(error)

        work = Storm(m, folder, seed)
        thread = threading.Thread(target=host)
        thread.start()
        try:
            for _ in range(operations):
                work.step()
                assert not broken, broken
        finally:
            stop.set()
            thread.join()
        assert not broken, broken
        work.end()
        assert m.snapshot(exact=True).books_difference == 0
        stats = m.ram.stats()
    return sum(taken), work.done, stats


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_host_that_takes_all_the_time(tmp_path, settings):
    taken, _, stats = storm(settings, tmp_path, 1500, seed=9)
    assert taken > 1000
    assert stats["steal_unused"]
    assert stats["steal_volatile"]


@pytest.mark.storm
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_million_operations(tmp_path, settings):
    """A fifth of them for each."""
    taken, done, stats = storm(settings, tmp_path, 200_000, seed=11)
    names = (
        "steal_unused",
        "steal_volatile",
        "steal_potential",
        "steal_preserved",
        "swap_out_frames",
        "swap_in_frames",
    )
    print(f"\n{settings}: {sum(done.values()):,} operations {done}, {taken:,} frames stolen,")
    print(", ".join(f"{stats[name]:,} {name}" for name in names))
    assert taken > 100_000
