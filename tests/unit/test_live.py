"""report.live: the view's lines, from snapshots alone; and Machine.watch, pause, speed, mechanisms that are
switched."""

from dataclasses import replace

import pytest
from rich.console import Console, Group

from emu.clock import ScaledClock, StepClock
from emu.errors import BadValue
from emu.frames import Usage
from emu.machine import Machine
from emu.observe.pagemap import Stage
from emu.observe.usages import UsageView
from emu.report.live import HELP, LiveState, compose, map_cells, plain_line
from emu.report.table import mib_text
from emu.workloads import Step
from emu.workloads.runner import Stopped, run


@pytest.fixture
def machine():
    with Machine("64MiB", "reporting:order=0", clock=StepClock(), uffd="off") as m:
        yield m


def state_of(machine, width=80, height=24, **options):
    state = LiveState("emu run test", **options)
    state.add(machine.snapshot(cells=map_cells(width, height)))
    return state


def lines(state, width, height):
    return [line.plain for line in compose(state, width, height)]


def test_the_view_at_80_by_24(machine):
    """16 MiB used of 64, nothing reported yet."""
    machine.guest.spawn("a").mmap("16MiB").touch()
    machine.run_for(1)
    state = state_of(machine)
    state.events.append((0.5, "boot"))
    seen = lines(state, 80, 24)
    picture = [
        " emu run test                                    64 MiB  t 0:01.0 step  running ",
        " MiB: RSS 16.0 + tables 0.0 = footprint 16.0  used 16.0  books 0  bloat 1.00x",
        "─ map: 256 KiB a cell, small: mixed ─────────────── ━ RSS ┄ used · footprint ───",
    ]
    assert len(seen) == 24
    assert all(len(line) <= 80 for line in seen)
    for got, wanted in zip(seen[:3], picture, strict=True):
        assert got.replace(" tables 0.1", " tables 0.0").replace("footprint 16.1", "footprint 16.0") == wanted
    # which 16 MiB the guest took is the allocator's business; how many cells that is, isn't
    cells = "".join(line.split(" │ ")[0] for line in seen[3:11])
    assert (cells.count("A"), cells.count(".")) == (64, 192)
    assert seen[3].endswith("━")
    assert any("A anonymous" in line and "F free, resident" in line and ". not resident" in line for line in seen)
    assert seen[12] == " anon 16.0M  dirty 0 →-  act 0 →-  inact 0 →-  free 0 →-  host 48.0M"
    assert any(line.startswith(" worker requested, in 1.0 s") for line in seen)
    assert any("order 0-3" in line for line in seen)
    assert seen[-1] == " q quit  space pause  +/- speed  s one pass  m mechanism  ? help"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (100, 30), (40, 12), (20, 5), (8, 2), (1, 1)])
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("help_", [True, False])
def test_it_fits_any_terminal(machine, width, height, unicode, help_):
    """Neither wider nor higher, before the first snapshot and after; ASCII where that is all there is."""
    for state in (LiveState("t", unicode=unicode), state_of(machine, width, height, unicode=unicode)):
        state.help = help_
        seen = lines(state, width, height)
        assert len(seen) == max(height, 1)
        assert max(map(len, seen)) <= width
        if not unicode:
            assert "\n".join(seen).isascii()
        console = Console(width=width, height=height, force_terminal=True, no_color=True)
        with console.capture() as captured:
            console.print(Group(*compose(state, width, height)))
        assert captured.get().count("\n") == max(height, 1)


def test_the_map_follows_what_the_guest_does(machine):
    """Touched, freed, on the lists, reported, lost: frames by stage, exactly; they always add up to the RAM."""

    def totals():
        page_map = machine.snapshot(cells=64).page_map
        assert sum(page_map.totals) == machine.ram.frames
        return {stage.name: n for stage, n in zip(Stage, page_map.totals, strict=True) if n}

    assert totals() == {"HOST_OWNED": 16384}
    process = machine.guest.spawn("a")
    memory = process.mmap("8MiB")
    memory.touch()
    assert totals() == {"HOST_OWNED": 14336, "ANONYMOUS": 2048}
    memory.munmap("4MiB", "4MiB")
    on_lists = machine.guest.pcp_bytes >> 12
    seen = totals()
    assert seen["ANONYMOUS"] == 1024
    assert seen["PCP"] + seen.get("FREE", 0) == 1024
    assert 0 < seen["PCP"] <= on_lists  # the rest was never touched
    machine.guest.drain_pages()
    assert totals() == {"HOST_OWNED": 14336, "ANONYMOUS": 1024, "FREE": 1024}
    machine.settle()
    assert totals() == {"HOST_OWNED": 15360, "ANONYMOUS": 1024}
    file = machine.guest.create_file("1MiB")
    file.fill(seed=1)
    assert totals() == {"HOST_OWNED": 15104, "ANONYMOUS": 1024, "SHMEM": 256}
    machine.ram.poison([(memory._frame[0] - 1, 1)])
    assert totals()["LOST"] == 1


