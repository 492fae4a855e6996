"""Page cache: what goes wrong at the same time as something else. Each of these lost bytes or frames, or crashed,
once."""

import errno
import os
import resource

import pytest

from emu.clock import StepClock
from emu.errors import GuestIOError, OomKilled
from emu.guest.kernel import GuestKernel
from emu.guest.page import Lru, Owner
from emu.host.disk import DirectoryDisk
from emu.testing import BytesMemory, MemoryDisk

PAGE = 4096
MIB = 1 << 20


def boot(disk, ram="16MiB"):
    kernel = GuestKernel(BytesMemory(ram), StepClock(), thp="never")
    kernel.mount(disk)
    return kernel


def every_frame_is_accounted_for(kernel):
    owned = sum(kernel.memmap.count(owner) for owner in Owner if owner is not Owner.FREE)
    assert owned * PAGE + kernel.free_bytes + kernel.pcp_bytes == kernel.ram_bytes


def pin(kernel, left):
    """Take memory that nothing can take back, until only so many bytes are free above the watermarks."""
    keeper = kernel.spawn("keeper")
    keeper.oom_score_adj = -1000
    size = (kernel.free_bytes - kernel.totalreserve_pages * PAGE - left) // PAGE * PAGE
    keeper.mmap(size).touch()


@pytest.mark.parametrize("keep_open", [False, True])
@pytest.mark.parametrize("access", ["read", "write", "shared"])
def test_a_process_that_is_killed_in_its_own_file_fault(keep_open, access):
    """The call raises OomKilled; nothing of it stays mapped; and a file that nobody else has is let go of."""
    kernel = boot(MemoryDisk({"f": bytes(8 * MIB)}))
    file = kernel.open("f", "r+")
    process = kernel.spawn("a")
    anon = process.mmap("2MiB")
    anon.touch()
    mapping = process.mmap(8 * MIB, file=file, shared=access == "shared")
    if not keep_open:
        file.close()
    pin(kernel, 0)
    # nothing of the cache can be reclaimed while it is locked: so somebody must die
    real = kernel.reclaim.direct
    kernel.reclaim.direct = kernel.reclaim.kswapd = lambda: False
    with pytest.raises(OomKilled):
        mapping.touch(write=access != "read")
    kernel.reclaim.direct = real
    assert process.rss_bytes == 0
    assert kernel.memmap.stats.nr_mapped == 0
    every_frame_is_accounted_for(kernel)
    if keep_open:
        assert file.read(0, 10) == bytes(10)
        file.close()
    kernel.sync()
    kernel.drop_caches(3)
    assert kernel.cached_bytes == 0
    assert kernel.vfs.inodes == {}


def test_a_process_that_is_killed_while_a_file_in_memory_grows():
    kernel = boot(MemoryDisk())
    file = kernel.create_file("8MiB")
    process = kernel.spawn("a")
    process.mmap("2MiB").touch()
    mapping = process.mmap("8MiB", file=file)
    pin(kernel, MIB)
    with pytest.raises(OomKilled):
        mapping.touch()
    assert kernel.memmap.count(Owner.ANON) * PAGE == sum(p.rss_bytes for p in kernel.processes)
    every_frame_is_accounted_for(kernel)


def test_one_name_of_two_is_unlinked(tmp_path):
    """Hard and symbolic links: the file has another name, and its dirty bytes go there."""
    (tmp_path / "a").write_bytes(b"x" * 100)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "s").symlink_to("a")
    (tmp_path / "dangling").symlink_to("nowhere")
    kernel = boot(DirectoryDisk(tmp_path))
    for name in ("b", "s"):
        with kernel.open("a", "r+") as file:
            file.write(0, name.encode() * 4)
        kernel.unlink(name)
        kernel.sync()
        assert (tmp_path / "a").read_bytes()[:4] == name.encode() * 4
    kernel.unlink("dangling")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with kernel.open("a", "r+") as file:
        kernel.unlink("a")
        file.write(0, b"gone")
        file.fsync()
        assert file.read(0, 4) == b"gone"
    assert kernel.vfs.inodes == {}


