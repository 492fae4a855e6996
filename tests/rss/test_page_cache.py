"""Page cache on real memory over a real disk: what it hides, what gives it back, and what that costs.

The first tests are what a recorded Debian guest showed, in its numbers' shape: cache is never reported; drop_caches
gives it back with what the per-CPU lists hide; a balloon takes free memory, then cache; deflation changes nothing until
a touch.
"""

import random

import pytest

import emu
from emu.observe.pagemap import RESIDENT, Stage
from emu.testing import StepClock
from emu.workloads.build import Build
from emu.workloads.cache import Cache
from emu.workloads.fio import Fio
from emu.workloads.grep import Grep
from emu.workloads.runner import run

MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """48 MiB in 60 files of all sizes."""
    root = tmp_path_factory.mktemp("tree")
    rng = random.Random(4)
    sizes = [rng.randrange(1, 400_000) for _ in range(50)] + [3 * MIB + 17] * 10
    for number, size in enumerate(sizes):
        folder = root / f"d{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number:03}").write_bytes(rng.randbytes(size))
    return root


def machine(tree, mechanism="reporting", ram="256MiB", **options):
    return emu.Machine(ram, mechanism, disk=tree, disk_read_only=True, clock=StepClock(), **options)


def read_tree(m):
    for path, size in m.guest.walk():
        with m.guest.open(path) as file:
            assert len(file.read(0, size)) == size


def books_are_true(m):
    s = m.snapshot(exact=True)
    assert s.books_difference == 0
    assert sum(s.stages.values()) == s.ram_bytes
    assert sum(size for stage, size in s.stages.items() if stage in RESIDENT) == s.rss_bytes
    return s


def test_cache_is_never_reported(tree, service):
    """Ten minutes later it is all resident: free page reporting sees free memory only."""
    where = {"uffd": "off"} if service == "off" else {"service": service}
    with machine(tree, **where) as m:
        m.settle()
        read_tree(m)
        assert m.guest.cached_bytes > 36 * MIB
        m.run_for(600)
        s = books_are_true(m)
        assert s.rss_bytes >= s.guest_cached_bytes > 36 * MIB
        assert s.stages[Stage.INACTIVE] == s.guest_cached_bytes


def test_drop_caches_drains_the_lists_and_leaves_what_is_part_free(tree):
    """Of the memory that was cache, all but what lies in 2 MiB blocks of which somebody uses a page goes back."""
    with machine(tree) as m:
        m.settle()
        keeper = m.guest.spawn("keeper").mmap("4MiB")
        rng = random.Random(2)
        pages = iter(rng.sample(range(keeper.pages), keeper.pages))
        for number, (path, size) in enumerate(m.guest.walk()):
            with m.guest.open(path) as file:
                file.read(0, size)
            if number % 12 == 6:  # pages that stay come to lie among pages of the cache
                keeper.touch(next(pages) * PAGE, PAGE)
        process = m.guest.spawn("a")
        process.mmap("8MiB").touch()
        process.exit()
        assert m.guest.pcp_bytes > 0
        m.guest.drop_caches(3)
        assert m.guest.pcp_bytes == 0
        assert m.guest.cached_bytes == 0
        m.run_for(120)
        s = books_are_true(m)
        used = s.guest_used_bytes
        left = s.rss_bytes - used
        assert 0 < left < s.guest_free_bytes // 20  # some per cent
        assert left <= used // PAGE * 2 * MIB
        assert keeper.present == 5


