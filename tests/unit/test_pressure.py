"""What the kernel says of memory: limits above a process, in trees as cgroup v1 and v2 have them, and stalls."""

import pytest

from emu.errors import BadValue, HostError
from emu.fleet import read_fleet
from emu.host.budget import Limits
from emu.host.cgroup import memory_limits, room_bytes
from emu.host.pressure import stall_percent

MIB = 1 << 20


def folder(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(f"{text}\n")


def test_v2(tmp_path):
    """The tightest of all folders up to the root; inactive cache isn't used; "max" is no limit."""
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"
    proc.write_text("0::/user/emu\n")
    folder(mount, memory__current=900 * MIB)
    folder(mount / "user", memory__max=640 * MIB, memory__current=500 * MIB, memory__stat="anon 1\nfile 2")
    folder(mount / "user" / "emu", memory__max="max", memory__current=300 * MIB, memory__stat="inactive_file 5")
    (limit,) = memory_limits(proc, mount)
    assert (limit.folder, limit.limit, limit.used) == (mount / "user", 640 * MIB, 500 * MIB)
    assert room_bytes((limit,)) == (640 - 10 - 500) * MIB
    folder(mount / "user" / "emu", memory__max=320 * MIB, memory__stat=f"anon 7\ninactive_file {40 * MIB}\n")
    own, above = memory_limits(proc, mount)
    assert (own.limit, own.used) == (320 * MIB, 260 * MIB)
    assert room_bytes((own, above)) == (320 - 5 - 260) * MIB


def test_v1(tmp_path):
    """The memory controller has its own tree, and "no limit" is a number; over a limit there is less than no room."""
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"
    proc.write_text("4:cpu,memory:/a\n3:cpuset:/b\n0::/\n")
    folder(mount / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    folder(mount / "memory" / "a", memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=80 * MIB)
    (limit,) = memory_limits(proc, mount)
    assert (limit.limit, limit.used) == (64 * MIB, 80 * MIB)
    assert room_bytes((limit,)) == (64 - 1 - 80) * MIB


def test_none(tmp_path, monkeypatch):
    """Without limits nothing is left to obey, and a fleet that is to obey them is refused."""
    assert memory_limits(tmp_path / "missing", tmp_path) == ()
    assert room_bytes(()) is None
    monkeypatch.setattr("emu.fleet.scenario.memory_limits", lambda: ())
    guests = [{"name": "vm", "ram": "128MiB", "args": {"size": "1MiB"}}]
    with pytest.raises(BadValue, match="no memory limit is set above this process"):
        read_fleet({"fleet": {"max": "1GiB", "cgroup": True}, "guest": guests})


def test_limits_within():
    """Low and high keep their shares of max."""
    limits = Limits(400, 500, 1000)
    assert limits.within(1000) is limits
    assert limits.within(2000) is limits
    assert limits.within(500) == Limits(200, 250, 500)
    assert limits.within(1) == Limits(1, 1, 1)


def test_stalls(tmp_path):
    """The short average of some tasks; a file that isn't there, or something else, is an error that names it."""
    psi = tmp_path / "memory.pressure"
    psi.write_text("some avg10=12.50 avg60=3.00 avg300=1.00 total=99\nfull avg10=8.00 avg60=0.00 avg300=0.00 total=9\n")
    assert stall_percent(psi) == 12.5
    with pytest.raises(HostError, match="nowhere"):
        stall_percent(tmp_path / "nowhere")
    for text in ("", "full avg10=1.0", "some avg10=x", "some"):
        psi.write_text(text)
        with pytest.raises(HostError, match="isn't a PSI file"):
            stall_percent(psi)


def test_a_fleet_with_stalls(tmp_path):
    """A fleet reads the file when it is made, and wants to know what stall is too much."""
    psi = tmp_path / "memory.pressure"
    psi.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    guests = [{"name": "vm", "ram": "128MiB", "args": {"size": "1MiB"}}]
    for table, says in (
        ({"psi_low": 1.0}, "need psi"),
        ({"psi": str(psi)}, "psi_low or psi_high"),
        ({"psi": str(tmp_path / "nowhere"), "psi_low": 1.0}, "nowhere"),
    ):
        with pytest.raises(BadValue, match=says):
            read_fleet({"fleet": {"max": "1GiB", **table}, "guest": [dict(g) for g in guests]})
    assert read_fleet({"fleet": {"max": "1GiB", "psi": str(psi), "psi_low": 1.0}, "guest": guests}).psi == str(psi)
