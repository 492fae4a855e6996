"""GuestRam in all its services against a dict of pages: residency, content and counters after every step."""

import tempfile
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import emu
from emu.errors import DiscardFault, GuestMemoryError, HostError
from emu.frames import FrameState, Op
from emu.ranges import Ranges
from emu.testing import ReferenceMemory
from emu.uffd import Rung, probe

FRAMES = 1100  # a little over two blocks
FRAME = st.integers(0, FRAMES - 1)
RANGE = st.tuples(FRAME, st.integers(1, 600)).map(lambda r: (r[0], min(r[1], FRAMES - r[0])))
SOME = st.lists(RANGE, min_size=1, max_size=4)
ZEROS = bytes(4096)
HELD = (FrameState.RESIDENT, FrameState.LAZY, FrameState.ASIDE, FrameState.PRESERVED)


def disjoint(ranges):
    frames = sorted({gfn for first, count in ranges for gfn in range(first, first + count)})
    return Ranges.of_frames(frames), frames


class RamMachine(RuleBasedStateMachine):
    """One RAM. Lazily freed frames may read as they were or as zeros until they are written."""

    options: ClassVar[dict[str, str]] = {}

    @initialize(
        around=st.sampled_from([1, 1, 8]),
        disable=st.sampled_from([(), ("process_madvise",), ("move",), ("lz4",)]),
        pool=st.sampled_from([0, "64KiB", "16MiB"]),
    )
    def open(self, around, disable, pool):
        self.around = around if self.options.get("uffd") != "off" else 1
        self.ram = emu.GuestRam(FRAMES * 4096, fault_around=self.around, disable=disable, **self.options)
        self.model = ReferenceMemory(FRAMES * 4096)
        self.lazy = {}  # frame -> what it held
        self.lost = set()
        self.evicted = set()
        self.stamps = {}  # frame -> when it was set aside
        self.has_host = self.ram.aside_how != "none"
        if self.has_host:
            self.ram.open_store(pool, file=tempfile.gettempdir())
            self.ram.track_accesses()

    def teardown(self):
        if hasattr(self, "ram"):
            self.ram.close()

    def written(self, first, count):
        for gfn in range(first, first + count):
            self.lazy.pop(gfn, None)
            self.evicted.discard(gfn)

    def stops_at(self, first, count, *, whole=False):
        gone = self.lost if whole else self.lost | self.evicted
        return next((gfn for gfn in range(first, first + count) if gfn in gone), None)

    @rule(where=RANGE, seed=st.integers(0, 3), op=st.sampled_from([Op.FILL, Op.TOUCH_WRITE, Op.SET]))
    def write_frames(self, where, seed, op):
        first, count = where
        stop = self.stops_at(first, count, whole=op is not Op.TOUCH_WRITE)
        done = count if stop is None else stop - first
        if op is Op.TOUCH_WRITE:  # it keeps what a lazy frame holds, which only the kernel knows
            for gfn in range(first, first + done):
                if gfn in self.lazy:
                    self.model.pages[gfn] = self.ram.read(gfn * 4096, 4096)
        if stop is None:
            self.ram.vcpu(op, Ranges.of([where]), seed)
        else:
            with pytest.raises(GuestMemoryError) as caught:
                self.ram.vcpu(op, Ranges.of([where]), seed)
            assert (caught.value.gfn, caught.value.done) == (stop, done)
        if op is Op.TOUCH_WRITE:
            for gfn in range(first, first + done):
                if gfn in self.lazy:
                    self.model.pages[gfn] = self.ram.read(gfn * 4096, 4096)
        self.model.vcpu(op, Ranges.of([(first, done)]), seed)
        self.written(first, done)

    @rule(where=RANGE)
    def touch_read(self, where):
        first, count = where
        stop = self.stops_at(first, count)
        if stop is None:
            self.ram.touch(first, count, write=False)
        else:
            with pytest.raises(GuestMemoryError):
                self.ram.touch(first, count, write=False)

    @rule(gpa=st.integers(0, FRAMES * 4096 - 1), data=st.binary(min_size=1, max_size=64), repeat=st.integers(1, 300))
    def write_bytes(self, gpa, data, repeat):
        data = (data * repeat)[: FRAMES * 4096 - gpa]
        first, last = gpa // 4096, (gpa + len(data) - 1) // 4096
        if self.stops_at(first, last - first + 1) is not None:
            return
        for gfn in {first, last}:  # a part write keeps the rest of a lazy frame
            if gfn in self.lazy:
                self.model.pages[gfn] = self.ram.read(gfn * 4096, 4096)
        self.ram.write(gpa, data)
        for gfn in {first, last}:
            if gfn in self.lazy:
                kept = self.ram.read(gfn * 4096, 4096)
                self.model.pages[gfn] = kept
        self.model.write(gpa, data)
        self.written(first, last - first + 1)

    @rule(frames=st.lists(FRAME, min_size=1, max_size=40, unique=True), byte=st.integers(0, 255))
    def install(self, frames, byte):
        frames = [gfn for gfn in frames if gfn not in self.lost]
        data = b"".join(bytes([byte ^ (gfn & 7)]) * 4096 for gfn in frames)
        self.ram.install(frames, data)
        for i, gfn in enumerate(frames):
            self.model.write(gfn * 4096, data[i * 4096 : (i + 1) * 4096])
            self.written(gfn, 1)

    @rule(ranges=SOME)
    def discard(self, ranges):
        batch, frames = disjoint(ranges)
        known = sum(self.state(gfn) in HELD for gfn in frames)
        assert self.ram.discard(batch) == known
        self.model.discard(batch)
        for gfn in frames:
            self.lazy.pop(gfn, None)
            self.evicted.discard(gfn)

    @rule(ranges=SOME)
    def lazy_free(self, ranges):
        batch, frames = disjoint(ranges)
        frames = [gfn for gfn in frames if self.state(gfn) in (FrameState.RESIDENT, FrameState.LAZY)]
        self.ram.lazy_free(batch)
        for gfn in frames:
            if gfn in self.model.pages:
                self.lazy.setdefault(gfn, self.model.pages.pop(gfn))

    @rule()
    def pressure(self):
        self.ram.lazy_drop()

    @rule(gfn=FRAME)
    def poison(self, gfn):
        self.ram.poison([(gfn, 1)])
        self.model.pages.pop(gfn, None)
        self.lazy.pop(gfn, None)
        self.evicted.discard(gfn)
        self.lost.add(gfn)

    @rule()
    def unpoison_all(self):
        assert self.ram.unpoison([(0, FRAMES)]) == len(self.lost)
        self.lost.clear()

    # ---- the host's hand

    @rule(ranges=SOME, stamp=st.integers(0, 2))
    def set_aside(self, ranges, stamp):
        batch, frames = disjoint(ranges)
        if not self.has_host:
            with pytest.raises(HostError):
                self.ram.set_aside(batch, stamp)
            return
        there = [gfn for gfn in frames if self.state(gfn) is FrameState.RESIDENT]
        assert self.ram.set_aside(batch, stamp) == len(there)
        self.stamps |= dict.fromkeys(there, stamp)

    @rule(ranges=SOME)
    def bring_back(self, ranges):
        batch, frames = disjoint(ranges)
        aside = sum(self.state(gfn) is FrameState.ASIDE for gfn in frames)
        assert self.ram.bring_back(batch) == aside

    @rule(ranges=SOME, stamp=st.sampled_from([None, 0, 1, 2]), evict=st.booleans())
    def drop_aside(self, ranges, stamp, evict):
        batch, frames = disjoint(ranges)
        gone = [g for g in frames if self.state(g) is FrameState.ASIDE and stamp in (None, self.stamps.get(g))]
        assert self.ram.drop_aside(batch, stamp, evict=evict) == len(gone)
        for gfn in gone:
            self.model.pages.pop(gfn, None)
        if evict:
            self.evicted.update(gone)

    @rule(ranges=SOME)
    def swap_out(self, ranges):
        if self.has_host:
            batch, frames = disjoint(ranges)
            there = sum(self.state(gfn) is FrameState.RESIDENT for gfn in frames)
            assert self.ram.swap_out(batch) == there  # what is aside for others stays so

    @rule(ranges=SOME)
    def swap_back(self, ranges):
        if self.has_host:
            batch, frames = disjoint(ranges)
            stored = sum(self.state(gfn) is FrameState.PRESERVED for gfn in frames)
            assert self.ram.swap_back(batch) >= stored  # and what is read ahead

    @rule(gfn=FRAME, byte=st.integers(0, 4095))
    def corrupt(self, gfn, byte):
        if not self.has_host or self.state(gfn) is not FrameState.PRESERVED:
            return
        try:
            self.ram.corrupt_stored(gfn, byte)
        except HostError:
            return  # it is in the file
        with pytest.raises(GuestMemoryError) as caught:
            self.ram.read(gfn * 4096, 8)
        assert caught.value.gfn == gfn
        self.model.pages.pop(gfn, None)
        self.lost.add(gfn)

    @rule()
    def sweep(self):
        if self.has_host:
            self.ram.sweep()
            assert self.ram.side_bytes == self.ram.stats()["nr_aside"] * 4096
            self.ram.scan_ages()

    def state(self, gfn):
        return FrameState(self.ram.states(gfn, 1)[0])

    @rule(where=RANGE)
    def content(self, where):
        first, count = where
        for gfn in range(first, min(first + count, first + 30)):
            if gfn in self.lost:
                with pytest.raises(GuestMemoryError) as caught:
                    self.ram.read(gfn * 4096 + 7, 9)
                assert caught.value.gfn == gfn
            elif gfn in self.evicted:
                with pytest.raises(DiscardFault):
                    self.ram.read(gfn * 4096, 1)
            elif gfn in self.lazy:
                assert self.ram.read(gfn * 4096, 4096) in (self.lazy[gfn], ZEROS)
            else:
                assert self.ram.read(gfn * 4096, 4096) == self.model.pages.get(gfn, ZEROS)

    @invariant()
    def residency_is_the_models_and_the_books(self):
        if not hasattr(self, "ram"):
            return
        states = self.ram.states()
        stats = self.ram.stats()
        for state in FrameState:
            assert stats[f"nr_{state.name.lower()}"] == states.count(state)
        assert states.count(FrameState.BUSY) == 0
        assert states.count(FrameState.LOST) == len(self.lost)
        assert states.count(FrameState.DISCARDED) == len(self.evicted)
        away = stats["nr_aside"] + stats["nr_preserved"]
        assert self.ram.side_bytes == (stats["nr_aside"] + stats["aside_stale"]) * 4096
        assert self.ram.store.pages == stats["nr_preserved"]
        rss = self.ram.rss_bytes // 4096
        scan = self.ram.scan()
        if scan is not None:
            assert scan.rss == rss * 4096
            assert self.ram.mincore_bytes() == scan.present
        assert rss <= states.count(FrameState.RESIDENT) + states.count(FrameState.LAZY)
        assert rss >= states.count(FrameState.RESIDENT)
        if self.around == 1 and not self.lazy and not states.count(FrameState.LAZY):
            assert rss == len(self.model.pages) - away
        for gfn in self.model.pages:
            assert states[gfn] in HELD


class Off(RamMachine):
    options: ClassVar[dict[str, str]] = {"uffd": "off"}


class Inline(RamMachine):
    options: ClassVar[dict[str, str]] = {"service": "inline"}


class Thread(RamMachine):
    options: ClassVar[dict[str, str]] = {"service": "thread"}


needs_uffd = pytest.mark.skipif(probe().rung is Rung.OFF, reason="no userfaultfd here")

TestOff = Off.TestCase


@needs_uffd
@pytest.mark.inline
class TestInline(Inline.TestCase):
    pass


@needs_uffd
class TestThread(Thread.TestCase):
    pass
