"""Fleets of real processes: under one budget, with guests that fail in every way, and a host that is killed."""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from emu.errors import BadValue
from emu.fleet import read_fleet, run_fleet
from emu.fleet.wire import Hello, encode

MIB = 1 << 20
pytestmark = [pytest.mark.uffd, pytest.mark.inline]


def fleet(tmp_path, guests=None, **settings):
    table = {"max": "200MiB", "speed": 10, "store": str(tmp_path), "timeout": "60s"} | settings
    return {"fleet": table, "guest": guests or [guest(count=4)]}


def guest(**settings):
    return {
        "name": "vm",
        "ram": "128MiB",
        "mechanism": "reporting",
        "workload": "memhog",
        "args": {"size": "96MiB", "rounds": 1, "hold": "1s"},
        "start": "in turn",
    } | settings


def children():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert [p.cmdline() for p in children() if "emu.fleet.guest" in p.cmdline()] == []
    assert [name for name in os.listdir(tmp_path) if name.startswith("emu-")] == []
    assert set(os.listdir("/dev/shm")) <= before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_overcommit_in_turn(tmp_path):
    """Four guests of which two fit.

    Reporting needs no swap; a guest that gives nothing back is swapped; all is right.
    """
    given = run_fleet(read_fleet(fleet(tmp_path)))
    assert given.ok
    assert given.swap_bytes == 0
    kept = run_fleet(read_fleet(fleet(tmp_path, [guest(count=4, mechanism="none")])))
    assert kept.ok
    assert kept.swap_bytes > 150 * MIB
    for result in (given, kept):
        assert sum(g.verified_frames for g in result.guests) == 4 * 96 * MIB // 4096
        assert result.peak_charged_bytes <= 200 * MIB + 2 * MIB * 4
    assert kept.asked["swap"] > 0
    assert kept.first["swap"] > 0


def test_the_kernel_agrees_that_max_was_kept(tmp_path):
    """All guests are stopped at once, and their memory added up by the kernel: a sum that no instant belies."""
    stop, seen = threading.Event(), []

    def look():
        while not stop.wait(0.05):
            guests = [p for p in children() if "emu.fleet.guest" in p.cmdline()]
            with contextlib.suppress(psutil.Error, OSError):
                for p in guests:
                    p.suspend()
                seen.append(sum(ram_rss(p.pid) for p in guests))
            for p in guests:
                with contextlib.suppress(psutil.Error):
                    p.resume()

    def ram_rss(pid):
        # the mappings that can hold a guest's RAM: its own and the side's, of 128 MiB and more
        total = size = 0
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if line.startswith("Size:"):
                size = int(line.split()[1])
            elif line.startswith("Rss:") and size == 128 * 1024:
                total += int(line.split()[1]) * 1024
        return total

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = run_fleet(read_fleet(fleet(tmp_path, [guest(count=3, mechanism="none", start="0s")])))
    finally:
        stop.set()
        watcher.join()
    assert result.ok
    assert len(seen) > 10
    assert 150 * MIB < max(seen) <= 200 * MIB + 3 * 2 * MIB


def test_the_lines_of_defence_come_in_order(tmp_path):
    (tmp_path / "tree").mkdir()
    for i in range(24):
        (tmp_path / "tree" / f"f{i}").write_bytes(random.Random(i).randbytes(4 * MIB))
    cached = guest(
        name="c", count=2, mechanism="epoch", workload="cache", start="0s",
        args={"path": str(tmp_path / "tree"), "hold": "20s", "memory": "16MiB"},
    )  # fmt: skip
    hog = guest(name="hog", mechanism="none", start="4s", args={"size": "112MiB", "rounds": 1, "hold": "20s"})
    result = run_fleet(read_fleet(fleet(tmp_path, [cached, hog], max="220MiB", oldest="4s", step="8MiB")))
    assert result.ok, [(g.name, g.state, g.detail) for g in result.guests]
    assert result.asked["epoch"] > 0
    assert result.freed["epoch"] > 0
    first = result.first
    assert first["epoch"] < min(first.get("purge", 1e9), first.get("swap", 1e9))
    assert first.get("purge", 0) < first.get("swap", 1e9)


