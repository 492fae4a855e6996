"""GuestRam: exact RSS, content, limits, life and death."""

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

import emu
from emu.errors import BadValue, ClosedError, GuestMemoryError, HostError, RangeError
from emu.ram import FrameState, Histogram

MIB = 1 << 20


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_rss_rises_by_what_is_touched_exactly(open_ram):
    """One frame a write, none a read, none twice; and falls by what is discarded."""
    ram = open_ram("16MiB")
    assert ram.rss_bytes == 0
    ram.touch(0, 1000, write=False)
    assert ram.rss_bytes == 0
    ram.touch(500, 1000)
    assert ram.rss_bytes == 1000 * 4096
    ram.touch(500, 1000, threads=3)
    assert ram.rss_bytes == 1000 * 4096
    assert ram.discard([(0, 700), (1400, 1000)]) == 300
    assert ram.rss_bytes == 700 * 4096
    stats = ram.stats()
    assert stats["discard_frames"] == 300
    assert stats["nr_resident"] == 700
    assert ram.read(1450 * 4096, 4096) == bytes(4096)


def test_content_survives_what_happens_around_it(open_ram):
    """Fill, give every third frame back, verify the others, read the gaps as zeros."""
    ram = open_ram("16MiB")
    ram.fill(0, 4096, seed=9, threads=2)
    ram.discard([(gfn, 1) for gfn in range(0, 4096, 3)])
    assert ram.verify(0, 4096, seed=9) == list(range(0, 4096, 3))
    assert ram.rss_bytes == (4096 - 1366) * 4096


def test_bytes_are_written_at_any_alignment(open_ram):
    """Across frames; whole missing frames are installed without a fault."""
    ram = open_ram("1MiB")
    data = random.Random(2).randbytes(5 * 4096)
    ram.write(1000, data)
    assert ram.read(1000, len(data)) == data
    assert ram.read(0, 1000) == bytes(1000)
    assert ram.rss_bytes == 6 * 4096
    if ram.service != "off":
        assert ram.stats()["install_frames"] == 4
        assert ram.stats()["pgfault"] == 2
    ram.write(10, b"")
    assert ram.read(10, 0) == b""


def test_a_buffer_may_be_guest_memory_itself(open_ram):
    """UFFDIO_COPY from a missing source is EFAULT: the copy then goes frame by frame."""
    ram = open_ram("1MiB")
    ram.fill(0, 2, seed=1)
    view = ram.unsafe_view()
    ram.write(64 * 4096, view[: 4 * 4096])  # two present frames, two missing ones
    assert ram.read(64 * 4096, 4 * 4096) == ram.read(0, 4 * 4096)


def test_fault_around_rounds_rss_up_to_its_window(open_ram, service):
    """And only that."""
    if service == "off":
        pytest.skip("the kernel has its own ideas there")
    ram = open_ram("1MiB", fault_around=16)
    ram.touch(100)
    assert ram.rss_bytes == 16 * 4096


def test_latencies_are_counted_one_a_frame(open_ram):
    """Percentiles are bucket floors within the range seen."""
    ram = open_ram("4MiB")
    latency = Histogram()
    ram.touch(0, 1000, latency=latency, threads=2)
    assert latency.count == 1000
    assert 0 < latency.percentile(50) <= latency.percentile(99) <= latency.max
    assert latency.mean > 0
    assert Histogram().percentile(50) == 0


def test_events_tell_what_happened_in_order(open_ram):
    """Faults only while they are traced."""
    ram = open_ram("1MiB")
    ram.touch(3)
    ram.discard([(0, 10)])
    ram.trace_faults()
    ram.touch(4)
    ram.trace_faults(False)
    ram.touch(5)
    kinds = [(event.type, event.gfn, event.count) for event in ram.events()]
    assert kinds[0] == ("discard", 0, 1)
    assert kinds[1:] == ([("fault", 4, 1)] if ram.service != "off" else [])
    assert ram.events() == []


def test_how_far_a_call_got_counts_over_all_its_chunks(open_ram):
    """Calls are cut into chunks of 64 MiB, so that Ctrl-C can be handled; the error counts from the start."""
    ram = open_ram("256MiB")
    ram.poison([(40000, 1)])
    with pytest.raises(GuestMemoryError) as caught:
        ram.touch(0, 50000, write=False)
    assert (caught.value.gfn, caught.value.done) == (40000, 40000)


