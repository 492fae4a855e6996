"""The lists of csrc/lru.c against lists of Python's, in any order of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from emu.guest.page import Insert, Lookup, Lru, MemMap, Owner, PageFlag, Remove, Space
from emu.ranges import Ranges

FRAMES = 48
PAGES = 40


class Page:
    """What the model knows of a cached page."""

    def __init__(self, pfn, generation):
        self.pfn = pfn
        self.active = self.referenced = self.dirty = self.young = self.workingset = self.reclaim = False
        self.mapped = 0
        self.generation = generation


class Lists(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.map = MemMap(FRAMES)
        self.space = Space(self.map, PAGES)
        self.pages = {}  # index -> Page
        self.shadows = {}  # index -> (age, workingset)
        self.active, self.inactive = [], []  # indexes, hottest first
        self.age = self.generation = 0
        self.free = list(range(FRAMES))
        self.counts = dict.fromkeys(("refault", "activate", "restore", "pgactivate", "pgdeactivate"), 0)

    # ---- the model's steps

    def put(self, index, active):
        self.pages[index].active = active
        (self.active if active else self.inactive).insert(0, index)

    def take(self, index):
        (self.active if self.pages[index].active else self.inactive).remove(index)

    def accessed(self, index):
        page = self.pages[index]
        page.generation = self.generation
        if not page.referenced:
            page.referenced = True
        elif not page.active:
            self.take(index)
            self.put(index, True)
            page.referenced = False
            self.age += 1
            self.counts["pgactivate"] += 1

    def evict(self, index, shadow=True):
        page = self.pages[index]
        self.take(index)
        del self.pages[index]
        self.free.append(page.pfn)
        self.shadows.pop(index, None)
        if shadow:
            self.shadows[index] = (self.age, page.workingset)
            self.age += 1

    # ---- events

    @rule(index=st.integers(0, PAGES - 1), count=st.integers(1, 6), how=st.sampled_from(list(Insert)))
    def insert(self, index, count, how):
        wanted = [i for i in range(index, min(index + count, PAGES)) if i not in self.pages][: len(self.free)]
        ranges = Ranges()
        for i in wanted:
            pfn = self.free.pop(0)
            ranges.add(pfn, 1, i)
            self.pages[i] = Page(pfn, self.generation)
            shadow, active = self.shadows.pop(i, None), False
            if shadow is not None and how is not Insert.WRITE:
                self.counts["refault"] += 1
                if self.age - shadow[0] <= len(self.active):
                    active = True
                    self.age += 1
                    self.counts["activate"] += 1
                    self.pages[i].workingset = shadow[1]
                    self.counts["restore"] += shadow[1]
            self.pages[i].dirty = how is Insert.DIRTY
            self.put(i, active)
        if wanted:
            self.space.insert(ranges, how)

    @rule(index=st.integers(0, PAGES - 1), count=st.integers(1, 8), skip=st.booleans(), mark=st.booleans())
    def lookup(self, index, count, skip, mark):
        present = 0
        while present < count and index + present in self.pages:
            present += 1
        how = (Lookup.MARK if mark else 0) | (Lookup.SKIP_FIRST if skip else 0)
        n, frames, _ = self.space.lookup(index, count, how)
        assert n == present
        found = [(gfn + k, key + k) for gfn, run, key in frames for k in range(run)]
        assert found == [(self.pages[i].pfn, i) for i in range(index, index + n)]
        if skip and n:
            self.pages[index].generation = self.generation
        if mark:
            for i in range(index + skip, index + n):
                self.accessed(i)

    @rule(index=st.integers(0, PAGES - 1), count=st.integers(1, 8), dirty=st.booleans())
    def dirty(self, index, count, dirty):
        changed = [i for i in range(index, index + count) if i in self.pages and self.pages[i].dirty != dirty]
        n = self.space.flag(
            index, index + count, PageFlag.DIRTY if dirty else 0, PageFlag(0) if dirty else PageFlag.DIRTY
        )
        assert n == len(changed)
        for i in changed:
            self.pages[i].dirty = dirty
        if dirty:
            for i in range(index, index + count):
                if i in self.pages:
                    self.pages[i].generation = self.generation

    @rule(index=st.integers(0, PAGES - 1), up=st.booleans(), young=st.booleans())
    def map_it(self, index, up, young):
        page = self.pages.get(index)
        if page is None or (not up and not page.mapped):
            return
        self.map.map(Ranges.of([(page.pfn, 1)]), 1 if up else -1, young=young)
        page.mapped += 1 if up else -1
        if young:
            page.young = True
            page.generation = self.generation
        if not up and page.young:
            page.young = False
            self.accessed(index)

    @rule(n=st.integers(1, 10))
    def shrink_active(self, n):
        done = self.map.shrink(Lru.ACTIVE_FILE, n)
        for index in self.active[::-1][:n]:
            self.take(index)
            self.pages[index].workingset = True
            self.pages[index].young = False
            self.put(index, False)
            self.counts["pgdeactivate"] += 1
        assert done.scanned == done.deactivated <= n

    @rule(n=st.integers(1, 10))
    def shrink_inactive(self, n):
        done = self.map.shrink(Lru.INACTIVE_FILE, n)
        freed, mapped = [], []
        for index in self.inactive[::-1][:n]:
            page = self.pages[index]
            young, referenced = page.young, page.referenced
            page.young = page.referenced = False
            self.take(index)
            if young:
                page.referenced = True
                self.put(index, referenced)
                activated = referenced
            elif page.dirty:
                self.put(index, True)
                activated = True
            elif page.mapped:
                mapped.append(page.pfn)
                self.put(index, False)
                activated = False
            else:
                freed.append(page.pfn)
                self.put(index, False)
                self.evict(index)
                activated = False
            if activated:
                self.age += 1
                self.counts["pgactivate"] += 1
        assert list(done.freed) == freed
        assert list(done.mapped) == mapped

    @rule(sink=st.integers(1, 4), more=st.integers(0, 3))
    def let_age(self, sink, more):
        self.generation = self.map.next_generation()
        freed, _, sunk = self.map.age(sink, sink + more)
        expected_sunk = 0
        for index in self.active[::-1]:
            page = self.pages[index]
            if self.generation - page.generation >= sink:
                self.take(index)
                page.workingset, page.referenced = True, False
                self.put(index, False)
                expected_sunk += 1
                self.counts["pgdeactivate"] += 1
        gone = []
        for index in self.inactive[::-1]:
            page = self.pages[index]
            if self.generation - page.generation >= sink + more and not page.dirty and not page.mapped:
                gone.append(page.pfn)
                self.evict(index)
        assert (list(freed), sunk) == (gone, expected_sunk)

    @rule(index=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), how=st.sampled_from(list(Remove)))
    def remove(self, index, count, how):
        inside = [i for i in range(index, index + count) if i in self.pages]
        if how is Remove.TRUNCATE and any(self.pages[i].mapped for i in inside):
            return
        taken = []
        for i in inside:
            page = self.pages[i]
            held = page.dirty or page.mapped
            if how is Remove.TRUNCATE or not (held or (how is Remove.EVICT and (page.referenced or page.young))):
                taken.append(page.pfn)
                self.evict(i, shadow=how is Remove.EVICT)
        if how is Remove.INVALIDATE:
            for i in range(index, index + count):
                self.shadows.pop(i, None)
        assert list(self.space.remove(index, index + count, how)) == taken

    # ---- what always holds

    @invariant()
    def lists_agree(self):
        assert list(self.map.list(Lru.ACTIVE_FILE)) == [self.pages[i].pfn for i in self.active]
        assert list(self.map.list(Lru.INACTIVE_FILE)) == [self.pages[i].pfn for i in self.inactive]
        assert (self.map.nr(Lru.ACTIVE_FILE), self.map.nr(Lru.INACTIVE_FILE)) == (len(self.active), len(self.inactive))

    @invariant()
    def counts_agree(self):
        stats = self.map.stats
        assert stats.nonresident_age == self.age
        for name in ("refault", "activate", "restore"):
            assert getattr(stats, f"workingset_{name}") == self.counts[name]
        for name in ("pgactivate", "pgdeactivate"):
            assert getattr(stats, name) == self.counts[name]
        assert (self.space.nr_pages, self.space.nr_dirty) == (
            len(self.pages),
            sum(page.dirty for page in self.pages.values()),
        )
        assert stats.nr_mapped == sum(page.mapped > 0 for page in self.pages.values())
        owners = [
            Owner.DIRTY if page.dirty else Owner.ACTIVE if page.active else Owner.INACTIVE
            for page in self.pages.values()
        ]
        for owner in (Owner.DIRTY, Owner.ACTIVE, Owner.INACTIVE, Owner.WRITEBACK):
            assert self.map.count(owner) == owners.count(owner)

    @invariant()
    def descriptors_agree(self):
        for index, page in self.pages.items():
            info = self.map.look(page.pfn)
            assert (info.space, info.index, info.mapcount) == (self.space.id, index, page.mapped)
            assert info.generation == page.generation
            for flag in ("REFERENCED", "ACTIVE", "DIRTY", "YOUNG", "WORKINGSET"):
                assert bool(info.flags & PageFlag[flag]) == getattr(page, flag.lower()), flag
        for pfn in self.free:
            assert self.map.look(pfn).owner is Owner.FREE


TestLists = Lists.TestCase
TestLists.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