def test_dirty_bytes_never_reach_another_file_that_has_the_number_now(tmp_path):
    """While it is dirty its file on the host is open, so that nothing else can become it; renamed, it is written
    there."""
    kernel = boot(DirectoryDisk(tmp_path))
    for name in ("a", "moved"):
        with kernel.open(name, "x") as file:
            file.write(0, b"GUEST" * 800)
    (tmp_path / "a").unlink()
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    for n in range(20):
        (tmp_path / f"other{n}").write_bytes(b"host")
    for n in range(20):
        assert kernel.open(f"other{n}").read(0, 10) == b"host"
    kernel.sync()
    assert all((tmp_path / f"other{n}").read_bytes() == b"host" for n in range(20))
    assert (tmp_path / "elsewhere").read_bytes() == b"GUEST" * 800


def test_many_dirty_files_need_few_descriptors(tmp_path):
    """They are written early; sync and the flusher close what is clean."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 100, hard))
    try:
        kernel = boot(DirectoryDisk(tmp_path), "32MiB")
        for n in range(400):
            with kernel.open(f"f{n}", "x") as file:
                file.write(0, str(n).encode())
        kernel.sync()
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert kernel.vmstat["nr_write_errors"] == 0
    assert [(tmp_path / f"f{n}").read_bytes() for n in range(400)] == [str(n).encode() for n in range(400)]


def test_a_host_that_cuts_a_file_under_dirty_pages():
    """What the guest has written stays the guest's: the file keeps its size, and gets its bytes."""
    disk = MemoryDisk({"f": b"o" * (64 * PAGE)})
    kernel = boot(disk)
    file = kernel.open("f", "r+")
    file.write(0, b"N" * PAGE)
    del disk.files["f"][100:]
    disk.changed("f")
    assert file.read(40 * PAGE, 4) == bytes(4)
    assert file.size == 64 * PAGE
    file.fsync()
    assert disk.files["f"][:PAGE] == b"N" * PAGE


def test_a_host_that_cuts_a_large_file_under_a_writer():
    """The page before the write is read, the file turns out to be shorter, and the write goes on."""
    disk = MemoryDisk({"f": bytes(80 * MIB)})
    kernel = boot(disk, "32MiB")
    file = kernel.open("f", "r+")
    del disk.files["f"][PAGE:]
    disk.changed("f")
    file.write(18000 * PAGE + 5, b"hello")
    assert file.read(18000 * PAGE, 12) == bytes(5) + b"hello"
    assert file.size == 18000 * PAGE + 10
    every_frame_is_accounted_for(kernel)
    file.fsync()
    assert disk.files["f"][-5:] == b"hello"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_in_the_middle_of_reclaim_leaks_nothing(error):
    """Ctrl-C lands where the time is spent: in the disk, under a write that an allocation waits for."""
    disk = MemoryDisk({"f": bytes(10 * MIB)})
    kernel = boot(disk)
    kernel.writeback.dirty_background_ratio = kernel.writeback.dirty_ratio = 100
    file = kernel.open("f", "r+")
    file.write(0, b"d" * (10 * MIB))

    def before(op, path, offset):
        if op == "write":
            raise error
        return 0

    disk.before = before
    process = kernel.spawn("a")
    memory = process.mmap("12MiB")
    with pytest.raises(error):
        memory.touch()
    disk.before = None
    every_frame_is_accounted_for(kernel)
    process.exit()
    file.fsync()
    assert disk.files["f"] == b"d" * (10 * MIB)
    kernel.drop_caches(3)
    assert kernel.free_bytes == kernel.ram_bytes