def test_stealing_across_guests_goes_by_age_and_before_any_swap(tmp_path):
    """Of two guests full of cache the one that doesn't use it pays for a third that needs memory; nobody is swapped."""
    (tmp_path / "tree").mkdir()
    for i in range(20):
        (tmp_path / "tree" / f"f{i}").write_bytes(random.Random(i).randbytes(4 * MIB))

    def cached(name, working_set):
        args = {
            "path": str(tmp_path / "tree"),
            "hold": "60s",
            "memory": "16MiB",
            "working_set": working_set,
            "every": "2s",
        }
        return guest(name=name, mechanism="cmm2:scan=1s", workload="cache", start="0s", args=args)

    hog = guest(name="hog", mechanism="cmm2", start="5s", args={"size": "96MiB", "rounds": 1, "hold": "30s"})
    guests = [cached("idle", 0), cached("busy", 1.0), hog]
    result = run_fleet(read_fleet(fleet(tmp_path, guests, max="260MiB", step="16MiB")))
    assert result.ok, [(g.name, g.state, g.detail) for g in result.guests]
    idle, busy, _ = result.guests
    assert idle.corrupt_frames == busy.corrupt_frames == 0
    assert result.asked["steal"] > 0
    assert result.freed["steal"] >= 20 * MIB
    assert idle.stolen_bytes > 2 * busy.stolen_bytes
    assert result.swap_bytes == 0
    assert result.peak_charged_bytes <= 260 * MIB + 2 * MIB * 3
    assert "purge" not in result.first


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_guest_that_dies_or_hangs_is_its_own_loss(tmp_path, how):
    """Its memory goes back to the budget, the others end well, and the report says so."""
    done = threading.Event()

    def harm():
        while not done.wait(0.2):
            victims = [p for p in children() if "emu.fleet.guest" in p.cmdline()]
            for p in victims:
                if ram_name(p) == "bad" and p.memory_info().rss > 90 * MIB:
                    p.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                    return

    def ram_name(p):
        # the second of the two: started last
        return "bad" if p.pid == max(q.pid for q in children() if "emu.fleet.guest" in q.cmdline()) else "good"

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        guests = [
            guest(name="good", start="0s", args={"size": "64MiB", "rounds": 12, "hold": "3s"}),
            guest(name="bad", start="0s", args={"size": "96MiB", "rounds": 40, "hold": "20s"}),
        ]
        result = run_fleet(read_fleet(fleet(tmp_path, guests, silence="2s")))
    finally:
        done.set()
        thread.join()
    good, bad = result.guests
    assert good.state == "ok"
    assert good.verified_frames == 12 * 64 * MIB // 4096
    assert bad.state == ("killed" if how == "kill" else "silent")
    assert bad.returned_bytes > 20 * MIB  # wherever in its filling it was
    assert result.samples[-1].charged < 80 * MIB
    assert not result.ok


class Fake:
    """A guest's process that isn't one: speaks, or doesn't, as a test wants."""

    SCRIPT = """
import json, socket, sys, os, time
told = json.loads(sys.stdin.readline())
sys.path.insert(0, {path!r})
from emu.fleet.wire import *
s = socket.socket(socket.AF_UNIX); s.connect(f"/proc/self/fd/{{told['socket']}}")
n = 0
def send(m):
    global n; n += 1; s.sendall(encode(m, n))
send(Hello(name=told["name"], token=told["token"], pid=os.getpid(), can=["epoch", "purge", "swap"]))
status = {{k: 0 for k in Status.model_fields if k not in ("type", "t")}} | {{"stealable": []}}
{body}
"""


