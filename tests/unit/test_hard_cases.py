"""Page cache: what goes wrong at the same time as something else. Each of these lost bytes or frames, or crashed,
once."""

import errno
import os
import resource

import pytest

from emu.clock import StepClock
from emu.errors import GuestError, GuestIOError, OomKilled
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


def test_a_fill_that_had_some_frames_when_its_process_was_killed():
    """What readahead had got by then goes back."""
    kernel = boot(MemoryDisk({"f": bytes(8 * MIB)}))
    process = kernel.spawn("a")
    process.mmap("2MiB").touch()
    with kernel.open("f") as file:
        mapping = process.mmap(8 * MIB, file=file)
    keeper = kernel.spawn("keeper")
    keeper.oom_score_adj = -1000
    memory = keeper.mmap(kernel.free_bytes)
    above_min = sum(zone.headroom(zone.watermarks.min, reserve=True) for zone in kernel.zones)
    memory.touch(0, (above_min - 8) * PAGE)
    with pytest.raises(OomKilled):
        mapping.read(100 * PAGE, 1)
    every_frame_is_accounted_for(kernel)


def test_no_change_of_ours_hides_one_of_the_hosts():
    """A shorter file that is found so, and a truncate, aren't the host's last word."""
    disk = MemoryDisk({"f": b"o" * (8 * PAGE)})
    kernel = boot(disk)
    for change in (lambda file: file.read(7 * PAGE, 1), lambda file: file.truncate(6 * PAGE)):
        file = kernel.open("f", "r+")
        file.read(0, 4 * PAGE)
        disk.files["f"][:] = b"N" * (5 * PAGE)
        disk.changed("f")
        change(file)
        with kernel.open("f") as again:
            assert again.read(0, 4) == b"NNNN"
        disk.files["f"][:] = b"o" * (8 * PAGE)
        disk.changed("f")
        file.close()


def test_a_file_that_grew_on_the_host_while_it_was_dirty_here():
    """Ours is written over what is there, and nothing else is."""
    disk = MemoryDisk({"f": b"o" * (4 * PAGE)})
    kernel = boot(disk)
    file = kernel.open("f", "r+")
    file.write(0, b"ours")
    disk.files["f"] += b"A" * (4 * PAGE)
    disk.changed("f")
    with kernel.open("f", "r+") as again:
        assert again.size == 8 * PAGE
        assert again.read(5 * PAGE, 4) == b"AAAA"
        again.write(7 * PAGE + 10, b"x")
    kernel.sync()
    expected = b"ours" + b"o" * (4 * PAGE - 4) + b"A" * (3 * PAGE + 10) + b"x" + b"A" * (PAGE - 11)
    assert disk.files["f"] == expected
    with kernel.open("f") as again:
        again.read(0, 8)
    assert kernel.vmstat["disk_file_changed"] == 1


def test_descriptors_are_few_when_the_disk_fails_too():
    """They are kept, since the bytes are; and then no more files are opened for writing."""
    disk = MemoryDisk({"ok": b"fine"}, capacity=4)
    kernel = boot(disk)
    kernel.vfs._most_dirty_unused = 5
    with pytest.raises(GuestIOError, match="wait for a disk that fails") as caught:
        for n in range(100):
            with kernel.open(f"f{n}", "x") as file:
                file.write(0, b"dirty")
    assert caught.value.errno == errno.ENFILE
    assert sum(inode.file is not None for inode in kernel.vfs.inodes.values()) == 11
    assert kernel.open("ok").read(0, 4) == b"fine"
    disk.capacity = None
    kernel.sync()
    assert all(content == b"dirty" for name, content in disk.files.items() if name != "ok")
    assert all(inode.file is None for inode in kernel.vfs.inodes.values() if inode.path != "ok")
    kernel.open("f0", "r+").close()


def test_a_failing_disk_is_nothing_to_another_one():
    """Not even in a guest whose memory is all used, so that nothing may be dirty; and it is tried again when it
    counts."""
    bad, good = MemoryDisk({"f": b""}, capacity=0), MemoryDisk({"g": b""})
    kernel = boot(bad)
    kernel.mount(good, "good")
    file = kernel.open("f", "r+")
    file.write(0, b"x" * PAGE)
    with pytest.raises(GuestIOError):
        file.fsync()
    pin(kernel, 0)
    with kernel.open("good/g", "r+") as other:
        other.write(0, b"y" * (100 * PAGE))
    bad.capacity = None
    file.write(0, b"z" * PAGE)
    file.write(PAGE, b"z" * (100 * PAGE))
    kernel.sync()
    assert bad.files["f"] == b"z" * (101 * PAGE)
    assert good.files["g"] == b"y" * (100 * PAGE)


@pytest.mark.parametrize("closed", [False, True])
def test_shadows_outlive_the_close(closed):
    """When a file was closed has nothing to do with how far its pages were from being kept."""
    kernel = boot(MemoryDisk({"f": bytes(50 * PAGE)}))
    file = kernel.open("f")
    file.read(0, 50 * PAGE)
    if not closed:
        kernel.reclaim.proactive(50)
    file.close()
    if closed:
        kernel.reclaim.proactive(50)
    with kernel.open("f") as again:
        again.read(0, 50 * PAGE)
    assert kernel.memmap.stats.workingset_refault == 50
    assert file.cached_bytes == 50 * PAGE
    kernel.drop_caches(3)
    assert kernel.vfs.inodes == {}
    assert "0 pages cached" in repr(file.inode)


def test_a_write_that_was_half_done_is_ours_all_the_same():
    """The clean pages aren't dropped for it, and what was written counts."""
    disk = MemoryDisk({"f": bytes(600 * PAGE)})
    kernel = boot(disk)
    file = kernel.open("f", "r+")
    file.read(0, 600 * PAGE)
    file.write(0, b"d" * (300 * PAGE))
    disk.before = lambda op, path, offset: errno.EIO if op == "write" and offset else 0
    with pytest.raises(GuestIOError):
        file.fsync()
    assert kernel.vmstat["nr_written"] == 256
    disk.before = None
    file.fsync()
    kernel.open("f")
    assert kernel.vmstat["disk_file_changed"] == 0
    assert file.cached_bytes == 600 * PAGE


def test_private_copies_beyond_an_end_that_the_host_has_cut():
    disk = MemoryDisk({"f": b"o" * (8 * PAGE)})
    kernel = boot(disk)
    file = kernel.open("f")
    mapping = kernel.spawn("a").mmap(8 * PAGE, file=file)
    mapping.write(7 * PAGE, b"mine")
    del disk.files["f"][PAGE:]
    disk.changed("f")
    kernel.open("f")
    with pytest.raises(GuestError, match="SIGBUS"):
        mapping.read(7 * PAGE, 4)
    every_frame_is_accounted_for(kernel)


def test_a_sync_that_fails_leaves_nothing_open():
    disk = MemoryDisk({"f": b""})
    kernel = boot(disk)
    with kernel.open("f", "r+") as file:
        file.write(0, b"x")
    disk.before = lambda op, path, offset: errno.EIO if op == "sync" else 0
    with pytest.raises(GuestIOError, match="fsync failed"):
        kernel.sync()
    assert all(inode.file is None for inode in kernel.vfs.inodes.values())