def test_inflation_takes_free_memory_first_and_then_cache_that_doesnt_come_back(tree):
    """Within 0.1 s; deflation changes RSS by 0 until a touch."""
    with machine(tree, "balloon:target=128MiB", ram="128MiB") as m:
        read_tree(m)
        cached, free = m.guest.cached_bytes, m.guest.free_bytes
        m.host.balloon.guest_target = 128 * MIB - free // 2
        m.run_for(0.1)
        assert m.guest.ballooned_bytes == m.host.balloon.size_bytes == free // 2 // PAGE * PAGE
        assert m.guest.cached_bytes == cached  # free memory was enough
        rss = m.rss_bytes
        m.host.balloon.guest_target = "24MiB"
        m.run_for(0.1)
        s = books_are_true(m)
        assert s.guest_cached_bytes < cached - 20 * MIB
        assert s.rss_bytes < rss - 20 * MIB
        assert s.counters["guest_pgsteal_kswapd"] + s.counters["guest_pgsteal_direct"] > 5000
        before = s.rss_bytes
        m.host.balloon.guest_target = "128MiB"
        m.run_for(10)
        s = books_are_true(m)
        assert s.guest_ballooned_bytes == 0
        assert s.rss_bytes == before
        assert s.guest_cached_bytes < cached - 20 * MIB
        m.guest.spawn("a").mmap("64MiB").touch()
        assert m.rss_bytes > before + 30 * MIB