def with_fake(monkeypatch, body, tmp_path, **settings):
    real = subprocess.Popen
    root = str(Path(__file__).resolve().parents[2])
    script = Fake.SCRIPT.format(path=root, body=body)

    def popen(command, **kwargs):
        popen.count += 1
        return real([sys.executable, "-c", script] if popen.count == 2 else command, **kwargs)

    popen.count = 0
    monkeypatch.setattr("emu.fleet.host.subprocess.Popen", popen)
    guests = [
        guest(name="good", start="0s", args={"size": "64MiB", "rounds": 3, "hold": "3s"}),
        guest(name="bad", start="0s"),
    ]
    result = run_fleet(read_fleet(fleet(tmp_path, guests, silence="2s", timeout="30s", **settings)))
    good, bad = result.guests
    assert good.state == "ok"
    assert good.verified_frames == 3 * 64 * MIB // 4096
    return result, bad


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("time.sleep(60)", "silent"),
        ("s.sendall(b'rubbish' * 1000); time.sleep(60)", "refused"),
        ("m = encode(Row(name='x', t=1.0), 2); s.sendall(m + m); time.sleep(60)", "refused"),
        ("s.sendall(b'\\xff\\xff\\xff\\xff'); time.sleep(60)", "refused"),
        ("send(Answer(ask=77, freed=1 << 40)); time.sleep(60)", "refused"),
        ("send(Stop()); time.sleep(60)", "refused"),
        (
            "done = Done(verified=0, corrupt=0, result=None, error='x'); send(done); send(done); time.sleep(60)",
            "failed",
        ),
        ("send(Done.model_construct(verified='abc', corrupt=[1])); time.sleep(60)", "refused"),
        ("os._exit(7)", "killed"),
        ("s.close(); time.sleep(60)", "silent"),
    ],
)
def test_a_guest_that_misbehaves(monkeypatch, tmp_path, body, state):
    _, bad = with_fake(monkeypatch, body, tmp_path)
    assert bad.state == state, bad.detail


def test_a_guest_that_floods_waits_in_its_own_socket(monkeypatch, tmp_path):
    body = "i = 0\nwhile True:\n    send(Status(t=1.0, **status)); i += 1"
    result, bad = with_fake(monkeypatch, body, tmp_path)
    assert bad.state == "silent"  # at the fleet's timeout
    ticks = len(result.samples)
    assert bad.believed.samples <= 64 * (ticks + 60)


def test_a_guest_that_lies_is_seen_through(monkeypatch, tmp_path):
    """What it claims isn't what decides: others aren't asked for memory because of it."""
    body = (
        "status.update(rss=1 << 50, used=1 << 40)\n"
        "for _ in range(40):\n    send(Status(t=1.0, **status)); time.sleep(0.05)\n"
        "send(Done(verified=0, corrupt=0, result=None, error=None)); time.sleep(60)"
    )
    result, bad = with_fake(monkeypatch, body, tmp_path)
    assert bad.lies >= 30
    assert sum(result.asked.values()) == 0
    assert result.peak_charged_bytes < 100 * MIB


def test_strangers_are_refused(tmp_path, monkeypatch):
    """The socket is 0600; who comes without a guest's token, or from another process, is sent away."""
    seen = {}
    from emu.fleet import host

    real = host._listen

    def listen():
        listener, place = real()
        seen["mode"] = os.stat(f"/proc/self/fd/{place}").st_mode & 0o777

        def stranger():
            time.sleep(0.5)
            for data in (b"", b"\0" * 100, encode(Hello(name="vm-1", token="0" * 32, pid=1, can=[]), 1)):
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(f"/proc/self/fd/{place}")
                    s.sendall(data)
                    s.settimeout(5)
                    with contextlib.suppress(ConnectionError):
                        if data:
                            seen["answer"] = s.recv(10)

        threading.Thread(target=stranger).start()
        return listener, place

    monkeypatch.setattr(host, "_listen", listen)
    result = run_fleet(read_fleet(fleet(tmp_path, [guest(args={"size": "64MiB", "rounds": 3, "hold": "3s"})])))
    assert result.ok
    assert seen["mode"] == 0o600
    assert seen.get("answer", b"") == b""
    assert result.refused_peers == 3


def test_another_users_peer_is_refused(monkeypatch):
    from emu.fleet import host

    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        pid, uid = host._peer(a)
        assert (pid, uid) == (os.getpid(), os.getuid())
        packed = struct.pack("3i", 1, os.getuid() + 1, 1)

        class Other:
            def getsockopt(self, *_):
                return packed

        assert host._peer(Other())[1] != os.getuid()


def command(path):
    return [sys.executable, "-m", "emu", "run", str(path), "--json"]


