"""The buddy allocator against a reference that only knows sets of frames, and its bulk calls against single ones."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from emu.errors import AllocatorError, OutOfMemory
from emu.guest.buddy import MAX_ORDER, Buddy, MigrateType

TYPES = st.sampled_from(list(MigrateType))


def canonical(free: set[int], frames: int) -> set[tuple[int, int]]:
    """The blocks that a fully merged free set must consist of: every aligned block wholly free, largest first."""
    blocks = set()
    left = set(free)
    for order in range(MAX_ORDER, -1, -1):
        size = 1 << order
        for start in range(0, frames - size + 1, size):
            if start in left and left.issuperset(range(start, start + size)):
                blocks.add((start, order))
                left.difference_update(range(start, start + size))
    assert not left
    return blocks


class BuddyMachine(RuleBasedStateMachine):
    """Two allocators: one does everything in bulk, the other frame by frame; a set of free frames is the truth."""

    @initialize(frames=st.integers(1, 3000))
    def boot(self, frames):
        self.frames = frames
        self.bulk = Buddy(frames)
        self.single = Buddy(frames)
        self.free = set(range(frames))
        self.blocks = []  # (pfn, order)
        self.singles = []  # frames

    @rule(order=st.integers(0, MAX_ORDER), migratetype=TYPES)
    def alloc(self, order, migratetype):
        try:
            pfn = self.bulk.alloc(order, migratetype)
        except OutOfMemory:
            with pytest.raises(OutOfMemory):
                self.single.alloc(order, migratetype)
            assert not any(o >= order for _, o in canonical(self.free, self.frames))
            return
        assert self.single.alloc(order, migratetype) == pfn
        block = set(range(pfn, pfn + (1 << order)))
        assert pfn % (1 << order) == 0
        assert block <= self.free
        self.free -= block
        self.blocks.append((pfn, order))

    @rule(count=st.integers(1, 1500), migratetype=TYPES)
    def alloc_bulk(self, count, migratetype):
        got = [pfn + i for pfn, n in self.bulk.alloc_bulk(count, migratetype) for i in range(n)]
        assert len(got) == min(count, len(self.free))
        assert got == [self.single.alloc(0, migratetype) for _ in got]
        assert len(set(got)) == len(got)
        assert self.free.issuperset(got)
        self.free.difference_update(got)
        self.singles += got

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free_block(self, data):
        pfn, order = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.bulk.free(pfn, order)
        self.single.free(pfn, order)
        self.free.update(range(pfn, pfn + (1 << order)))
        before = list(self.bulk.free_blocks())
        with pytest.raises(AllocatorError):
            self.bulk.free(pfn, order)
        assert list(self.bulk.free_blocks()) == before

    @rule(steps=st.lists(st.tuples(st.sampled_from("aaaabcdlllx"), st.integers(0, 1 << 16), TYPES), max_size=60))
    def walk(self, steps):
        # Singles one after another with nobody looking in between, so that a block stays open; the other allocator is
        # looked at after every step, so that none does.
        heard = {name: [] for name in ("bulk", "single")}
        for name, orders in heard.items():
            getattr(self, name).on_free = orders.append
        for what, which, migratetype in steps:
            if what in "abc":
                order = {"a": 0, "b": 0, "c": 1}[what]
                kind = MigrateType.MOVABLE if what == "a" else migratetype
                try:
                    pfn = self.bulk.alloc(order, kind)
                except OutOfMemory:
                    with pytest.raises(OutOfMemory):
                        self.single.alloc(order, kind)
                    continue
                assert self.single.alloc(order, kind) == pfn
                self.free -= set(range(pfn, pfn + (1 << order)))
                if order:
                    self.blocks.append((pfn, order))
                else:
                    self.singles.append(pfn)
            elif what == "x":
                with pytest.raises(AllocatorError):
                    self.bulk.free(self.frames + which, 0)
            elif self.singles:
                pfn = self.singles.pop(-1 if what == "l" else which % len(self.singles))
                self.bulk.free(pfn, 0)
                self.single.free(pfn, 0)
                self.free.add(pfn)
            assert self.bulk.free_frames == len(self.free)
            list(self.single.free_blocks())
        assert heard["bulk"] == heard["single"]
        self.bulk.on_free = self.single.on_free = None

    @precondition(lambda self: self.singles)
    @rule(data=st.data())
    def free_bulk(self, data):
        # a slice of the frames in ascending order, as runs
        singles = sorted(self.singles)
        start = data.draw(st.integers(0, len(singles) - 1))
        end = data.draw(st.integers(start + 1, len(singles)))
        step = data.draw(st.sampled_from([1, 1, 2, 3]))
        chosen = singles[start:end:step]
        runs = []
        for frame in chosen:
            if runs and sum(runs[-1]) == frame:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((frame, 1))
        self.bulk.free_bulk(runs)
        for frame in chosen:
            self.single.free(frame, 0)
        self.free.update(chosen)
        gone = set(chosen)
        self.singles = [frame for frame in self.singles if frame not in gone]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def split(self, data):
        pfn, order = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.bulk.split(pfn, order)
        self.single.split(pfn, order)
        self.singles += range(pfn, pfn + (1 << order))

    @rule(most=st.integers(1, 40), reported=st.booleans(), order=st.integers(0, MAX_ORDER), migratetype=TYPES)
    def report(self, most, reported, order, migratetype):
        for buddy in (self.bulk, self.single):
            taken = []
            while len(taken) < most and (block := buddy.first(order, migratetype)) >= 0:
                buddy.isolate(order, block)
                taken.append(block)
            for block in reversed(taken):
                buddy.putback(order, block, reported=reported)

    @invariant()
    def the_two_agree_to_the_order_of_their_lists(self):
        if hasattr(self, "free"):
            assert list(self.bulk.free_blocks()) == list(self.single.free_blocks())

    @invariant()
    def free_blocks_are_the_fully_merged_free_set(self):
        if not hasattr(self, "free"):
            return
        blocks = list(self.bulk.free_blocks())
        assert {(pfn, order) for pfn, order, _, _ in blocks} == canonical(self.free, self.frames)
        assert self.bulk.free_frames == len(self.free)
        for order in range(MAX_ORDER + 1):
            assert self.bulk.nr_free[order] == sum(o == order for _, o, _, _ in blocks)
            assert self.bulk.nr_reported[order] == sum(o == order and flag for _, o, _, flag in blocks)


TestBuddy = BuddyMachine.TestCase