@pytest.mark.parametrize("mechanism", ["none", "aging", "balloon:target=64MiB"])
def test_a_burst_of_four_fifths_of_the_ram_is_served(tree, mechanism):
    """The cache gives way, and so does a balloon that may deflate."""
    with machine(tree, mechanism, ram="96MiB") as m:
        m.run_for(1)
        read_tree(m)
        assert m.guest.cached_bytes > 30 * MIB
        memory = m.guest.spawn("burst").mmap(96 * MIB * 8 // 10 // PAGE * PAGE)
        memory.fill(seed=5)
        assert memory.verify(seed=5) == []
        assert m.guest.vmstat["oom_kill"] == 0
        books_are_true(m)
        if mechanism.startswith("balloon"):
            assert m.guest.ballooned_bytes < 20 * MIB
        read_tree(m)
        assert memory.verify(seed=5) == []


def test_an_over_inflated_balloon_without_deflate_on_oom_kills_on_a_burst(tree):
    """The usual failure."""
    with machine(tree, "balloon:target=48MiB,deflate_on_oom=no", ram="128MiB") as m:
        m.run_for(1)
        with pytest.raises(emu.OomKilled):
            m.guest.spawn("burst").mmap("64MiB").fill(seed=5)
        assert m.guest.vmstat["oom_kill"] == 1
        assert m.guest.total_bytes == 48 * MIB
        books_are_true(m)


def test_pages_are_installed_and_not_faulted(tree):
    """A frame that the host doesn't hold, and that is wholly overwritten by the disk's bytes, costs no fault."""
    with machine(tree, "none") as m:
        if m.ram.service == "off":
            pytest.skip("nothing is installed without userfaultfd")
        read_tree(m)
        stats = m.stats()
        assert stats["pgfault"] == 0
        assert stats["install_frames"] * PAGE == m.guest.cached_bytes == m.rss_bytes


def flows_account_for_the_stages(result):
    """What a stage of the guest's has gained since the start is what came in less what went out, to the byte."""
    for phase in result.phases:
        for stage in ("anonymous", "shmem", "dirty", "active", "inactive", "ballooned"):
            came = sum(flow["bytes"] for flow in phase.flows_since_start if flow["to"] == stage)
            went = sum(flow["bytes"] for flow in phase.flows_since_start if flow["from"] == stage)
            assert came - went == phase.stages[stage], (phase.name, stage)
        assert sum(phase.stages.values()) == result.ram_bytes


def of(tree, mechanism, workload=None, **options):
    workload = workload or Cache(tree, every=5, hold=100, memory="16MiB")
    with emu.Machine("256MiB", mechanism, clock=StepClock(), **options) as m:
        result = run(m, workload, seed=1)
    assert result.error is None
    assert result.books_difference == 0
    assert result.corrupt_frames == 0
    assert result.verified_frames > 0
    return result


def test_what_each_mechanism_gives_back_of_a_cache_and_what_the_next_reads_pay(tree):
    """none and reporting keep it; dropcaches gives it back and reads again; aging keeps the working set and reads
    less."""
    chosen = {"aging": "aging:seconds=30"}
    names = ("none", "reporting", "reporting+dropcaches", "aging")
    results = {name: of(tree, chosen.get(name, name), Cache(tree, every=5, hold=150, memory="16MiB")) for name in names}
    size = sum(path.stat().st_size for path in tree.rglob("f*") if path.is_file())
    rss = {name: result.phases[3].rss_bytes for name, result in results.items()}
    read = {name: result.counters["disk_read_bytes"] for name, result in results.items()}
    assert results["none"].phases[3].name == "1: working set, 150 s"
    assert rss["reporting"] == rss["none"] > 16 * MIB + size * 9 // 10
    assert read["none"] == read["reporting"] == size
    assert rss["reporting+dropcaches"] < rss["none"] * 6 // 10
    assert rss["aging"] < rss["none"] * 6 // 10
    assert read["aging"] < 2 * size < read["reporting+dropcaches"]
    assert results["aging"].bloat == pytest.approx(results["reporting+dropcaches"].bloat, rel=0.15)
    assert results["none"].bloat > 1.5 * results["aging"].bloat
    # every byte that was read was compared
    frames = sum(-(-path.stat().st_size // PAGE) for path in tree.rglob("f*") if path.is_file())
    assert results["aging"].verified_frames > 2 * frames


def test_after_a_heavy_process_dropcaches_can_be_told_to_act(tree):
    """after=SIZE: at the exit of a process that had so much; every=0: and only then."""
    with machine(tree, "reporting+dropcaches:every=0,after=16MiB") as m:
        read_tree(m)
        small, large = m.guest.spawn("small"), m.guest.spawn("large")
        small.mmap("15MiB").touch()
        large.mmap("16MiB").touch()
        small.exit()
        m.run_for(1)
        assert m.guest.cached_bytes > 36 * MIB
        large.exit()
        m.run_for(60)
        assert m.guest.cached_bytes == 0
        assert m.rss_bytes == 0
        assert m.guest.vmstat["drop_pagecache"] == 1


@pytest.mark.parametrize("mechanism", ["none", "aging:seconds=8", "reporting+dropcaches:every=5", "balloon:keep=0.5"])
def test_workloads_hold_their_bytes_under_every_mechanism(tree, mechanism, tmp_path):
    """grep finds what is there, build and fio read what they wrote, and the disk has it."""
    grep = Grep(tree, pattern="ab", passes=2, hold=10)
    result = of(tree, mechanism, grep)
    assert result.measures["matches"].value == grep.matches > 1000
    flows_account_for_the_stages(result)
    result = of(tree, mechanism, Build(None, 12, "4MiB", hold=40))
    assert result.counters["guest_nr_written"] > 0
    flows_account_for_the_stages(result)
    fio = Fio("24MiB", "4KiB", 3000, zipf=0.9, hold=10, folder=tmp_path)
    result = of(tree, mechanism, fio)
    assert result.verified_frames > 6144 + 2000
    flows_account_for_the_stages(result)
    assert list(tmp_path.iterdir()) == []


def test_a_switch_of_the_mechanism_keeps_cache_and_books(tree):
    with machine(tree, "aging:seconds=8") as m:
        read_tree(m)
        for mechanism in (
            "balloon:target=128MiB",
            "reporting+dropcaches:every=3",
            "none",
            "aging:seconds=4",
            "reporting",
        ):
            m.run_for(4)
            m.switch_mechanism(mechanism)
            books_are_true(m)
            read_tree(m)
        assert m.guest.ballooned_bytes == 0
        assert m.guest.exit_hooks == {}
        with pytest.raises(emu.BadValue):
            m.switch_mechanism("balloon:host_page=3")
        books_are_true(m)
        m.run_for(30)
