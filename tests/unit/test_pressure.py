"""What the kernel says of memory: limits above a process, in trees as cgroup v1 and v2 have them, and stalls."""

import os
from pathlib import Path

import pytest

from emu.errors import BadValue, HostError
from emu.fleet import read_fleet
from emu.host.budget import Limits
from emu.host.cgroup import MemoryLimit, memory_limits, room_bytes
from emu.host.mounts import IN_MEMORY, filesystem
from emu.host.pressure import stall_percent

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path):
    """Files as a kernel has them: write(folder, {name: text}), and what memory_limits() says of lines of both kinds."""
    mount = tmp_path / "with space"

    class Tree:
        root = mount
        mounts = (f"31 23 0:28 / {tmp_path} rw - tmpfs tmpfs rw",)

        @staticmethod
        def write(path, **files):
            path.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (path / f"memory.{name}").write_text(f"{text}\n")

        def limits(self, *lines, at="/", kind="cgroup2", options="rw"):
            place = str(mount).replace(" ", "\\040")
            mounts = (*self.mounts, f"32 31 0:29 {at} {place} rw,relatime shared:9 - {kind} none {options}")
            (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
            (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
            return memory_limits(tmp_path / "cgroup", tmp_path / "mountinfo")

    return Tree()


def test_v2(tree):
    """The tightest of all folders up to the root; "max" is no limit; above memory.high nothing runs well."""
    user, own = tree.root / "user", tree.root / "user" / "emu"
    tree.write(tree.root, current=900 * MIB)
    tree.write(user, max=640 * MIB, high="max", current=500 * MIB, stat="anon 1\nfile 2")
    tree.write(own, max="max", current=300 * MIB, stat="inactive_file 5")
    (limit,) = tree.limits("0::/user/emu")
    assert (limit.folder, limit.limit, limit.used) == (user, 640 * MIB, 500 * MIB)
    assert room_bytes((limit,)) == (640 - 10 - 500) * MIB
    tree.write(own, max=320 * MIB)
    first, above = tree.limits("0::/user/emu")
    assert (first.limit, first.used) == (320 * MIB, 300 * MIB)
    assert room_bytes((first, above)) == (320 - 5 - 300) * MIB
    assert room_bytes((first, above), 20 * MIB) == (320 - 5 - 20 - 300) * MIB
    tree.write(own, high=64 * MIB)
    assert tree.limits("0::/user/emu")[0].limit == 64 * MIB
    tree.write(own, max="max")
    assert tree.limits("0::/user/emu")[0].limit == 64 * MIB


def test_inactive_cache_isnt_used_but_lazily_freed_memory_is(tree):
    """inactive_file has both in it, and `file` has files in memory, too: no more is taken off than is page cache."""
    tree.write(tree.root, max=640 * MIB, current=500 * MIB, stat=f"inactive_file {300 * MIB}\nfile {90 * MIB}")
    assert tree.limits("0::/")[0].used == 410 * MIB
    tree.write(tree.root, stat=f"file {90 * MIB}\nshmem {60 * MIB}\ninactive_file {300 * MIB}")
    assert tree.limits("0::/")[0].used == 470 * MIB
    tree.write(tree.root, stat=f"file {90 * MIB}\nshmem {91 * MIB}\ninactive_file {300 * MIB}")
    assert tree.limits("0::/")[0].used == 500 * MIB
    tree.write(tree.root, stat=f"file {90 * MIB}\nshmem 0\ninactive_file {20 * MIB}")
    assert tree.limits("0::/")[0].used == 480 * MIB


def test_v1(tree):
    """The memory controller has its own tree, and "no limit" is a number; over a limit there is less than no room."""
    lines = ("4:cpu,memory:/a", "3:cpuset:/b", "0::/")
    tree.write(tree.root, limit_in_bytes=9223372036854771712, usage_in_bytes=5)
    stat = f"inactive_file 7\ntotal_inactive_file {9 * MIB}\ntotal_cache {6 * MIB}\ntotal_shmem {MIB}"
    tree.write(tree.root / "a", limit_in_bytes=64 * MIB, usage_in_bytes=80 * MIB, stat=stat)
    (limit,) = tree.limits(*lines, kind="cgroup", options="rw,cpu,memory")
    assert (limit.limit, limit.used) == (64 * MIB, 75 * MIB)
    assert room_bytes((limit,)) == (64 - 1 - 75) * MIB
    assert tree.limits(*lines, kind="cgroup", options="rw,cpuset") == ()


def test_a_mount_that_begins_further_down(tree):
    """A container's: what is above can't be seen; nor can a folder beside it, or one outside of the namespace."""
    tree.write(tree.root, max=64 * MIB, current=1)
    tree.write(tree.root / "b", max=32 * MIB, current=1)
    assert [limit.limit for limit in tree.limits("0::/pod/b", at="/pod")] == [32 * MIB, 64 * MIB]
    assert [limit.limit for limit in tree.limits("0::/pod", at="/pod")] == [64 * MIB]
    assert [limit.limit for limit in tree.limits("0::/../b", at="/..")] == [32 * MIB, 64 * MIB]
    for path, at in (("/pods/b", "/pod"), ("/../b", "/"), ("/b", "/pod")):
        assert tree.limits(f"0::{path}", at=at) == ()


def test_a_usage_that_cant_be_read_isnt_none(tree):
    tree.write(tree.root, max=64 * MIB)
    with pytest.raises(HostError, match=r"memory\.current"):
        tree.limits("0::/")


def test_where_files_are(tmp_path):
    """By name and open; what is in memory is told from a disk."""
    assert filesystem("/proc") == "proc"
    with open("/proc/self/status") as file:
        assert filesystem(file.fileno()) == "proc"
    if os.path.ismount("/dev/shm"):
        assert filesystem("/dev/shm") in IN_MEMORY
    with pytest.raises(OSError, match="nowhere"):
        filesystem(tmp_path / "nowhere")


def test_none(tmp_path, monkeypatch):
    """Without limits nothing is left to obey, and a fleet that is to obey them is refused."""
    assert memory_limits(tmp_path / "missing", tmp_path) == ()
    assert room_bytes(()) is None
    monkeypatch.setattr("emu.fleet.scenario.memory_limits", lambda: ())
    guests = [{"name": "vm", "ram": "128MiB", "args": {"size": "1MiB"}}]
    with pytest.raises(BadValue, match="no memory limit is seen above this process"):
        read_fleet({"fleet": {"max": "1GiB", "cgroup": True}, "guest": guests})


def test_a_store_in_memory_isnt_one_below_a_limit(monkeypatch):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no /dev/shm here")
    limit = MemoryLimit(Path("/nowhere"), 1 << 30, 0)
    monkeypatch.setattr("emu.fleet.scenario.memory_limits", lambda: (limit,))
    table = {"max": "1GiB", "cgroup": True}
    for of_fleet, of_guest in (({"store": "/dev/shm"}, {}), ({}, {"mechanism": "swap:file=/dev/shm"})):
        guests = [{"name": "vm", "ram": "128MiB", "args": {"size": "1MiB"}, **of_guest}]
        with pytest.raises(BadValue, match="'/dev/shm' is memory"):
            read_fleet({"fleet": table | of_fleet, "guest": guests})


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
