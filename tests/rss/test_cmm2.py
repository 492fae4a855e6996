"""CMM2 on real pages: what the guest says, what the host takes, and that nobody ever reads a stale or a zero byte."""

import random
import re
import sys

import pytest

import emu
from emu._native import disabled
from emu.errors import BadValue, DiscardFault
from emu.frames import Cause, FrameState, StealPolicy, Usage
from emu.testing import StepClock

MIB = 1 << 20
PAGE = 4096
pytestmark = [pytest.mark.uffd, pytest.mark.inline, pytest.mark.skipif("wp" in disabled() and "move" in disabled(),
              reason="nothing leaves a running guest here")]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """Files of 1 MiB, each page of its own."""
    rng = random.Random(5)
    content = {}
    for i in range(24):
        content[f"f{i}"] = b"".join((rng.getrandbits(32) or 1).to_bytes(4, "little") * 1024 for _ in range(256))
        (tmp_path / f"f{i}").write_bytes(content[f"f{i}"])
    return tmp_path, content


def machine(mechanism, folder, ram="64MiB", **options):
    return emu.Machine(ram, mechanism, disk=folder, clock=StepClock(), **options)


def read_all(m, content):
    for name, data in content.items():
        with m.guest.open(name) as file:
            assert file.read(0, len(data)) == data


def by_usage(m):
    counts = dict.fromkeys(Usage, 0)
    for (usage, _), frames in m.ram.usage_matrix().items():
        counts[usage] += frames
    return counts


@pytest.mark.parametrize("policy", StealPolicy)
@pytest.mark.parametrize("service", ["inline", "thread"])
def test_a_paused_guest_is_stolen_from(tree, policy, service):
    """RSS falls by what was asked for; nothing of the guest runs, and its own view doesn't change."""
    if service == "thread" and "poison" in disabled():
        pytest.skip("a page that is gone can't be told from zeros here")
    folder, content = tree
    with machine("cmm2", folder, service=service) as m:
        read_all(m, content)
        cached, free, now = m.guest.cached_bytes, m.guest.free_bytes, m.clock.now()
        assert m.rss_bytes >= cached == 24 * MIB
        assert by_usage(m)[Usage.VOLATILE] * PAGE == cached
        rss, calls, vmstat = m.rss_bytes, m.ram.stats()["vcpu_calls"], dict(m.guest.vmstat)
        called, fired = set(), []
        m.guest.timers.at(m.clock.now() + 1, lambda: fired.append(m.clock.now()), fired)
        with m.guest.paused():
            sys.setprofile(lambda frame, event, _: event == "call" and called.add(frame.f_code))
            stolen = m.host.steal("16MiB", policy)
            m.run_for(5)  # guest seconds: the host's timers run, and none of the guest's
            sys.setprofile(None)
            assert stolen == 16 * MIB
            assert m.rss_bytes == rss - 16 * MIB
            assert fired == []
        assert [code for code in called if "/emu/host/stealing" in code.co_filename]  # it saw what ran
        ran = {code.co_name for code in called if re.search("/emu/(guest|virtio)/", code.co_filename)}
        # the machine asks the guest for its timers, and is told that it has none
        assert ran <= {"next_timer", "run_timers", "locked", "__enter__", "__exit__"}
        m.run_for(1)
        assert len(fired) == 1
        assert (m.guest.cached_bytes, m.guest.free_bytes) == (cached, free)
        assert m.ram.stats()["vcpu_calls"] == calls
        assert m.guest.vmstat == vmstat
        assert m.ram.transitions().gone == {}
        taken = m.ram.states().count(FrameState.DISCARDED)
        assert taken == m.ram.stats()["steal_volatile"] == 4096
        read_all(m, content)
        assert m.ram.transitions().gone == {Cause.LOOKUP: taken}
        assert m.guest.vmstat["pgdiscard_stable"] == taken
        assert m.ram.states().count(FrameState.DISCARDED) == 0
        assert m.clock.now() >= now