def test_a_lost_frame_raises_with_its_number_and_how_far_it_got(open_ram):
    """And only unpoison brings it back, as zeros."""
    ram = open_ram("1MiB")
    ram.fill(0, 20, seed=4)
    assert ram.poison([(7, 2)]) == 2
    with pytest.raises(GuestMemoryError, match=r"0x7.*poisoned") as caught:
        ram.verify(5, 10, seed=4)
    assert (caught.value.gfn, caught.value.done) == (7, 2)
    with pytest.raises(GuestMemoryError) as caught:
        ram.read(6 * 4096, 8192)
    assert (caught.value.gfn, caught.value.done) == (7, 4096)
    assert ram.discard([(0, 20)]) == 18
    assert ram.states(7, 2) == bytes([FrameState.LOST] * 2)
    assert ram.unpoison([(0, 256)]) == 2
    ram.touch(7)
    assert ram.read(7 * 4096, 4096) == bytes(4096)


def test_lazily_freed_memory_stays_until_pressure(open_ram):
    """RSS doesn't show it, LazyFree does; a write cancels; what went reads as zeros."""
    ram = open_ram("4MiB")
    ram.fill(0, 1000, seed=1)
    assert ram.lazy_free([(0, 1000)]) == 1000
    assert ram.rss_bytes == 1000 * 4096
    ram.fill(0, 100, seed=2)
    dropped = ram.lazy_drop()
    assert 900 - 31 * len(os.sched_getaffinity(0)) <= dropped <= 900
    assert ram.rss_bytes == (1000 - dropped) * 4096
    assert ram.verify(0, 100, seed=2) == []
    for gfn in range(100, 1000):
        page = ram.read(gfn * 4096, 4096)
        assert page == bytes(4096) or gfn not in ram.verify(gfn, 1, seed=1)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "is 0"), (4095, "multiple"), ("65TiB", "address space"), ("lots", "isn't a size"), (-4096, "negative")],
)
def test_bad_sizes_are_refused(size, words):
    """With the value and the limit."""
    with pytest.raises(BadValue, match=words):
        emu.GuestRam(size)


@pytest.mark.parametrize(
    "options",
    [
        {"service": "magic"},
        {"uffd": "sometimes"},
        {"fault_around": 0},
        {"fault_around": 3},
        {"fault_around": 1024},
        {"thp": True},
        {"service_cpu": 9999},
        {"disable": "everything"},
    ],
)
def test_bad_options_are_refused(options):
    """And nothing is left mapped."""
    before = len(Path("/proc/self/maps").read_text().splitlines())
    with pytest.raises(BadValue):
        emu.GuestRam("1MiB", **options)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before


@pytest.mark.parametrize(
    "call",
    [
        lambda ram: ram.touch(256),
        lambda ram: ram.touch(0, 257),
        lambda ram: ram.touch(255, 1 << 60),
        lambda ram: ram.read(MIB, 1),
        lambda ram: ram.read(-1, 1),
        lambda ram: ram.write(MIB - 1, b"ab"),
        lambda ram: ram.discard([(250, 7)]),
        lambda ram: ram.discard([(0, 5), (4, 1)]),
        lambda ram: ram.lazy_free([(256, 1)]),
        lambda ram: ram.install([256], bytes(4096)),
        lambda ram: ram.install([1, 1], bytes(8192)),
        lambda ram: ram.states(200, 57),
    ],
)
def test_ranges_outside_or_overlapping_are_refused(open_ram, call):
    """Before anything is done."""
    ram = open_ram("1MiB")
    with pytest.raises(RangeError):
        call(ram)
    assert ram.rss_bytes == 0


def test_what_is_not_a_range_is_refused(open_ram):
    """Negative numbers, buffers of the wrong size, no threads."""
    ram = open_ram("1MiB")
    for call in (
        lambda: ram.touch(-1),
        lambda: ram.touch(0, -1),
        lambda: ram.discard([(0, -1)]),
        lambda: ram.install([0], b"short"),
        lambda: ram.touch(0, 1, threads=0),
    ):
        with pytest.raises(BadValue):
            call()


def test_use_after_close_raises_and_close_is_idempotent(open_ram):
    """Every public call."""
    ram = open_ram("1MiB")
    ram.close()
    ram.close()
    assert ram.closed
    for call in (
        lambda: ram.touch(0),
        lambda: ram.read(0, 1),
        lambda: ram.write(0, b"x"),
        lambda: ram.discard([(0, 1)]),
        lambda: ram.rss_bytes,
        lambda: ram.states(),
        lambda: ram.stats(),
        lambda: ram.unsafe_view(),
        lambda: ram.address,
        lambda: ram.table_bytes,
    ):
        with pytest.raises(ClosedError):
            call()


