"""guest.inode, file, vfs, filemap: the page cache over a disk in memory, with and without errors."""

import errno

import pytest

from emu.clock import StepClock
from emu.errors import BadValue, ClosedError, GuestError, GuestIOError
from emu.guest.kernel import GuestKernel
from emu.guest.page import Lru, Owner, PageFlag
from emu.ram import GuestRam
from emu.testing import BytesMemory, MemoryDisk, ReferenceMemory

PAGE = 4096
MIB = 1 << 20
TEXT = b"".join(n.to_bytes(4, "little") for n in range(64 * 1024))  # 64 pages


def boot(files=None, ram="32MiB", memory=BytesMemory, **options):
    disk = MemoryDisk({"f": TEXT} if files is None else files, **options)
    kernel = GuestKernel(memory(ram), StepClock())
    kernel.mount(disk)
    return kernel, disk


def reads(disk):
    return [(path, offset // PAGE) for op, path, offset in disk.log if op == "read"]


def flags(file, index):
    _, frames, _ = file.inode.space.lookup(index, 1)
    return file._kernel.memmap.look(frames.flat[0]).flags


@pytest.mark.parametrize("memory", [BytesMemory, ReferenceMemory])
def test_what_is_read_is_the_file_and_is_read_once(memory):
    """Any offset and length; the second time from the cache."""
    kernel, disk = boot(memory=memory)
    file = kernel.open("f")
    for offset, n in ((0, 1), (5, 4096), (4095, 2), (10 * PAGE, 7 * PAGE + 3), (len(TEXT) - 5, 100), (len(TEXT), 5)):
        assert file.read(offset, n) == TEXT[offset : offset + n]
    assert file.read(0, len(TEXT)) == TEXT
    before = len(reads(disk))
    assert file.read(0, len(TEXT)) == TEXT
    assert len(reads(disk)) == before
    assert kernel.cached_bytes == file.cached_bytes == len(TEXT)
    assert disk.counters["disk_read_bytes"] == len(TEXT)


def test_a_file_that_was_long_grows_again_from_a_short_one():
    """One write of 64 MiB; and a file that was cut in between, small and large."""
    kernel, _ = boot({}, ram="160MiB")
    file = kernel.open("big", "x")
    data = TEXT * (64 * MIB // len(TEXT))
    assert file.write(0, data) == len(data)
    assert file.read(40 * MIB, 100) == data[40 * MIB : 40 * MIB + 100]
    for size in (10 * PAGE, 0):
        file.truncate(size)
        assert file.write(size, TEXT) == len(TEXT)
        assert file.read(size, len(TEXT)) == TEXT
        assert file.write(50 * MIB, TEXT) == len(TEXT)
        assert file.read(50 * MIB, len(TEXT)) == TEXT
        assert file.read(40 * MIB, PAGE) == bytes(PAGE)


def test_a_stream_is_read_in_growing_windows():
    """Page by page: 4, 8, 16, 32 pages at a time."""
    kernel, disk = boot()
    file = kernel.open("f")
    for page in range(64):
        file.read(page * PAGE, PAGE)
    assert reads(disk) == [("f", 0), ("f", 4), ("f", 12), ("f", 28), ("f", 60)]


def test_the_second_access_makes_a_page_active():
    """Inactive, referenced, active; a read that goes on in the same page isn't another access."""
    kernel, _ = boot()
    file = kernel.open("f")
    for _ in range(3):  # of one open file, in one page: pos_same_folio()
        file.read(0, PAGE)
        assert flags(file, 0) & (PageFlag.REFERENCED | PageFlag.ACTIVE) == PageFlag.REFERENCED
    assert kernel.memmap.nr(Lru.ACTIVE_FILE) == 0
    kernel.open("f").read(0, PAGE)
    assert flags(file, 0) & (PageFlag.REFERENCED | PageFlag.ACTIVE) == PageFlag.ACTIVE
    kernel.open("f").read(0, PAGE)
    assert flags(file, 0) & (PageFlag.REFERENCED | PageFlag.ACTIVE) == PageFlag.ACTIVE | PageFlag.REFERENCED
    for at in range(0, PAGE, 256):
        file.read(2 * PAGE + at, 256)
    assert PageFlag.ACTIVE not in flags(file, 2)
    assert kernel.memmap.nr(Lru.ACTIVE_FILE) == 1


def test_a_read_error_reaches_the_reader_and_caches_nothing():
    """EIO below, and nothing of the page; pages ahead of a good one fail silently."""
    kernel, disk = boot()
    file = kernel.open("f")
    disk.before = lambda op, path, offset: errno.EIO if op == "read" else 0
    with pytest.raises(GuestIOError, match="f: reading it failed: Input/output error") as caught:
        file.read(0, 10)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value, OSError)
    assert kernel.cached_bytes == 0
    assert kernel.used_bytes == 0
    # only the first request of a window reaches the bad place: then the page alone is tried
    disk.before = lambda op, path, offset: errno.EIO if op == "read" and len(reads(disk)) == 3 else 0
    disk.log.clear()
    disk.log.extend([("read", "x", 0)] * 2)
    assert file.read(0, PAGE) == TEXT[:PAGE]
    assert file.cached_bytes == PAGE
    disk.before = None
    assert file.read(0, len(TEXT)) == TEXT


def test_writes_are_in_the_cache_until_they_are_synced():
    """Then they are on the disk. A page that is wholly overwritten isn't read."""
    kernel, disk = boot()
    file = kernel.open("f", "r+")
    file.write(0, b"x" * PAGE)
    assert reads(disk) == []
    file.write(PAGE + 5, b"yy")
    assert reads(disk) == [("f", 1)]
    assert disk.files["f"] == TEXT
    expected = b"x" * PAGE + TEXT[PAGE : PAGE + 5] + b"yy" + TEXT[PAGE + 7 :]
    assert file.read(0, len(TEXT)) == expected
    assert kernel.memmap.count(Owner.DIRTY) == 2
    file.fsync()
    assert disk.files["f"] == expected
    assert kernel.memmap.count(Owner.DIRTY) == 0
    assert disk.log[-1][0] == "sync"


def test_files_grow_with_holes_and_are_cut():
    """A hole reads as zeros without the disk being asked; what was cut doesn't come back."""
    kernel, disk = boot({})
    file = kernel.open("new", "x")
    file.write(10 * PAGE + 7, b"end")
    assert file.size == 10 * PAGE + 10
    assert file.read(0, file.size) == bytes(10 * PAGE + 7) + b"end"
    assert reads(disk) == []
    file.truncate(10 * PAGE + 8)
    file.truncate(11 * PAGE)
    assert file.read(10 * PAGE, PAGE) == bytes(7) + b"e" + bytes(PAGE - 8)
    file.fsync()
    assert disk.files["new"] == bytes(10 * PAGE + 7) + b"e" + bytes(PAGE - 8)
    with kernel.open("new", "w") as again:
        assert again.size == 0
    assert kernel.cached_bytes == 0
    assert file.read(0, 10) == b""


def test_a_failed_writeback_keeps_the_page_dirty_and_is_told_at_fsync():
    """Each open file is told once; when the disk works again, nothing is lost."""
    kernel, disk = boot({"f": bytes(8 * PAGE)}, capacity=8 * PAGE)
    file, other = kernel.open("f", "r+"), kernel.open("f")
    file.write(8 * PAGE, b"z" * (2 * PAGE))
    kernel.clock.sleep_until(60)
    kernel.run_timers()
    assert kernel.vmstat["nr_write_errors"] > 0
    assert kernel.memmap.count(Owner.DIRTY) == 2
    assert kernel.memmap.count(Owner.WRITEBACK) == 0
    for opened in (file, other):
        with pytest.raises(GuestIOError, match="No space left on device"):
            opened.fsync()
    assert kernel.memmap.count(Owner.DIRTY) == 2
    assert file.read(8 * PAGE, 2 * PAGE) == b"z" * (2 * PAGE)
    disk.capacity = None
    with pytest.raises(GuestIOError, match="No space left"):  # the other one's attempt has failed since
        file.fsync()
    file.fsync()
    assert disk.files["f"] == bytes(8 * PAGE) + b"z" * (2 * PAGE)
    assert kernel.memmap.count(Owner.DIRTY) == 0


def test_a_file_that_shrinks_behind_the_guests_back():
    """A read finds its new end; what is cached beyond it goes; a mapping there gets SIGBUS."""
    kernel, disk = boot()
    file = kernel.open("f")
    mapping = kernel.spawn("a").mmap(len(TEXT), file=file)
    assert file.read(40 * PAGE, PAGE) == TEXT[40 * PAGE : 41 * PAGE]
    del disk.files["f"][10 * PAGE + 3 :]
    disk.changed("f")
    assert file.read(9 * PAGE, 5 * PAGE) == TEXT[9 * PAGE : 10 * PAGE + 3]
    assert file.size == 10 * PAGE + 3
    assert kernel.vmstat["disk_file_shrunk"] == 1
    assert file.inode.space.cached(40, 1) == 0
    with pytest.raises(GuestError, match="SIGBUS"):
        mapping.read(20 * PAGE, 1)
    assert mapping.read(10 * PAGE, 8) == TEXT[10 * PAGE : 10 * PAGE + 3] + bytes(5)


def test_a_file_that_changed_between_two_opens_is_read_again():
    """By size and time of change; unless it is dirty here."""
    kernel, disk = boot()
    with kernel.open("f") as file:
        assert file.read(0, 4) == TEXT[:4]
    disk.files["f"][:4] = b"NEW!"
    with kernel.open("f") as file:
        assert file.read(0, 4) == TEXT[:4]  # nothing says so
    disk.changed("f")
    with kernel.open("f") as file:
        assert file.read(0, 4) == b"NEW!"
    assert kernel.vmstat["disk_file_changed"] == 1
    with kernel.open("f", "r+") as file:
        file.write(0, b"mine")
    disk.changed("f")
    with kernel.open("f") as file:
        assert file.read(0, 4) == b"mine"


def test_drop_caches_takes_clean_unlocked_unmapped_pages():
    """1 and 3 take pages, 2 and 4 don't; the per-CPU lists are drained; bad values are refused."""
    kernel, _ = boot()
    file = kernel.open("f", "r+")
    mapping = kernel.spawn("a").mmap(4 * PAGE, file=file)
    file.read(0, 20 * PAGE)
    mapping.read(0, 4 * PAGE)  # pages 0-3 are mapped
    file.write(5 * PAGE, b"d" * PAGE)  # page 5 is dirty
    file.inode.space.flag(7, 8, PageFlag.LOCKED)  # page 7 is locked
    file.inode.space.flag(9, 10, PageFlag.WRITEBACK)  # page 9 is being written
    cached = file.inode.space.nr_pages
    assert kernel.drop_caches(2) == kernel.drop_caches(4) == 0
    assert kernel.drop_caches(1) == cached - 7
    assert [index for index in range(20) if file.inode.space.cached(index, 1)] == [0, 1, 2, 3, 5, 7, 9]
    assert kernel.pcp_bytes == 0
    file.inode.space.flag(7, 10, 0, PageFlag.LOCKED | PageFlag.WRITEBACK)
    kernel.sync()
    mapping.munmap()
    assert kernel.drop_caches(3) == 7
    assert kernel.cached_bytes == 0
    for wrong in (0, 5, True, "3"):
        with pytest.raises(BadValue, match="drop_caches"):
            kernel.drop_caches(wrong)
    file.close()
    kernel.drop_caches(2)
    assert kernel.vfs.inodes == {}


def test_pages_under_io_stay_when_caches_are_dropped_meanwhile():
    """Really under way: the disk itself calls back."""
    kernel, disk = boot()
    file = kernel.open("f", "r+")
    file.write(0, b"a" * (4 * PAGE))
    seen = []

    def callback(op, path, offset):
        if op == "write":
            seen.append((kernel.drop_caches(3), kernel.memmap.count(Owner.WRITEBACK)))
        return 0

    disk.before = callback
    file.fsync()
    assert seen == [(0, 4)]
    assert kernel.memmap.count(Owner.INACTIVE) == 4
    assert disk.files["f"][: 4 * PAGE] == b"a" * (4 * PAGE)


def test_mappings_show_the_file_and_count_as_mapped():
    """Shared writes are the file's, private ones the process's own; unmapping counts an access."""
    kernel, disk = boot()
    file = kernel.open("f", "r+")
    process = kernel.spawn("a")
    shared, private = process.mmap(8 * PAGE, file=file, shared=True), process.mmap(8 * PAGE, file=file)
    assert private.read(100, 50) == TEXT[100:150]
    assert kernel.memmap.stats.nr_mapped == 1
    assert file.inode.space.nr_pages == 32  # read around it: from page 0 to 31
    shared.write(3 * PAGE, b"both see it")
    assert private.read(3 * PAGE, 11) == file.read(3 * PAGE, 11) == b"both see it"
    private.write(4 * PAGE, b"mine")
    assert shared.read(4 * PAGE, 4) == TEXT[4 * PAGE : 4 * PAGE + 4]
    assert private.read(4 * PAGE, 6) == b"mine" + TEXT[4 * PAGE + 4 : 4 * PAGE + 6]
    file.write(2 * PAGE, b"new")
    assert private.read(2 * PAGE, 3) == shared.read(2 * PAGE, 3) == b"new"
    file.fsync()
    assert disk.files["f"][3 * PAGE : 3 * PAGE + 11] == b"both see it"
    process.exit()
    assert kernel.memmap.stats.nr_mapped == 0
    assert kernel.used_bytes == 0


def test_a_cut_takes_private_copies_along():
    """Beyond the new end a mapping gets SIGBUS, its own copies or not (unmap_mapping_range with even_cows)."""
    kernel, _ = boot()
    file = kernel.open("f", "r+")
    mapping = kernel.spawn("a").mmap(4 * PAGE, file=file)
    mapping.write(PAGE, b"own" * 2000)
    used = kernel.used_bytes
    file.truncate(PAGE + 10)
    assert mapping.read(PAGE, 3) == b"own"
    assert kernel.used_bytes == used - PAGE
    with pytest.raises(GuestError, match="SIGBUS"):
        mapping.read(2 * PAGE, 3)
    file.truncate(4 * PAGE)
    assert mapping.read(2 * PAGE, PAGE) == bytes(PAGE)


def test_what_a_mapping_writes_beyond_the_files_end_is_never_the_files():
    """Neither when the file is extended, nor when it is written further on, nor on the disk."""
    for grow in (lambda file: file.truncate(3 * PAGE), lambda file: file.write(2 * PAGE, b"far")):
        kernel, disk = boot({"f": b"x" * 100})
        file = kernel.open("f", "r+")
        mapping = kernel.spawn("a").mmap(PAGE, file=file, shared=True)
        mapping.write(50, b"Y" * 1000)
        file.fsync()
        assert disk.files["f"] == b"x" * 50 + b"Y" * 50
        mapping.write(90, b"Z" * 1000)
        grow(file)
        assert file.read(0, PAGE) == b"x" * 50 + b"Y" * 40 + b"Z" * 10 + bytes(PAGE - 100)
        file.fsync()
        assert bytes(disk.files["f"][:PAGE]) == b"x" * 50 + b"Y" * 40 + b"Z" * 10 + bytes(PAGE - 100)


def test_a_lost_frame_is_an_error_of_its_file_and_of_nobody_else():
    """A dirty page whose frame the host has lost can't be written: EIO at fsync, and the flusher goes on."""
    with GuestRam("16MiB", uffd="off") as ram:
        kernel, disk = GuestKernel(ram, StepClock()), MemoryDisk({"f": TEXT, "g": TEXT})
        kernel.mount(disk)
        file, other = kernel.open("f", "r+"), kernel.open("g", "r+")
        file.write(0, b"lost" * 1024)
        other.write(0, b"kept" * 1024)
        _, frames, _ = file.inode.space.lookup(0, 1)
        ram.poison([(frames.flat[0], 1)])
        kernel.clock.sleep_until(40)
        kernel.run_timers()
        assert disk.files["g"][:4] == b"kept"
        with pytest.raises(GuestIOError, match="Input/output error"):
            file.fsync()
        assert disk.files["f"] == TEXT


def test_modes_and_what_they_refuse():
    kernel, _ = boot({"f": b"abc"})
    for mode in ("r", "rb"):
        with kernel.open("f", mode) as file, pytest.raises(GuestIOError, match="for reading only"):
            file.write(0, b"x")
    with pytest.raises(GuestIOError, match="File exists"):
        kernel.open("f", "x")
    with pytest.raises(GuestIOError, match="No such file"):
        kernel.open("g", "r+")
    with kernel.open("g", "a") as file:
        assert file.size == 0
    with pytest.raises(BadValue, match="mode 'q'"):
        kernel.open("f", "q")
    file.close()
    with pytest.raises(ClosedError, match="is closed"):
        file.read(0, 1)
    with pytest.raises(BadValue, match="0 or more"):
        kernel.open("f").read(-1, 5)
    read_only, _ = boot({"f": b"abc"}, read_only=True)
    with pytest.raises(GuestIOError, match="Read-only file system"):
        read_only.open("f", "r+")
    with pytest.raises(GuestError, match="no disk"):
        GuestKernel(BytesMemory("1MiB"), StepClock()).open("f")


def test_an_unlinked_file_lives_until_its_last_user_goes():
    """Its dirty pages are never written, and its frames come back."""
    kernel, disk = boot({"f": TEXT})
    file = kernel.open("f", "r+")
    mapping = kernel.spawn("a").mmap(PAGE, file=file)
    file.write(0, b"kept")
    kernel.unlink("f")
    assert file.read(0, 4) == b"kept"
    file.close()
    assert mapping.read(0, 4) == b"kept"
    mapping.process.exit()
    assert kernel.cached_bytes == kernel.used_bytes == 0
    assert kernel.vfs.inodes == {}
    assert not any(op == "write" for op, _, _ in disk.log)


def test_files_of_the_host_are_open_while_they_are_used_or_dirty():
    """Whatever becomes of their names; not if only cached; and only so many dirty ones: the first are written."""
    kernel, disk = boot({f"f{n}": TEXT[:PAGE] for n in range(50)})
    kernel.vfs._most_dirty_unused = 20
    for n in range(50):
        with kernel.open(f"f{n}", "r+") as file:
            file.write(0, b"dirty")
    assert [inode.path for inode in kernel.vfs.inodes.values() if inode.file] == [f"f{n}" for n in range(30, 50)]
    assert kernel.memmap.count(Owner.DIRTY) == 20
    kernel.clock.sleep_until(40)
    kernel.run_timers()
    assert kernel.vmstat["nr_written"] == 50
    assert all(bytes(content[:5]) == b"dirty" for content in disk.files.values())
    assert all(inode.file is None for inode in kernel.vfs.inodes.values())


def test_disks_are_mounted_below_each_other():
    kernel, _ = boot({"f": b"root"})
    other = MemoryDisk({"f": b"other", "d/g": b"deep"})
    kernel.mount(other, "mnt/x")
    assert kernel.open("mnt/x/f").read(0, 9) == b"other"
    assert kernel.open("f").read(0, 9) == b"root"
    assert sorted(kernel.walk("mnt/x")) == [("mnt/x/d/g", 4), ("mnt/x/f", 5)]
    with pytest.raises(GuestError, match="mounted at 'mnt/x' already"):
        kernel.mount(other, "/mnt/x/")
