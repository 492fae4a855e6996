"""Files of a real disk under reads, writes, cuts, fsyncs, pressure and every mechanism, against a dict of bytes.

The guest never sees a wrong byte; after fsync the disk has the data; the stages add up to the RAM, and the kernel's RSS
is what those of them hold that are resident.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from emu.clock import StepClock
from emu.errors import GuestError, GuestIOError, OutOfMemory
from emu.frames import StealPolicy
from emu.guest.page import Lru, Owner
from emu.guest.pins import Pin
from emu.machine import Machine
from emu.observe.pagemap import RESIDENT

PAGE = 4096
NAMES = ("a", "b", "dir/c")
MOST = 3 << 20
MECHANISMS = (
    "none",
    "reporting:order=0,delay=1",
    "reporting+dropcaches:every=20,order=0",
    "aging:seconds=8,order=0",
    "aging:seconds=8,feedback=yes",
    "balloon:target=18MiB",
    "balloon:keep=0.3,deflate_on_oom=no",
)

#: where the host takes pages by what the guest says of them, at any moment between two operations
STATES = (
    "cmm2",
    "cmm2:memory=4MiB",
    "cmm2:dirty=mapping",
    "cmm2:minor=yes,memory=1MiB",
    "cmm2:minor=yes,dirty=mapping,buffers=yes",
    "cmm2:max=12MiB,policy=random",
    "cmm2-light",
)

names = st.sampled_from(NAMES)
offsets = st.one_of(st.integers(0, MOST), st.integers(0, MOST // PAGE).map(lambda page: page * PAGE))
lengths = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([PAGE, 40 * PAGE, 300 * PAGE]))


class Mapped:
    """A mapping, and the pages that a private one has copied."""

    def __init__(self, name, mapping, shared):
        self.name, self.mapping, self.shared = name, mapping, shared
        self.own = {}


class Pinned(NamedTuple):
    mapped: Mapped
    pin: Pin


class Files(RuleBasedStateMachine):
    uffd = "auto"

    @initialize(mechanism=st.sampled_from(MECHANISMS + STATES))
    def start(self, mechanism):
        mechanism = mechanism if self.uffd == "auto" else "none"
        self.folder = Path(tempfile.mkdtemp(prefix="emu-test-"))
        (self.folder / "dir").mkdir()
        self.model = {}
        for i, name in enumerate(NAMES[:2]):
            content = bytes([i + 1]) * 5000 + bytes(range(256)) * 600
            (self.folder / name).write_bytes(content)
            self.model[name] = bytearray(content)
        self.m = Machine("28MiB", mechanism, disk=self.folder, clock=StepClock(), uffd=self.uffd)
        self.open = {}
        self.mapped = []
        self.pins = []
        self.tick = 0

    def teardown(self):
        if hasattr(self, "m"):
            self.m.close()
            shutil.rmtree(self.folder)

    def file(self, name):
        if name not in self.open:
            self.open[name] = self.m.guest.open(name, "r+" if name in self.model else "x")
            self.model.setdefault(name, bytearray())
        return self.open[name]

    def data(self, length):
        self.tick += 1
        unit = self.tick.to_bytes(4, "little") * 16
        return (unit * (length // len(unit) + 1))[:length]

    # ---- files

    @rule(name=names, offset=offsets, length=lengths)
    def write(self, name, offset, length):
        data = self.data(length)
        self.file(name).write(offset, data)
        content = self.model[name]
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + length] = data

    @rule(name=names, offset=offsets, length=lengths)
    def read(self, name, offset, length):
        assert self.file(name).read(offset, length) == self.model[name][offset : offset + length]

    @rule(name=names)
    def read_all(self, name):
        file = self.file(name)
        assert file.size == len(self.model[name])
        buffer = bytearray(file.size)
        assert file.readinto(0, buffer) == len(buffer)
        assert buffer == self.model[name]

    @rule(name=names, size=offsets)
    def truncate(self, name, size):
        if any(p.mapped.name == name and p.pin.first + p.pin.pages > -(-size // PAGE) for p in self.pins):
            with pytest.raises(GuestIOError, match="pinned"):
                self.file(name).truncate(size)
            return
        self.file(name).truncate(size)
        content = self.model[name]
        del content[size:]
        content.extend(bytes(size - len(content)))
        for mapped in self.mapped:
            if mapped.name == name:
                for page in [page for page in mapped.own if page >= -(-size // PAGE)]:
                    del mapped.own[page]

    @rule(name=names)
    def fsync(self, name):
        file = self.file(name)
        file.fsync()
        assert (self.folder / name).read_bytes() == self.model[name]
        assert file.inode.space.nr_dirty == 0

    @rule(name=names)
    def close_it(self, name):
        if name in self.open:
            self.open.pop(name).close()

    @rule(name=names)
    def unlink(self, name):
        if name in self.model and not any(mapped.name == name for mapped in self.mapped):
            if name in self.open:
                self.open.pop(name).close()
            self.m.guest.unlink(name)
            del self.model[name]
            assert not (self.folder / name).exists()

    # ---- mappings

    @rule(name=names, shared=st.booleans())
    def mmap(self, name, shared):
        size = -(-len(self.model.get(name, b"")) // PAGE) * PAGE
        if size and len(self.mapped) < 3:
            mapping = self.m.guest.spawn("app").mmap(size, file=self.file(name), shared=shared)
            self.mapped.append(Mapped(name, mapping, shared))

    def page_of(self, mapped, page):
        if page in mapped.own:
            return mapped.own[page]
        return bytes(self.model[mapped.name][page * PAGE : (page + 1) * PAGE]).ljust(PAGE, b"\0")

    @precondition(lambda self: self.mapped)
    @rule(which=st.integers(0, 2), first=st.integers(0, 800), count=st.integers(1, 40), write=st.booleans())
    def use_mapping(self, which, first, count, write):
        mapped = self.mapped[which % len(self.mapped)]
        pages = mapped.mapping.pages
        first %= pages
        count = min(count, pages - first)
        end = -(-len(self.model[mapped.name]) // PAGE)
        try:
            if write:
                data = self.data(count * PAGE - 100)
                mapped.mapping.write(first * PAGE + 50, data)
            else:
                seen = mapped.mapping.read(first * PAGE, count * PAGE)
        except OutOfMemory:
            self.forget(mapped)
            return
        except GuestError as error:
            # what was written before the place isn't told: the pages before the end, in spans
            self.forget(mapped)
            if "SIGBUS" not in str(error) or first + count <= end:
                raise
            return
        if not write:
            # beyond the file's end a page may hold what a mapping wrote there, in Linux as here
            inside = max(min(len(self.model[mapped.name]) - first * PAGE, count * PAGE), 0)
            wanted = b"".join(self.page_of(mapped, page) for page in range(first, first + count))
            assert seen[:inside] == wanted[:inside]
            return
        assert first + count <= end
        for page in range(first, first + count):
            content = bytearray(self.page_of(mapped, page))
            a, b = max(page * PAGE, first * PAGE + 50), min((page + 1) * PAGE, (first + count) * PAGE - 50)
            content[a - page * PAGE : b - page * PAGE] = data[a - first * PAGE - 50 : b - first * PAGE - 50]
            if mapped.shared:
                whole = self.model[mapped.name]
                part = content[: len(whole) - page * PAGE]  # beyond the file's end nothing is kept
                whole[page * PAGE : page * PAGE + len(part)] = part
            else:
                mapped.own[page] = bytes(content)

    def forget(self, mapped):
        # a mapping in an unknown state: its process ends, and a shared one's file is read from the guest anew
        mapped.mapping.process.exit()
        self.mapped.remove(mapped)
        self.pins = [p for p in self.pins if p.mapped is not mapped]
        if mapped.shared:
            file = self.file(mapped.name)
            self.model[mapped.name] = bytearray(file.read(0, file.size))

    @precondition(lambda self: self.mapped)
    @rule(which=st.integers(0, 2))
    def exit(self, which):
        mapped = self.mapped.pop(which % len(self.mapped))
        mapped.mapping.process.exit()
        self.pins = [p for p in self.pins if p.mapped is not mapped]

    @precondition(lambda self: self.mapped)
    @rule(which=st.integers(0, 2), first=st.integers(0, 800), count=st.integers(1, 40),
          what=st.sampled_from(["mlock", "munlock", "pin"]))  # fmt: skip
    def hold(self, which, first, count, what):
        mapped = self.mapped[which % len(self.mapped)]
        end = min(mapped.mapping.pages, -(-len(self.model[mapped.name]) // PAGE))
        if not end:
            return
        first %= end
        count = min(count, end - first)
        try:
            if what == "pin" and any(page in mapped.own for page in range(first, first + count)):
                with pytest.raises(GuestError, match="a copy"):
                    mapped.mapping.pin(first * PAGE, count * PAGE)
            elif what == "pin":
                self.pins.append(Pinned(mapped, mapped.mapping.pin(first * PAGE, count * PAGE)))
            else:
                getattr(mapped.mapping, what)(first * PAGE, count * PAGE)
        except OutOfMemory:
            self.forget(mapped)

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0, 5))
    def unpin(self, which):
        self.pins.pop(which % len(self.pins)).pin.unpin()

    @precondition(lambda self: self.pins)
    @rule()
    def a_device_reads_what_is_pinned(self):
        # from the frames, past the guest: they are the file's pages, wherever the rest of it has gone
        for mapped, pin in self.pins:
            content = self.model[mapped.name]
            for gfn, n, page in pin.frames:
                wanted = bytes(content[page * PAGE : (page + n) * PAGE])
                assert self.m.ram.read(gfn * PAGE, n * PAGE)[: len(wanted)] == wanted

    # ---- memory

    @rule(what=st.integers(1, 3))
    def drop_caches(self, what):
        self.m.guest.drop_caches(what)

    @rule(mib=st.integers(1, 20))
    def burst(self, mib):
        process = self.m.guest.spawn("burst")
        process.oom_score_adj = 1000
        memory = process.mmap(mib << 20)
        try:
            memory.fill(seed=self.tick)
            assert memory.verify(seed=self.tick) == []
        except OutOfMemory:
            pass
        with contextlib.suppress(GuestError):
            process.exit()

    @rule(direct=st.booleans())
    def reclaim(self, direct):
        with self.m.guest.kernel_lock:
            self.m.guest.reclaim.direct() if direct else self.m.guest.reclaim.kswapd()

    @rule(keep=st.integers(10, 28))
    def balloon(self, keep):
        self.m.host.balloon.guest_target = keep << 20
        self.m.run_for(0.3)

    @rule(seconds=st.sampled_from([0.1, 2, 6, 31, 40]))
    def run_for(self, seconds):
        self.m.run_for(seconds)

    @rule(mechanism=st.sampled_from(MECHANISMS + STATES))
    def switch(self, mechanism):
        if self.uffd == "auto" or mechanism not in STATES:
            self.m.switch_mechanism(mechanism)

    @precondition(lambda self: hasattr(self, "m") and self.m.host.stealing is not None)
    @rule(mib=st.integers(1, 28), policy=st.sampled_from(StealPolicy))
    def steal(self, mib, policy):
        with self.m.guest.paused():
            self.m.host.steal(mib << 20, policy)

    @precondition(lambda self: hasattr(self, "m") and self.m.ram.has_store)
    @rule(mib=st.integers(1, 8))
    def swap_out(self, mib):
        self.m.host.swap_out(mib << 20)

    @rule()
    def sync(self):
        self.m.guest.sync()
        for name, content in self.model.items():
            if not (name in self.open and self.open[name].inode.unlinked):
                assert (self.folder / name).read_bytes() == content

    # ---- what always holds

    @invariant()
    def stages_add_up_and_rss_is_theirs(self):
        if not hasattr(self, "m"):
            return
        s = self.m.snapshot(exact=True)
        assert sum(s.stages.values()) == s.ram_bytes
        assert s.books_difference == 0
        assert sum(size for stage, size in s.stages.items() if stage in RESIDENT) == s.rss_bytes
        guest = self.m.guest
        parts = guest.used_bytes + guest.cached_bytes + guest.ballooned_bytes + guest.free_bytes + guest.pcp_bytes
        assert parts == guest.ram_bytes
        memmap = guest.memmap
        cached = sum(memmap.count(owner) for owner in (Owner.ACTIVE, Owner.INACTIVE, Owner.DIRTY, Owner.WRITEBACK))
        mlocked = memmap.nr(Lru.UNEVICTABLE) - memmap.count(Owner.SHMEM)
        assert cached == memmap.nr(Lru.ACTIVE_FILE) + memmap.nr(Lru.INACTIVE_FILE) + mlocked
        assert cached == sum(inode.space.nr_pages for inode in guest.vfs.inodes.values())
        assert memmap.count(Owner.ANON) == sum(
            mapping.present - sum(bytes(getattr(mapping, "_cached", b"")))
            for process in guest.processes
            for mapping in process.mappings
        )


class FilesWithoutUffd(Files):
    uffd = "off"


FAST = settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestFiles = Files.TestCase
TestFiles.settings = FAST
TestFilesWithoutUffd = FilesWithoutUffd.TestCase
TestFilesWithoutUffd.settings = settings(FAST, max_examples=8)


@pytest.mark.storm
def test_files_for_long(request):
    """The same, many times."""
    machine = type("LongFiles", (Files,), {})
    case = machine.TestCase
    case.settings = settings(FAST, max_examples=1000)
    case("runTest").runTest()
