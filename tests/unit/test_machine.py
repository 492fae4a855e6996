"""emu.machine without userfaultfd: life, time, determinism."""

import pytest

import emu
from emu.errors import BadValue, ClosedError, GuestError

MIB = 1 << 20


def machine(mechanism="reporting", **options):
    options.setdefault("clock", emu.StepClock())
    return emu.Machine("128MiB", mechanism, uffd="off", **options)


def churn(m):
    process = m.guest.spawn("churn")
    kept = []
    for i in range(30):
        memory = process.mmap((i % 7 + 1) * MIB)
        memory.fill(seed=i)
        kept.append(memory)
        if i % 3 == 2:
            kept.pop(0).munmap()
        m.run_for(0.7)
    return kept


def test_the_same_seed_on_a_stepped_clock_is_the_same_run():
    """Counters, states, free lists, RSS."""
    records = []
    for _ in range(2):
        with machine() as m:
            churn(m)
            s = m.snapshot()
            blocks = [list(zone.buddy.free_blocks()) for zone in m.guest.zones]
            logical = {name: n for name, n in s.counters.items() if name != "vcpu_ns"}  # a time that was measured
            records.append((s.t, s.rss_bytes, s.states, logical, blocks, m.ram.states()))
    assert records[0] == records[1]


def test_settle_waits_until_nothing_is_pending():
    """And says whether it did."""
    with machine() as m:
        memory = m.guest.spawn("a").mmap("64MiB")
        memory.touch()
        memory.munmap()
        assert not m.settle(timeout=1)
        assert m.settle()
        assert m.snapshot().reporting.state == "idle"
        at = m.clock.now()
        assert m.settle()
        assert m.clock.now() == at
    with machine("none") as m:
        assert m.settle()


def test_time_passes_exactly():
    """run_for() ends where it should, timers or not."""
    with machine() as m:
        m.run_for(3.5)
        assert m.clock.now() == 3.5
        m.run_for("250ms")
        assert m.clock.now() == 3.75
        with pytest.raises(BadValue):
            m.run_for(-1)


def test_a_paused_guest_reports_nothing_until_it_goes_on():
    """Time passes for the host alone."""
    with machine() as m:
        m.settle()
        memory = m.guest.spawn("a").mmap("64MiB")
        memory.touch()
        memory.munmap()
        with m.guest.paused():
            m.run_for(60)
            assert m.rss_bytes == 64 * MIB
            with pytest.raises(GuestError):
                m.guest.spawn("b")
        m.run_for(60)
        assert m.rss_bytes < 64 * MIB


def test_a_snapshot_adds_up():
    """States to the RAM, used + free + per-CPU to the RAM, books to the kernel."""
    with machine() as m:
        churn(m)
        s = m.snapshot()
        assert sum(s.states.values()) == s.ram_bytes
        assert s.guest_used_bytes + s.guest_free_bytes + s.guest_pcp_bytes == s.ram_bytes
        assert s.books_difference == 0
        assert s.footprint_bytes > s.rss_bytes
        assert sum(count << order for order, count in enumerate(s.free_area)) * 4096 == s.guest_free_bytes
        assert all(r <= f for r, f in zip(s.reported_area, s.free_area, strict=True))


def test_a_closed_machine_says_so_and_closes_twice():
    """Every public name."""
    m = machine()
    m.close()
    m.close()
    for use in (
        lambda: m.guest,
        lambda: m.host,
        lambda: m.rss_bytes,
        lambda: m.lazyfree_bytes,
        lambda: m.footprint_bytes,
        lambda: m.snapshot(),
        lambda: m.stats(),
        lambda: m.run_for(1),
        lambda: m.settle(),
    ):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize(
    "options",
    [
        {"on_return": "never"},
        {"guest_thp": "sometimes"},
        {"cpus": 0},
        {"speed": "fast"},
        {"clock": emu.StepClock(), "speed": 10},
    ],
)
def test_bad_options_are_refused(options):
    """Before or after the RAM is mapped, which is then released."""
    with pytest.raises(BadValue):
        emu.Machine("16MiB", uffd="off", **options)


def test_more_cpus_share_the_high_mark():
    """zone_highsize(): low watermark over the CPUs."""
    with machine(cpus=1) as one, machine(cpus=4) as four:
        assert four.guest.zones[1].pcp.high == max(one.guest.zones[1].pcp.high // 4, 4 * four.guest.zones[1].pcp.batch)