def test_reported_memory_that_is_still_resident_shows():
    """A host that discards nothing, and one that frees lazily."""
    for options, stage in (
        ({"mechanism": "reporting:order=0,assigned_device=yes"}, "REPORTED"),
        ({"mechanism": "reporting:order=0", "on_return": "lazy"}, "LAZY"),
    ):
        with Machine("64MiB", clock=StepClock(), uffd="off", **options) as m:
            memory = m.guest.spawn("a").mmap("8MiB")
            memory.touch()
            memory.munmap()
            m.guest.drain_pages()
            m.settle()
            assert m.snapshot(cells=10).page_map.totals[Stage[stage]] == 2048


class Stepped(StepClock):
    """Stepped, and not said to be: what a rate is can be told exactly."""

    name = "x1"


def test_rates_are_per_guest_second():
    """Of the last two seconds; none before any time has passed."""
    with Machine("64MiB", "none", clock=Stepped(), uffd="off") as m:
        state = LiveState("t")
        state.add(m.snapshot())
        assert state.rates() is None
        memory = m.guest.spawn("a").mmap("16MiB")
        for _ in range(4):
            m.run_for(1)
            memory.touch(0, "4MiB")
            state.add(m.snapshot())
        m.ram.discard([(0, 1)])
        assert state.rates().faults == 0
        memory.touch("4MiB", "8MiB")
        m.run_for(1)
        state.add(m.snapshot())
        assert state.rates().faults == 1024
        assert "faults/s 1,024" in plain_line(state)
        for _ in range(70):
            m.run_for(1)
            state.add(m.snapshot())
        assert 60 <= len(state.history) <= 62


def test_the_sizes_are_the_final_tables_digits(machine):
    """One function prints both."""
    machine.guest.spawn("a").mmap("5MiB").touch()
    s = machine.snapshot(exact=True)
    state = LiveState("t")
    state.add(s)
    head = lines(state, 120, 30)[1]
    for size in (s.rss_bytes, s.footprint_bytes, s.guest_used_bytes, s.lazyfree_bytes):
        assert f" {mib_text(size)}" in head