def test_a_hook_that_fails_while_somebody_is_killed_leaks_nothing():
    kernel = boot(MemoryDisk())

    def hook(process):
        raise RuntimeError(process.name)

    kernel.exit_hooks["bad"] = hook
    kernel.spawn("a").mmap("6MiB").touch()
    with pytest.raises(RuntimeError, match=r"a|b"):
        kernel.spawn("b").mmap("15MiB").touch()
    every_frame_is_accounted_for(kernel)


def test_dirty_memory_stays_below_its_limit_when_the_disk_fails():
    """The writer gets the disk's error; what was taken stays, dirty; and nobody else has to die for it."""
    disk = MemoryDisk({"f": b""}, capacity=PAGE)
    kernel = boot(disk, "32MiB")
    file = kernel.open("f", "r+")
    written = 0
    with pytest.raises(GuestIOError, match="limit, and can't be written: No space left") as caught:
        for at in range(0, 20 * MIB, 64 << 10):
            file.write(at, b"w" * (64 << 10))
            written = at + (64 << 10)
    assert caught.value.errno == errno.ENOSPC
    assert kernel.writeback.nr_dirty <= kernel.writeback.limits[1] + 64
    assert len([entry for entry in disk.log if entry[0] == "write"]) < 50
    kernel.spawn("other").mmap("16MiB").touch()
    assert kernel.vmstat["oom_kill"] == 0
    assert file.read(0, written) == b"w" * written
    disk.capacity = None
    with pytest.raises(GuestIOError, match="earlier"):
        file.fsync()
    file.fsync()
    assert disk.files["f"][:written] == b"w" * written


def test_a_change_on_the_host_shows_though_the_guest_has_written_since():
    """Our write moves the time of change, and mustn't hide theirs. Dirty pages are ours; clean ones are read again."""
    disk = MemoryDisk({"f": b"o" * (8 * PAGE)})
    kernel = boot(disk)
    with kernel.open("f", "r+") as file:
        file.read(0, 8 * PAGE)
        disk.files["f"][0:4] = b"HOST"
        disk.changed("f")
        file.write(7 * PAGE, b"ours")
        file.fsync()
    with kernel.open("f", "r+") as file:
        assert file.read(0, 4) == b"HOST"
        assert file.read(7 * PAGE, 4) == b"ours"
        file.write(6 * PAGE, b"dirty")
        disk.files["f"][0:4] = b"MORE"
        disk.changed("f")
        with kernel.open("f") as again:
            assert again.read(0, 4) == b"MORE"
            assert again.read(6 * PAGE, 5) == b"dirty"


def test_drop_caches_leaves_no_shadows():
    """invalidate_mapping_pages() takes them, too: what is read then is no refault."""
    kernel = boot(MemoryDisk({"f": bytes(100 * PAGE)}))
    file = kernel.open("f")
    file.read(0, 100 * PAGE)
    while kernel.memmap.nr(Lru.INACTIVE_FILE):
        kernel.reclaim.proactive(100)
    kernel.drop_caches(1)
    file.read(0, 100 * PAGE)
    assert kernel.memmap.stats.workingset_refault == 0


def test_inodes_without_pages_dont_pile_up(monkeypatch):
    """They are kept for their shadows, but not without end."""
    monkeypatch.setattr("emu.guest.vfs._INODES", 100)
    kernel = boot(MemoryDisk({f"f{n}": b"x" for n in range(1000)}))
    for n in range(1000):
        with kernel.open(f"f{n}") as file:
            file.read(0, 1)
        if n % 50 == 49:
            kernel.reclaim.proactive(50)
    assert len(kernel.vfs.inodes) <= 200


def test_a_file_of_more_pages_than_an_index_counts_is_refused():
    disk = MemoryDisk({"f": b""})
    kernel = boot(disk)
    file = kernel.open("f", "r+")
    for act in (lambda: file.truncate(1 << 44), lambda: file.write(1 << 43, b"x")):
        with pytest.raises(GuestIOError, match="File too large"):
            act()