def test_a_view_in_use_keeps_the_ram_from_closing(open_ram):
    """A dangling pointer into unmapped memory is worse than an error."""
    ram = open_ram("1MiB")
    view = ram.unsafe_view()
    part = memoryview(view[:10])
    with memoryview(part) as held:
        part.release()
        nested = memoryview(view)
        with pytest.raises(BadValue, match="unsafe_view"):
            ram.close()
        assert not ram.closed
        del held
    nested.release()
    ram.close()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_close_waits_for_a_call_under_way(open_ram):
    """And refuses the next ones."""
    ram = open_ram("256MiB")
    started, errors = threading.Event(), []

    def work():
        started.set()
        try:
            while True:
                ram.touch(0, ram.frames)
        except ClosedError:
            errors.append("closed")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ram.close()
    thread.join(30)
    assert errors == ["closed"]


def test_two_closers_and_a_running_call_do_not_crash():
    """Neither returns before the memory may go."""
    done = run_python("""
        import threading, emu
        where = [{"uffd": "off"}] + ([{"service": "auto"}, {"service": "thread"}] if emu.uffd.probe().rung else [])
        for options in where * 3:
            ram = emu.GuestRam("128MiB", **options)
            started = threading.Event()
            def work():
                started.set()
                try:
                    while True:
                        ram.touch(0, ram.frames)
                        ram.discard([(0, ram.frames)])
                except emu.ClosedError:
                    pass
            threads = [threading.Thread(target=work) for _ in range(2)]
            for t in threads: t.start()
            started.wait()
            closers = [threading.Thread(target=ram.close) for _ in range(4)]
            for t in closers: t.start()
            for t in closers + threads: t.join()
            assert ram.closed
        print("done")
    """)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_interrupts_anywhere_never_hang_close_or_leave_a_thread():
    """Ctrl-C hits calls and close() at random places; a handler that calls emu itself finds no lock held."""
    done = run_python("""
        import faulthandler, os, random, signal, time, emu
        faulthandler.dump_traceback_later(50, exit=True)
        rng = random.Random(5)
        hits = 0
        current = None
        def interrupt(number, frame):
            if current is not None and not current.closed:
                try:
                    current.stats()
                except emu.ClosedError:
                    pass
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        for round_ in range(300):
            thread = round_ % 2 and emu.uffd.probe().rung
            ram = current = emu.GuestRam("8MiB", service="thread" if thread else "auto")
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 4e-3))
                for _ in range(20):
                    ram.touch(0, 64)
                    ram.discard([(0, 64)])
                    ram.stats()
                ram.close()
                for _ in range(1000):  # not pause(): the signal may come just before it
                    time.sleep(0.01)
            except KeyboardInterrupt:
                hits += 1
            ram.close()
            current = None
        faulthandler.cancel_dump_traceback_later()  # it has a thread
        for _ in range(100):  # a joined thread's entry may outlive the join by a moment
            if len(os.listdir("/proc/self/task")) == 1:
                break
            time.sleep(0.01)
        print(hits > 280, len(os.listdir("/proc/self/task")))  # one that hits in a __del__ is swallowed by Python
    """)
    assert (done.returncode, done.stdout) == (0, "True 1\n"), (done.stdout, done.stderr)


@pytest.mark.parametrize("service", [pytest.param("inline", marks=pytest.mark.inline), "thread"])
@pytest.mark.uffd
def test_interrupts_while_opening_leave_nothing_behind(service):
    """Neither a region nor its thread; the next RAMs are served."""
    done = run_python(f"""
        import faulthandler, os, random, signal, time, emu
        faulthandler.dump_traceback_later(50, exit=True)
        rng = random.Random(7)
        def interrupt(number, frame):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        for round_ in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 6e-4))
                ram = emu.GuestRam("1MiB", service={service!r})
                time.sleep(1)
            except KeyboardInterrupt:
                pass
            ram = None
        faulthandler.cancel_dump_traceback_later()
        for _ in range(50):
            with emu.GuestRam("1MiB", service={service!r}) as ram:
                ram.touch(0, 256)
                assert ram.rss_bytes == ram.size
        for _ in range(100):
            if len(os.listdir("/proc/self/task")) == 1:
                break
            time.sleep(0.01)
        print(len(os.listdir("/proc/self/task")), emu._native.lib.emu_sigbus_is_ours())
    """)
    assert (done.returncode, done.stdout) == (0, "1 0\n"), (done.stdout, done.stderr[-2000:])