def write_toml(tmp_path, most='"200MiB"', mechanism="none", on_return="now", rounds=3):
    path = tmp_path / "fleet.toml"
    path.write_text(
        f'[fleet]\nmax = {most}\nspeed = 10\nstore = "{tmp_path}"\n'
        f'[[guest]]\nname = "vm"\ncount = 3\nram = "128MiB"\nmechanism = "{mechanism}"\nworkload = "memhog"\n'
        f'on_return = "{on_return}"\nargs = {{size = "96MiB", rounds = {rounds}, hold = "1s"}}\n'
    )
    return path


def processes_of(group):
    found = []
    for p in psutil.process_iter(["pid"]):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p.pid)
    return found


def kill_the_host_at(tmp_path, moment):
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    process = subprocess.Popen(
        command(write_toml(tmp_path)), stdout=subprocess.DEVNULL, start_new_session=True, env=env
    )
    time.sleep(moment)
    process.kill()
    process.wait()
    end = time.monotonic() + 2
    while (left := processes_of(process.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    assert left == [], f"killed after {moment:.3f} s"
    assert [name for name in os.listdir(tmp_path) if name != "fleet.toml"] == []


def test_a_host_that_is_killed_leaves_nothing(tmp_path):
    rng = random.Random(5)
    for _ in range(6):
        kill_the_host_at(tmp_path, rng.uniform(0.05, 3.5))


@pytest.mark.storm
@pytest.mark.parametrize("part", range(20))
def test_a_host_that_is_killed_leaves_nothing_200_times(tmp_path, part):
    rng = random.Random(600 + part)
    for _ in range(10):
        kill_the_host_at(tmp_path, rng.uniform(0.02, 4.0))


def kill_a_guest_at(tmp_path, rng, moment):
    """One of three, so long after the first has a process. Returns whether it was hit: it may be done by then."""
    killed = []

    def harm():
        while not (guests := [p for p in children() if "emu.fleet.guest" in p.cmdline()]):
            time.sleep(0.01)
        time.sleep(moment)
        guests = [p for p in children() if "emu.fleet.guest" in p.cmdline()]
        if guests:
            rng.choice(guests).kill()
            killed.append(time.monotonic() - started)

    args = {"size": "96MiB", "rounds": 4, "hold": "1s"}
    guests = [guest(count=3, mechanism=rng.choice(["none", "reporting"]), start="0s", args=args)]
    started = time.monotonic()
    thread = threading.Thread(target=harm)
    thread.start()
    result = run_fleet(read_fleet(fleet(tmp_path, guests, silence="5s")))
    thread.join()
    states = sorted(g.state for g in result.guests)
    assert states in (["ok"] * 3, ["killed", "ok", "ok"]), (moment, states, [g.detail for g in result.guests])
    assert not any(g.corrupt_frames for g in result.guests)
    for dead in (g for g in result.guests if g.state == "killed"):
        assert dead.ended < killed[0] + 2, f"{dead.ended - killed[0]:.1f} s until the host knew"
    return "killed" in states


@pytest.mark.storm
@pytest.mark.parametrize("part", range(25))
def test_a_guest_that_is_killed_200_times(tmp_path, part):
    rng = random.Random(700 + part)
    hit = [kill_a_guest_at(tmp_path, rng, rng.uniform(0.0, 2.0)) for _ in range(8)]
    assert sum(hit) >= 4


@contextlib.contextmanager
def cgroup(limit):
    """A real one below this process's own, with a memory limit: (its folder, what moves a process there)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            place, name = Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            place, name = Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"
        else:
            continue
        own = place / f"emu-test-{os.getpid()}"
        try:
            own.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup of our own: {error}")
        try:
            (own / name).write_text(str(limit))
        except OSError as error:
            own.rmdir()
            pytest.skip(f"no memory limit for a cgroup of our own: {error}")
        try:
            yield own
        finally:
            own.rmdir()
        return
    pytest.skip("no cgroup has a memory controller here")


@pytest.mark.parametrize(
    ("mechanism", "on_return", "rounds"), [("none", "now", 3), ("reporting", "lazy", 3), ("reporting", "lazy:aside", 3)]
)
def test_a_fleet_stays_below_its_cgroups_limit(tmp_path, mechanism, on_return, rounds):
    """Three guests of 96 MiB with a budget of 1 GiB, in a cgroup of 280 MiB, processes and all: nobody is killed.

    Lazily freed memory is no room: memory.stat has it among the inactive cache.
    """
    path = write_toml(tmp_path, '"1GiB"\ncgroup = true', mechanism, on_return, rounds)
    with cgroup(280 * MIB) as own:
        procs = str(own / "cgroup.procs")
        script = 'echo $$ > "$0"; exec "$@"'
        done = subprocess.run(["sh", "-c", script, procs, *command(path)], capture_output=True, text=True, timeout=90,
                              check=False)  # fmt: skip
        most = [int(own.joinpath(name).read_text())
                for name in ("memory.peak", "memory.max_usage_in_bytes") if own.joinpath(name).exists()]  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["swap_bytes"] > 0 or mechanism != "none"
    assert 0 < result["least_max_bytes"] < 280 * MIB
    assert result["peak_charged_bytes"] < 280 * MIB
    assert all(used < 280 * MIB for used in most)  # memory.peak: Linux 5.19


def test_the_command_line(tmp_path):
    done = subprocess.run(command(write_toml(tmp_path)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "emu.fleet/1"
    assert result["ok"]
    assert [g["state"] for g in result["guests"]] == ["ok"] * 3
    assert result["guests"][0]["result"]["verified_frames"] == 3 * 96 * MIB // 4096
    table = subprocess.run([*command(tmp_path / "fleet.toml")[:-1], "-m", "reporting"], capture_output=True, text=True,
                           timeout=60, check=False)  # fmt: skip
    assert table.returncode == 0, table.stderr
    assert "vm-3" in table.stdout
    assert "most charged at once" in table.stdout
    assert "again: " in table.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no [[guest]]"),
        ("[fleet]\nmax = 5\n", "no [[guest]]"),
        ("x = ", "isn't TOML"),
        ("[other]\n", "'other' isn't known"),
        ('[fleet]\n[[guest]]\nname="a"\nram="1GiB"\n', "max"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\n', "ram"),
        ('[fleet]\nmax="1GiB"\nlow="2GiB"\n[[guest]]\nname="a"\nram="1GiB"\n', "ascend"),
        ('[fleet]\nmax="1GiB"\norder="x@y"\n[[guest]]\nname="a"\nram="1GiB"\n', "line of defence"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nmechanism="magic"\n', "magic"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nworkload="x"\n', "workload 'x'"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nargs={sise="1GiB"}\n', "no 'sise'"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\n', "one name"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\ncount=65\nram="1GiB"\n', "64"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a b"\nram="1GiB"\n', "name"),
        ('[fleet]\nmax="1GiB"\nlowe=1\n[[guest]]\nname="a"\nram="1GiB"\n', "'lowe' isn't known: max, low, high"),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nbegin=1\n', "'begin' isn't known: name, ram"),
        ('[fleet]\nmax="1GiB"\nspread="yes"\n[[guest]]\nname="a"\nram="1GiB"\n', "spread = 'yes'"),
        ('[fleet]\nmax="1GiB"\npsi_low=500\n[[guest]]\nname="a"\nram="1GiB"\n', "psi_low = 500"),
        ('[fleet]\nmax="1GiB"\ntimeout="0s"\n[[guest]]\nname="a"\nram="1GiB"\n', "timeout"),
        ('[fleet]\nmax="1GiB"\nstore=""\n[[guest]]\nname="a"\nram="1GiB"\n', "store ''"),
        (
            '[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nworkload="cache"\n',
            "guest 'a': workload cache needs 'path'",
        ),
        ('[fleet]\nmax="1GiB"\n[[guest]]\nname="a"\nram="1GiB"\nargs={rounds="many"}\n', "rounds 'many'"),
    ],
)
def test_fleets_that_cant_be(tmp_path, text, says):
    path = tmp_path / "f.toml"
    path.write_text(text)
    with pytest.raises(BadValue) as caught:
        read_fleet(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