def test_unused_memory_goes_first_and_comes_back_as_zeros(tree):
    folder, content = tree
    with machine("cmm2", folder) as m:
        read_all(m, content)
        process = m.guest.spawn("app")
        memory = process.mmap("16MiB")
        memory.fill(seed=1)
        assert m.host.steal("64MiB") == 24 * MIB  # of what is needed nothing
        assert memory.verify(seed=1) == []
        process.exit()
        read_all(m, content)
        assert m.host.steal("16MiB") == 16 * MIB
        assert m.ram.stats()["steal_unused"] == 4096
        assert by_usage(m)[Usage.VOLATILE] * PAGE == 24 * MIB
        again = m.guest.spawn("app").mmap("16MiB")
        again.touch()
        assert again.read(0, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("dirty", ["page", "mapping"])
@pytest.mark.parametrize("store", ["", ",memory=8MiB"])
def test_what_a_mapping_writes_is_never_lost(tree, dirty, store):
    """Potentially volatile by the page's dirty bit, or stable from the first writable entry on."""
    folder, content = tree
    with machine(f"cmm2:dirty={dirty}{store}", folder) as m:
        file = m.guest.open("f3", "r+")
        mapping = m.guest.spawn("app").mmap(MIB, file=file, shared=True)
        mapping.touch(write=True)
        m.guest.sync()
        assert (folder / "f3").read_bytes() == content["f3"]
        usages = by_usage(m)
        assert usages[Usage.POTENTIALLY_VOLATILE] == (256 if dirty == "page" else 0)
        mapping.write(100, b"written through a mapping")
        assert m.guest.cached_bytes == MIB
        stolen = m.host.steal("64MiB")
        clean = 255 if dirty == "page" else 0
        assert m.ram.stats()["steal_potential"] == clean
        assert m.ram.stats()["steal_preserved"] == (1 if dirty == "page" and store else 0)
        assert stolen >= clean * PAGE
        wanted = content["f3"][:100] + b"written through a mapping" + content["f3"][125:]
        assert file.read(0, MIB) == wanted
        assert mapping.read(0, MIB) == wanted
        m.run_for(40)  # the flusher asks which pages are dirty
        assert (folder / "f3").read_bytes() == wanted
        mapping.write(5 * PAGE, b"and again, unmapped before anybody asked")
        mapping.munmap()
        m.host.steal("64MiB")
        m.guest.sync()
        assert (folder / "f3").read_bytes()[5 * PAGE :].startswith(b"and again, unmapped before anybody asked")
        file.close()


@pytest.mark.parametrize("settings", ["cmm2", "cmm2:minor=yes", "cmm2-light"])
def test_mapped_pages_that_are_taken_are_read_again(tree, settings):
    folder, content = tree
    with machine(settings, folder) as m:
        file = m.guest.open("f1")
        mapping = m.guest.spawn("app").mmap(MIB, file=file)
        assert mapping.read(0, MIB) == content["f1"]
        before = m.ram.transitions().total
        mapping.munmap()
        again = m.guest.spawn("other").mmap(MIB, file=file)
        assert again.read(0, MIB) == content["f1"]
        said = m.ram.transitions().total - before
        stolen = m.host.steal("1MiB")
        assert again.read(0, MIB) == content["f1"]
        if settings == "cmm2-light":
            assert said == 0
            assert m.ram.stats()["steal_volatile"] == 0
        else:
            assert stolen == MIB
            assert m.guest.vmstat["pgdiscard_fault"] == 256
            assert (said == 0) == (settings == "cmm2:minor=yes")
        file.close()


def test_a_mechanism_that_ends_leaves_nothing_volatile(tree):
    folder, content = tree
    with machine("cmm2", folder) as m:
        read_all(m, content)
        m.host.steal("10MiB")
        m.switch_mechanism("reporting")
        assert by_usage(m) == {Usage.STABLE: m.ram.frames, Usage.UNUSED: 0, Usage.VOLATILE: 0,
                               Usage.POTENTIALLY_VOLATILE: 0}  # fmt: skip
        assert m.guest.cached_bytes == 14 * MIB
        read_all(m, content)
        with pytest.raises(BadValue, match="cmm2"):
            m.host.steal("1MiB")
        m.switch_mechanism("cmm2")
        assert by_usage(m)[Usage.VOLATILE] * PAGE == 24 * MIB


def test_a_guest_that_lies_harms_itself():
    """It calls volatile, or unused, what it needs: a fault that says so, or zeros; its neighbour has all."""
    with emu.GuestRam("4MiB") as liar, emu.GuestRam("4MiB") as other:
        for ram in (liar, other):
            ram.track_usages()
            ram.fill(0, 1024, seed=3)
        liar.say([(0, 512)], Usage.VOLATILE)
        liar.say([(512, 512)], Usage.UNUSED)
        assert liar.steal(1024) == 1024
        with pytest.raises(DiscardFault) as caught:
            liar.read(7 * PAGE, 1)
        assert caught.value.gfn == 7
        assert liar.read(600 * PAGE, PAGE) == bytes(PAGE)
        assert other.verify(0, 1024, seed=3) == []
        assert other.steal(1024) == 0