def test_a_child_forked_in_the_middle_of_a_guests_work_can_close():
    """The kernel lock's holder doesn't exist there."""
    done = run_python("""
        import faulthandler, os, threading, time, warnings, emu
        warnings.simplefilter("ignore")
        faulthandler.dump_traceback_later(40, exit=True)
        m = emu.Machine("1GiB", clock=emu.StepClock())
        memory = m.guest.spawn("a").mmap("512MiB")
        thread = threading.Thread(target=lambda: memory.fill(seed=1))
        thread.start()
        time.sleep(0.1)
        pid = os.fork()
        if not pid:
            try:
                m.guest
            except emu.ForkedError:
                m.close()
                os._exit(42)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        thread.join()
        print(code, memory.verify(seed=1))
        m.close()
    """)
    assert (done.returncode, done.stdout) == (0, "42 []\n"), (done.stdout, done.stderr)


def test_a_childs_close_of_its_parents_ram_unmaps_nothing_of_the_child():
    """And a RAM of the child's own is served in the child."""
    done = run_python("""
        import mmap, os, warnings, emu
        warnings.simplefilter("ignore")
        parent = emu.GuestRam("64MiB")
        parent.fill(0, 100, seed=1)
        pid = os.fork()
        if not pid:
            own = [mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(40)]
            rams = [emu.GuestRam("16MiB") for _ in range(8)]
            for ram in rams:
                ram.fill(0, 4096, seed=2)
                assert ram.rss_bytes == ram.size
            parent.close()
            del parent
            for memory in own:
                memory[::4096] = b"x" * len(memory[::4096])
            for ram in rams:
                assert ram.verify(0, 4096, seed=2) == []
                ram.discard([(0, 4096)])
                assert ram.rss_bytes == 0
                ram.close()
            os._exit(42)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, parent.verify(0, 100, seed=1), parent.rss_bytes // 4096)
    """)
    assert (done.returncode, done.stdout) == (0, "42 [] 100\n"), done.stderr


def test_a_process_that_locks_its_memory_is_told(monkeypatch):
    """mlockall(MCL_FUTURE) would populate the whole guest and keep it."""
    done = run_python("""
        import ctypes, emu
        if ctypes.CDLL(None).mlockall(2):  # MCL_FUTURE
            print("locks")
        else:
            try:
                emu.GuestRam("1MiB")
            except emu.HostError as error:
                print(str(error)[:18])
    """)
    assert done.stdout in ("this process locks\n", "locks\n"), done.stderr


def test_a_forked_child_is_refused_and_the_parent_goes_on(open_ram):
    """The child has neither memory nor service; its close() harms nobody."""
    ram = open_ram("1MiB")
    ram.fill(0, 10, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process with threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            ram.touch(0)
        except emu.ForkedError:
            try:
                ram.close()
                code = 42
            finally:
                os._exit(code)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert ram.verify(0, 10, seed=1) == []
    ram.touch(100)
    assert ram.rss_bytes == 11 * 4096


def test_an_unclosed_ram_warns_and_is_released():
    """The finaliser is a net."""
    ram = emu.GuestRam("1MiB")
    with pytest.warns(ResourceWarning, match="wasn't closed"):
        del ram
        gc.collect()


def counts():
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(Path("/proc/self/maps").read_text().splitlines()),
    )


def test_a_thousand_machines_leak_nothing():
    """No descriptor, thread or mapping, in either service."""

    def cycle(n):
        for i in range(n):
            with emu.Machine("8MiB", "reporting", clock=emu.StepClock(), service="auto" if i % 2 else SERVICE) as m:
                m.guest.spawn("p").mmap("64KiB").touch()
        gc.collect()

    SERVICE = "thread" if emu.uffd.probe().rung else "auto"
    cycle(20)
    before = counts()
    cycle(1000)
    for _ in range(100):  # a joined thread's entry may outlive the join by a moment
        after = counts()
        if after[1] == before[1]:
            break
        time.sleep(0.01)
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 2  # the allocator's own arenas


def test_a_terabyte_guest_boots_in_little_memory():
    """Under 64 MiB of process RSS; states and snapshots don't populate the tables."""
    done = run_python("""
        import psutil, emu
        with emu.Machine("1TiB", "reporting", clock=emu.StepClock()) as m:
            m.ram.touch(12345678, 10)
            m.snapshot()
            print(psutil.Process().memory_info().rss, m.rss_bytes, m.footprint_bytes - m.rss_bytes)
    """)
    assert done.returncode == 0, done.stderr
    rss, guest, tables = map(int, done.stdout.split())
    assert rss < 64 * MIB
    assert guest == 10 * 4096
    assert tables < MIB