def test_a_watcher_is_called_in_long_work_and_in_sleep_and_may_stop_both():
    """In the guest's own thread, and told whether the guest is idle."""
    with Machine("256MiB", "none", speed=1000, uffd="off") as m:
        heard = []
        m.watch(heard.append)
        memory = m.guest.spawn("a").mmap("128MiB")
        memory.touch()
        assert heard.count(False) >= 2 * (32768 // 2048 - 1)
        m.run_for(200)
        assert heard.count(True) >= 2
        m.watch(None)
        before = len(heard)
        memory.touch()
        m.run_for(1)
        assert len(heard) == before

        class Enough(Exception):
            pass

        def stop(idle):
            raise Enough

        m.watch(stop)
        with pytest.raises(Enough):
            memory.touch()
        with pytest.raises(Enough):
            m.run_for(100)
        m.watch(None)
        assert m.snapshot(exact=True).books_difference == 0


def test_a_clock_can_stand_still_change_its_speed_and_skip():
    """Guest time neither jumps nor runs backwards by it, but where it is told to."""
    clock = ScaledClock(1000)
    with clock.stopped():
        at = clock.now()
        assert clock.now() == at
        with clock.stopped():
            assert clock.now() == at
        assert clock.now() == at
    clock.sleep_until(at + 1)
    clock.set_speed(0.01)
    assert clock.name == "x0.01"
    assert at + 1 <= clock.now() < at + 100
    clock.skip_to(at + 500)
    assert at + 500 <= clock.now() < at + 501
    clock.skip_to(0)
    assert clock.now() >= at + 500
    with pytest.raises(BadValue):
        clock.set_speed(0)


def test_a_mechanism_is_switched_on_the_same_state():
    """What was given back stays so; the new one goes on from there; counters don't start anew."""
    with Machine("128MiB", "none", clock=StepClock(), uffd="off") as m:
        memory = m.guest.spawn("a").mmap("64MiB")
        memory.touch()
        memory.madvise_dontneed("0", "32MiB")
        m.guest.drain_pages()
        m.run_for(60)
        assert m.rss_bytes == 64 << 20
        m.switch_mechanism("reporting:order=0")
        m.run_for(60)
        assert m.rss_bytes == 32 << 20
        reports = m.stats()["reports"]
        m.switch_mechanism("none")
        memory.munmap()
        m.guest.drain_pages()
        m.run_for(60)
        assert m.rss_bytes == 32 << 20
        assert m.stats()["reports"] == reports
        m.switch_mechanism("reporting:order=0")
        m.run_for(60)
        assert m.rss_bytes == 0
        assert m.stats()["reports"] > reports
        for bad in ("reporting:poison=1", "reporting:order=11", "magic"):
            with pytest.raises(BadValue):
                m.switch_mechanism(bad)
            assert m.mechanism.name == "reporting"
        again = m.guest.spawn("b").mmap("16MiB")
        again.touch()
        again.munmap()
        m.guest.drain_pages()
        m.run_for(60)
        assert m.rss_bytes == 0


def test_a_queued_pass_of_a_mechanism_that_was_switched_off_is_not_run():
    with Machine("128MiB", "reporting", clock=StepClock(), uffd="off") as m:
        assert m.guest.next_timer is not None
        m.switch_mechanism("none")
        assert m.guest.next_timer is None
        assert [label for label, _ in m.snapshot().panel] == ["gives back"]


def test_a_run_that_is_stopped_counts_up_to_the_last_picture():
    """The integrals reach to it, and whoever samples hears of it."""

    class Work:
        name = "work"
        verified_frames = corrupt_frames = 0

        def parameters(self):
            return {}

        def notes(self):
            return []

        def measures(self):
            return {}

        def steps(self, machine):
            memory = machine.guest.spawn("a").mmap("16MiB")
            memory.touch()
            yield Step("touched")
            machine.run_for(10)
            raise Stopped(machine.snapshot(exact=True))

    with Machine("64MiB", "none", clock=StepClock(), uffd="off") as m:
        heard = []
        result = run(m, Work(), seed=1, on_sample=heard.append)
        assert [phase.name for phase in result.phases] == ["touched", "stopped"]
        assert result.phases[-1].t == heard[-1].t == 10
        assert result.used_byte_seconds == 10 * (16 << 20)
        assert result.error is None


def test_the_help_fits_the_smallest_terminal():
    lines = HELP.splitlines()
    assert len(lines) <= 24 - 2
    assert max(map(len, lines)) <= 78


@pytest.mark.parametrize("width", [80, 120])
def test_page_states_are_a_matrix_of_guest_by_host(width):
    """Every cell is there, whatever the terminal's width, and the free blocks beside it where there is room."""
    frames = {Usage.STABLE: (4608, 256, 0), Usage.UNUSED: (255, 0, 1 << 28), Usage.VOLATILE: (230_000, 0, 12_345_678),
              Usage.POTENTIALLY_VOLATILE: (0, 0, 0)}  # fmt: skip
    state = LiveState("x")
    with Machine("64MiB", "none", clock=StepClock(), uffd="off") as m:
        for t, said in ((1.0, 1000), (2.0, 13_400)):
            usages = UsageView(frames, {(Usage.STABLE, Usage.VOLATILE): said}, {}, 0, 0)
            state.add(replace(m.snapshot(), t=t, clock="x1", usages=usages))
    text = [line.plain for line in compose(state, width, 24)]
    head = next(i for i, line in enumerate(text) if "states, and said" in line)
    rows = [line[text[head].index("states") - 1 :].split() for line in text[head + 1 : head + 6]]
    assert rows[0][:4] == ["r", "p", "z", "/s"]
    assert [row[:5] for row in rows[1:]] == [
        ["S", "18M", "1.0M", "0", "0"],
        ["U", "1.0M", "0", "1.0T", "0"],
        ["P", "0", "0", "0", "0"],
        ["V", "898M", "0", "47G", "12k"],
    ]
    assert ("free blocks" in text[head]) == (width == 120)
