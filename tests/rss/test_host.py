"""What the host does with memory, on real pages: each policy and mechanism by residency, content and counters."""

import random
from pathlib import Path

import pytest

import emu
from emu._native import disabled
from emu.errors import BadValue, GuestMemoryError, HostError
from emu.frames import FrameState
from emu.gate import Gate
from emu.observe.pagemap import RESIDENT, Stage
from emu.ram import GuestRam
from emu.testing import StepClock
from emu.workloads.cache import Cache
from emu.workloads.memhog import Memhog
from emu.workloads.runner import run

MIB = 1 << 20
PAGE = 4096
pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif({"move", "wp"} <= disabled(), reason="both ways out of the guest are switched off"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """24 MiB in 40 files."""
    root = tmp_path_factory.mktemp("tree")
    rng = random.Random(7)
    for number in range(40):
        (root / f"f{number:02}").write_bytes(rng.randbytes(rng.randrange(1, 1_200_000)))
    return root


@pytest.fixture(params=["", "move"], ids=["move", "wp"])
def disable(request):
    """Both ways out of the guest."""
    return request.param


def machine(mechanism="reporting", ram="256MiB", **options):
    return emu.Machine(ram, mechanism, clock=StepClock(), **options)


def books_are_true(m):
    s = m.snapshot(exact=True)
    stats = m.ram.stats()
    assert s.books_difference == 0
    assert sum(s.stages.values()) == s.ram_bytes
    assert sum(size for stage, size in s.stages.items() if stage in RESIDENT) == s.rss_bytes
    assert m.ram.side_bytes == (stats["nr_aside"] + stats["aside_stale"]) * PAGE
    assert s.footprint_bytes == m.footprint_bytes
    return s


# ---- what is done with memory that comes back


def freed(m, size="64MiB"):
    p = m.guest.spawn("app")
    a = p.mmap(size)
    a.fill(seed=7)
    a.munmap()
    m.guest.drain_pages()
    m.run_for(10)
    return p


def test_grace_keeps_and_then_drops(disable):
    """Aside it is no longer in the guest's RSS, but in the footprint.

    A touch brings it back; after its time it is gone.
    """
    with machine(on_return="grace:60s", disable=disable) as m:
        freed(m)
        s = books_are_true(m)
        assert s.rss_bytes == 0
        assert s.side_bytes == s.stages[Stage.ASIDE] == 64 * MIB
        assert s.footprint_bytes >= 64 * MIB
        # a read alone brings a page back, with its bytes: the host hasn't decided yet
        states = m.ram.states()
        gfn = states.index(bytes((emu.FrameState.ASIDE,)))
        assert m.ram.read(gfn * PAGE, PAGE) != bytes(PAGE)
        assert m.ram.stats()["aside_return"] == 1
        assert m.rss_bytes == PAGE
        m.run_for(60)
        s = books_are_true(m)
        assert (s.rss_bytes, s.stages[Stage.ASIDE], m.ram.stats()["aside_dropped"]) == (PAGE, 0, 64 * MIB // PAGE - 1)
        assert s.footprint_bytes < 2 * MIB
        b = m.guest.spawn("other").mmap("64MiB")
        b.fill(seed=9)
        assert b.verify(seed=9) == []


def test_a_guest_that_takes_its_memory_again_within_the_grace_finds_it_cheap_and_right():
    with machine("reporting:order=3", ram="80MiB", on_return="grace:60s") as m:
        p = freed(m)
        assert m.ram.side_bytes >= 60 * MIB
        a = p.mmap("64MiB")
        a.fill(seed=8)
        assert a.verify(seed=8) == []
        m.run_for(120)
        assert a.verify(seed=8) == []
        # what it didn't take again is gone
        stats = m.ram.stats()
        assert stats["aside_return"] > 45 * MIB // PAGE
        assert stats["aside_return"] + stats["aside_dropped"] == stats["aside_frames"]
        books_are_true(m)


@pytest.mark.parametrize("policy", ["lazy", "lazy:aside"])
def test_lazy_stays_until_memory_is_wanted_and_goes_oldest_first(policy):
    with machine(on_return=policy) as m:
        guest = m.guest
        maps = [guest.spawn(f"p{i}").mmap("16MiB") for i in range(3)]
        for a in maps:
            a.fill(seed=1)
        frames = []
        for a in maps:
            frames.append([gfn for gfn, count, _ in a._ranges(0, a.pages) for gfn in range(gfn, gfn + count)])
            a.munmap()
            guest.drain_pages()
            m.run_for(10)
        held = m.rss_bytes + m.ram.side_bytes
        assert held == 48 * MIB
        m.run_for(1000)
        assert m.rss_bytes + m.ram.side_bytes == held
        went = m.host.pressure("8MiB")
        assert 8 * MIB <= went < 24 * MIB
        left = [
            sum(m.ram.states(gfn, 1)[0] in (emu.FrameState.LAZY, emu.FrameState.ASIDE) for gfn in part)
            for part in frames
        ]
        assert left[0] < left[1] == left[2] == len(frames[1])
        m.host.pressure()
        assert m.rss_bytes + m.ram.side_bytes <= 31 * 4 * PAGE  # a CPU's batch of MADV_FREE
        books_are_true(m)


def test_policies_that_cant_be_are_refused():
    for policy in ("never", "grace", "grace:", "grace:-1s", "lazy:now"):
        with pytest.raises(BadValue):
            machine(on_return=policy)
    with pytest.raises(HostError, match="UFFDIO_MOVE"):
        machine(on_return="grace:5s", disable="move,wp")
    with pytest.raises(HostError, match="UFFDIO_MOVE"):
        machine(on_return="lazy:aside", uffd="off")


# ---- inactive: the guest hands over


def read_all(m):
    got = {}
    for path, size in m.guest.walk():
        with m.guest.open(path) as file:
            got[path] = file.read(0, size)
    return got


def test_an_idle_guests_cache_goes_and_its_memory_doesnt_shrink(tree, disable, service):
    """Near what it uses without cache, while MemFree and MemAvailable stay; the next pass reads what eviction would."""
    if service == "off":
        pytest.skip("needs userfaultfd")
    with machine("inactive:seconds=20,keep=20", disk=tree, service=service, disable=disable) as m:
        p = m.guest.spawn("app")
        a = p.mmap("16MiB")
        a.fill(seed=3)
        truth = read_all(m)
        cached, free = m.guest.cached_bytes, m.guest.free_bytes
        assert m.rss_bytes > 36 * MIB
        m.run_for(100)
        s = books_are_true(m)
        assert s.footprint_bytes < 1.15 * 16 * MIB
        assert (m.guest.cached_bytes, m.guest.free_bytes) == (cached, free)
        assert s.stages[Stage.DISCARDED] == cached
        before = m.stats()["disk_read_bytes"]
        assert read_all(m) == truth
        read = m.stats()["disk_read_bytes"] - before
        assert read <= 1.02 * sum(-(-len(data) // PAGE) * PAGE for data in truth.values())
        assert a.verify(seed=3) == []
        books_are_true(m)


def test_a_touch_in_time_costs_a_fault_and_no_disk(tree):
    with machine("inactive:seconds=20,keep=never", disk=tree) as m:
        truth = read_all(m)
        m.run_for(60)
        s = books_are_true(m)
        assert s.stages[Stage.ASIDE] == m.guest.cached_bytes
        assert s.rss_bytes == 0
        before = m.stats()["disk_read_bytes"]
        assert read_all(m) == truth
        assert m.stats()["disk_read_bytes"] == before
        assert m.ram.stats()["aside_return"] == m.guest.cached_bytes // PAGE
        # and what is aside goes when memory is wanted
        m.run_for(60)
        assert m.host.pressure() == m.guest.cached_bytes
        assert read_all(m) == truth
        books_are_true(m)


def test_every_kind_of_access_to_a_page_that_was_taken(tree, tmp_path):
    """Short reads, part and whole writes, mappings, copies on write, truncation, eviction by the guest.

    Never wrong bytes.
    """
    root = tmp_path / "disk"
    root.mkdir()
    data = random.Random(3).randbytes(300_000)
    for name in ("a", "b", "c", "d", "e", "f"):
        (root / name).write_bytes(data)
    with machine("inactive:seconds=8,keep=1", ram="64MiB", disk=root) as m:
        guest = m.guest
        files = {name: guest.open(name, "r+") for name in "abcdef"}
        model = {name: bytearray(data) for name in files}

        def taken():
            for file in files.values():
                assert file.read(0, 400_000) is not None
            guest.sync()
            m.run_for(60)
            assert m.chain()["discarded"] > 0

        taken()
        assert files["a"].read(5000, 100) == data[5000:5100]
        taken()
        files["b"].write(70_001, b"x" * 5000)
        model["b"][70_001:75_001] = b"x" * 5000
        files["c"].write(8192, b"y" * 8192)
        model["c"][8192:16384] = b"y" * 8192
        taken()
        process = guest.spawn("mapper")
        mapped = process.mmap(files["d"].size // PAGE * PAGE, file=files["d"], shared=True)
        assert mapped.read(12_345, 500) == data[12_345:12_845]
        mapped.write(20_000, b"z" * 10_000)
        model["d"][20_000:30_000] = b"z" * 10_000
        taken()
        private = process.mmap(files["e"].size // PAGE * PAGE, file=files["e"])
        private.write(40_000, b"q" * 10)
        assert private.read(40_000, 20) == b"q" * 10 + data[40_010:40_020]
        taken()
        files["f"].truncate(100_001)
        del model["f"][100_001:]
        files["f"].truncate(200_000)
        model["f"] += bytes(99_999)
        taken()
        guest.drop_caches(3)
        for name, file in files.items():
            assert file.read(0, 400_000) == bytes(model[name]), name
            file.fsync()
            assert (root / name).read_bytes() == bytes(model[name]), name
        books_are_true(m)


def test_what_was_handed_over_may_become_anything(tree):
    """Frames freed by the guest while they are aside, or taken, and used again: nobody sees what they held."""
    with machine("inactive:seconds=4,keep=2", ram="64MiB", disk=tree) as m:
        rng = random.Random(1)
        paths = [path for path, _ in m.guest.walk()]
        for round_ in range(12):
            for path in rng.sample(paths, 12):
                with m.guest.open(path) as file:
                    assert file.read(0, 2_000_000) == (tree / path).read_bytes()
            m.run_for(rng.choice([1, 3, 8]))
            p = m.guest.spawn("app")
            a = p.mmap("20MiB")
            assert a.read(5 * MIB, 3 * PAGE) == bytes(3 * PAGE)
            a.touch()
            assert a.read(7 * MIB, MIB) == bytes(MIB)
            a.fill(seed=round_)
            m.run_for(2)
            assert a.verify(seed=round_) == []
            p.exit()
            books_are_true(m)
        assert m.ram.stats()["aside_dropped"] > 0
        assert m.guest.vmstat["pgdiscard_fault"] > 0


# ---- epoch and purge


def test_epochs_take_old_cache_and_leave_what_is_used(tree):
    with machine("epoch:low=24MiB,oldest=20s,step=4MiB", disk=tree) as m:
        a = m.guest.spawn("app").mmap("8MiB")
        a.fill(seed=3)
        read_all(m)
        hot = "f05"
        for _ in range(40):
            with m.guest.open(hot) as file:
                file.read(0, 2_000_000)
            m.run_for(3)
        with m.guest.open(hot) as file:
            assert file.cached_bytes >= file.size
        m.run_for(5)
        s = books_are_true(m)
        assert s.footprint_bytes <= 24 * MIB + 4 * MIB
        assert m.stats()["epochs"] > 1
        assert m.stats()["purges"] == 0
        # below it nothing is asked
        asked = m.stats()["epochs"]
        m.run_for(30)
        assert m.stats()["epochs"] <= asked + 1


def test_a_purge_takes_all_and_at_once(tree):
    with machine("purge:high=32MiB", disk=tree) as m:
        a = m.guest.spawn("app").mmap("20MiB")
        a.fill(seed=3)
        read_all(m)
        assert m.rss_bytes > 40 * MIB
        m.run_for(2)
        assert m.guest.cached_bytes == 0
        assert m.stats()["purges"] == 1
        assert books_are_true(m).rss_bytes < 22 * MIB
        assert a.verify(seed=3) == []


# ---- swap, the gate


def test_the_worker_takes_what_it_is_told(disable, service):
    """As many frames as it is kicked for, idle longest first; without a store or a worker it says so."""
    if service == "off":
        with GuestRam("16MiB", uffd="off") as ram, pytest.raises(HostError, match="set aside"):
            ram.open_store()
        return
    with GuestRam("16MiB", service=service, disable=disable) as ram:
        ram.open_store()
        with pytest.raises(HostError, match="worker be started"):
            ram.kick_swapd(1)
        ram.start_swapd()
        ram.track_accesses()
        ram.fill(0, 4096, 11)
        for _ in range(3):
            ram.scan_ages()
            ram.touch(1024, 3072)
        ram.kick_swapd(1000, wait=True)
        states, preserved = ram.states(), bytes([FrameState.PRESERVED])
        stored = ram.stats()["nr_preserved"]
        assert 1000 <= stored <= 1024
        assert states.count(preserved) == states[:1024].count(preserved) == stored
        assert ram.store.pages == stored
        assert ram.rss_bytes == (4096 - stored) * PAGE
        assert ram.verify(0, 4096, 11) == []
        with pytest.raises(BadValue, match="0 or more"):
            ram.kick_swapd(-1)


def test_swap_holds_a_guest_to_its_max(tmp_path, disable, service):
    if service == "off":
        with pytest.raises(HostError, match="set aside"):
            machine("swap", uffd="off")
        return
    with machine(f"swap:max=48MiB,memory=4MiB,file={tmp_path}", ram="128MiB", service=service, disable=disable) as m:
        a = m.guest.spawn("app").mmap("100MiB")
        a.fill(seed=5)
        assert m.footprint_bytes <= 49 * MIB + m.ram.table_bytes
        for _ in range(2):
            assert a.verify(seed=5) == []
        stats = m.ram.stats()
        assert stats["swap_out_frames"] > 50 * MIB // PAGE
        assert stats["swap_in_frames"] > 50 * MIB // PAGE
        assert stats["gate_failed"] == 0
        assert m.host.gate.peak <= 48 * MIB + MIB
        books_are_true(m)
        assert list(tmp_path.iterdir()) == []  # the file has no name
        s = m.snapshot()
        assert s.stages[Stage.SWAPPED] == m.ram.store.pages * PAGE > 50 * MIB
        assert m.host.swap_out("8MiB") == 8 * MIB
        m.switch_mechanism("reporting")
        assert a.verify(seed=5) == []
        m.switch_mechanism("swap")


def test_a_store_file_isnt_somebodys(tmp_path):
    """What holds something, or is neither a file nor a disk, is refused and untouched; an empty file is left empty."""
    for path in (tmp_path / "precious", Path("/dev/null")):
        if path.parent == tmp_path:
            path.write_bytes(b"x" * 34000)
        with emu.GuestRam("8MiB") as ram, pytest.raises(HostError, match=f"{path}.*"):
            ram.open_store(0, file=path)
    assert (tmp_path / "precious").read_bytes() == b"x" * 34000
    with emu.GuestRam("8MiB") as ram, pytest.raises(BadValue, match="no path"):
        ram.open_store(0, file="")
    (tmp_path / "empty").touch()
    with emu.GuestRam("8MiB") as ram:
        ram.open_store(0, file=tmp_path / "empty")
        ram.fill(0, 2048, seed=1)
        assert ram.swap_out([(0, 2048)]) == 2048
        assert (tmp_path / "empty").stat().st_size > 0
        assert ram.verify(0, 2048, seed=1) == []
    assert (tmp_path / "empty").stat().st_size == 0


def test_a_guest_that_finds_no_memory_fails_and_says_so(tmp_path):
    with machine(f"swap:max=16MiB,memory=0,file={tmp_path},file_size=1MiB,deadline=200ms", ram="64MiB") as m:
        a = m.guest.spawn("app").mmap("32MiB")
        with pytest.raises(GuestMemoryError, match="budget's max") as caught:
            a.fill(seed=5)
        assert caught.value.errno == 12
        assert m.ram.stats()["gate_failed"] >= 1
        result = run(m, Memhog("32MiB", 1, 0.0), seed=1)
        assert result.error is not None
        assert "budget's max" in result.error


def test_two_rams_share_a_gate():
    with Gate.create("8MiB") as gate, emu.GuestRam("16MiB") as a, emu.GuestRam("16MiB") as b:
        gate.attach(a, 0)
        gate.attach(b, 1, deadline=0.1)
        a.touch(0, 1500)
        with pytest.raises(GuestMemoryError):
            b.touch(0, 1500)
        assert gate.charged <= gate.max == 8 * MIB
        a.discard([(0, 1500)])
        b.touch(0, 1500)
        slot = gate.slot(1)
        assert slot.throttled >= 1
        assert slot.failed == 1
        assert slot.charged >= 1500 * PAGE
        with pytest.raises(HostError):
            gate.attach(a, 2)
        with pytest.raises(BadValue):
            gate.attach(a, 64)
        assert gate.release(1) >= 1500 * PAGE
        assert gate.release(1) == 0


# ---- what a host believes


def test_the_working_set_beside_the_truth(tree):
    with machine(ram="128MiB", disk=tree) as m:
        a = m.guest.spawn("app").mmap("64MiB")
        a.fill(seed=1)
        m.host.watch_working_set(period=10.0, window=20.0, samples=400)
        for _ in range(50):
            a.touch(0, 16 * MIB)
            m.run_for(2)
        seen = m.host.working_set.estimates
        assert len(seen) >= 9
        last = seen[-1]
        assert last.truth == last.idle_age == 16 * MIB
        assert abs(last.sampled - last.truth) < 0.1 * 64 * MIB
        assert last.resident == 64 * MIB
        m.host.working_set.stop()
        assert m.ram.stats()["nr_aside"] == 0
        books_are_true(m)


@pytest.mark.skipif(bool({"move", "wp"} & disabled()), reason="write tracking needs both")
def test_the_kernel_notes_writes():
    with machine(ram="64MiB", write_tracking=True) as m:
        a = m.guest.spawn("app").mmap("32MiB")
        a.fill(seed=1)
        m.host.watch_working_set(period=10.0, window=10.0, samples=50)
        a.touch(0, 8 * MIB)
        a.touch(0, 24 * MIB, write=False)
        m.run_for(10)
        last = m.host.working_set.estimates[-1]
        assert last.truth == 24 * MIB
        assert 8 * MIB <= last.written <= 8 * MIB + 50 * PAGE
    with pytest.raises(HostError):
        emu.GuestRam("16MiB", write_tracking=True, disable="move")


def test_sampling_is_off_by_less_than_the_ram_says(tree):
    """RSS tells the high-water mark; sampling tells what is used."""
    with machine("none", ram="256MiB") as m:
        m.host.watch_working_set(period=20.0, window=20.0, samples=300)
        result = run(m, Cache(tree, 0.2, hold=100.0, memory="16MiB"), seed=1)
        assert result.error is None
        assert result.corrupt_frames == 0
        last = m.host.working_set.estimates[-1]
        assert abs(last.sampled - last.truth) < abs(m.rss_bytes - last.truth)
        assert result.working_set