def test_too_little_address_space_is_said_clearly():
    """RLIMIT_AS: one error that names it."""
    done = run_python("""
        import resource, emu
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            emu.GuestRam("1TiB")
        except emu.HostError as error:
            print(error)
    """)
    assert "RLIMIT_AS" in done.stdout, done.stderr


@pytest.mark.inline
def test_the_rungs_can_be_switched_off_one_by_one(monkeypatch):
    """EMU_DISABLE: each lower rung serves."""
    if emu.uffd.probe().rung == 0:
        pytest.skip("no userfaultfd here")
    for off, service in (
        ("", "inline"),
        ("full", "inline"),
        ("sigbus", "thread"),
        ("uffd", "off"),
        ("poison", "inline"),
    ):
        monkeypatch.setenv("EMU_DISABLE", off)
        with emu.GuestRam("1MiB") as ram:
            assert ram.service == service
            if off == "full":
                assert ram.rung is emu.uffd.Rung.USER
            ram.touch(0, 256)
            assert ram.rss_bytes == MIB
    monkeypatch.setenv("EMU_DISABLE", "uffd")
    with pytest.raises(HostError, match="switched off"):
        emu.GuestRam("1MiB", uffd="full")
    with pytest.raises(HostError, match="service=inline"):
        monkeypatch.setenv("EMU_DISABLE", "sigbus")
        emu.GuestRam("1MiB", service="inline")


@pytest.mark.parametrize("how", ["undumpable", "switched off"])
def test_without_pagemap_frames_leave_by_the_other_way(how):
    """Where /proc/self/pagemap can't be read, nothing is moved (csrc/move.c): write protection and a copy, instead."""
    if emu.uffd.Features.PAGEFAULT_FLAG_WP not in emu.uffd.probe().features:
        pytest.skip("no userfaultfd with write protection here")
    if how == "undumpable" and os.geteuid() != 0:
        pytest.skip("only root can become another user, for whom /proc is closed")
    done = run_python(f"""
        import ctypes, os
        import emu
        off = "pagemap"
        if {how == "undumpable"}:
            off = ""
            os.setresuid(65534, 65534, 65534)
            assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
            assert not emu.residency.has_pagemap()
        with emu.GuestRam("1MiB", disable=off) as ram:
            ram.fill(0, 256, seed=1)
            print(ram.aside_how, ram.set_aside([(0, 256)]), ram.stats()["nr_aside"], ram.mincore_bytes())
            print(ram.verify(0, 256, seed=1), ram.stats()["aside_return"])
            try:
                emu.GuestRam("1MiB", disable=off, write_tracking=True)
            except emu.HostError as error:
                print(error)
    """)
    assert done.stdout.splitlines() == [
        "wp 256 256 0",
        "[] 256",
        "write_tracking needs /proc/self/pagemap, which can't be read here",
    ], done.stderr


def test_the_stub_of_a_thread_service_without_poison_still_never_reads_zeros():
    """EMU_DISABLE=poison: a lost frame is inaccessible."""
    if emu.uffd.probe().rung == 0:
        pytest.skip("no userfaultfd here")
    done = run_python("""
        import emu
        with emu.GuestRam("1MiB", service="thread", disable="poison") as ram:
            ram.fill(0, 4, seed=1)
            ram.poison([(2, 1)])
            try:
                ram.read(2 * 4096, 1)
            except emu.GuestMemoryError as error:
                print(error.gfn, ram.rss_bytes // 4096, flush=True)
            ram.unpoison([(2, 1)])
            print(ram.read(2 * 4096, 1), flush=True)
            ram.poison([(2, 1)])
            ram.unsafe_view()[2 * 4096]
    """)
    assert done.stdout.splitlines() == ["2 3", "b'\\x00'"]
    assert done.returncode in (-11, 139), "a raw access must die, not read zeros"


@pytest.mark.storm
def test_a_long_storm_of_python_threads(open_ram):
    """Owners fill, verify and give back their own frames while others discard theirs."""
    ram = open_ram("64MiB")
    wrong = []

    def owner(index):
        rng = random.Random(index)
        base = index * 4096
        for round_ in range(60):
            ram.fill(base, 4096, seed=round_)
            if ram.verify(base, 4096, seed=round_):
                wrong.append((index, round_))
            gone = sorted(rng.sample(range(4096), 1000))
            ram.discard([(base + gfn, 1) for gfn in gone])
            if ram.verify(base, 4096, seed=round_) != [base + gfn for gfn in gone]:
                wrong.append((index, round_, "after"))

    threads = [threading.Thread(target=owner, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert ram.rss_bytes == ram.stats()["nr_resident"] * 4096
