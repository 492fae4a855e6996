"""A guest and its host against a dict of pages: what processes wrote is what they read, whatever was reported."""

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import emu
from emu.errors import OutOfMemory
from emu.testing import StepClock
from emu.uffd import probe

PAGES = st.integers(1, 3000)


class GuestMachine(RuleBasedStateMachine):
    """A 64 MiB machine with any mechanism; each mapping's model is a dict of page -> seed."""

    @initialize(
        mechanism=st.sampled_from(["none", "reporting", "reporting:order=0", "reporting:order=5,delay=100ms"]),
        on_return=st.sampled_from(["now", "now", "lazy"]),
        guest_thp=st.sampled_from(["never", "madvise", "always"]),
        service=st.sampled_from(["auto", "thread"] if probe().rung else ["auto"]),
    )
    def boot(self, mechanism, on_return, guest_thp, service):
        self.m = emu.Machine(
            "64MiB",
            mechanism,
            on_return=on_return,
            guest_thp=guest_thp,
            service=service,
            clock=StepClock(),
        )
        self.lazy = on_return == "lazy"
        self.maps = []  # (mapping, {page: seed})
        self.seed = 0

    def teardown(self):
        if hasattr(self, "m"):
            self.m.close()

    @rule(pages=PAGES, thp=st.booleans())
    def mmap(self, pages, thp):
        self.maps.append((self.m.guest.spawn("p").mmap(pages * 4096, thp=thp), {}))

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def fill(self, data):
        mapping, model = data.draw(st.sampled_from(self.maps))
        first, count = self.part(data, mapping)
        self.seed += 1
        try:
            mapping.fill(seed=self.seed, offset=first * 4096, length=count * 4096)
        except OutOfMemory:
            mapping.munmap()
            self.maps.remove((mapping, model))
            return
        model.update(dict.fromkeys(range(first, first + count), self.seed))

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def dontneed(self, data):
        mapping, model = data.draw(st.sampled_from(self.maps))
        first, count = self.part(data, mapping)
        mapping.madvise_dontneed(first * 4096, count * 4096)
        for page in range(first, first + count):
            model.pop(page, None)

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def munmap(self, data):
        mapping, model = data.draw(st.sampled_from(self.maps))
        mapping.munmap()
        self.maps.remove((mapping, model))

    @rule(seconds=st.sampled_from([0.1, 2, 60]))
    def run(self, seconds):
        self.m.run_for(seconds)

    @rule()
    def drain(self):
        self.m.guest.drain_pages()

    @rule()
    def pressure(self):
        self.m.host.pressure()

    @staticmethod
    def part(data, mapping):
        first = data.draw(st.integers(0, mapping.pages - 1))
        return first, data.draw(st.integers(1, mapping.pages - first))

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def check(self, data):
        mapping, model = data.draw(st.sampled_from(self.maps))
        first, count = self.part(data, mapping)
        for page in range(first, first + min(count, 20)):
            if page in model:
                assert mapping.verify(seed=model[page], offset=page * 4096, length=4096) == []
            else:
                assert mapping.read(page * 4096, 4096) == bytes(4096)

    @invariant()
    def books(self):
        if not hasattr(self, "m"):
            return
        s = self.m.snapshot()
        assert s.guest_used_bytes + s.guest_free_bytes + s.guest_pcp_bytes == s.ram_bytes
        assert s.books_difference == 0 or (self.lazy and s.books_difference < 0)
        assert sum(s.states.values()) == s.ram_bytes
        resident = self.m.ram.states()
        for mapping, model in self.maps:
            for page in model:
                assert resident[mapping._frame[page] - 1] in (emu.FrameState.RESIDENT, emu.FrameState.LAZY)

    @rule()
    def everything_is_still_there(self):
        for mapping, model in self.maps:
            by_seed = {}
            for page, seed in model.items():
                by_seed.setdefault(seed, []).append(page)
            for seed, pages in by_seed.items():
                wrong = set(mapping.verify(seed=seed))
                assert not wrong & {page * 4096 for page in pages}


TestMachine = GuestMachine.TestCase
