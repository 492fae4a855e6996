"""host.disk: real directories and images, read past the host's cache, and never out of their root."""

import errno
import mmap
import os
from pathlib import Path

import pytest

import emu
from emu.errors import BadValue, GuestIOError
from emu.host.disk import DirectoryDisk, ImageDisk, open_disk
from emu.testing import StepClock

PAGE = 4096


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "f").write_bytes(bytes(range(256)) * 100 + b"tail")
    (root / "sub" / "g").write_bytes(b"g")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link-in").symlink_to("sub/g")
    (root / "link-out").symlink_to("../secret")
    (root / "link-abs").symlink_to(tmp_path / "secret")
    (root / "folder-out").symlink_to("..")
    os.mkfifo(root / "fifo")
    return root


def buffer(pages):
    return memoryview(mmap.mmap(-1, pages * PAGE))


def test_reads_are_direct_where_the_file_system_can(tree):
    """To the last byte, which fills no block; said per file, and counted by bytes."""
    disk = DirectoryDisk(tree)
    file = disk.open("f")
    assert file.access in ("direct", "buffered", "memory")
    into = buffer(8)
    assert file.read(0, into) == 25604
    assert bytes(into[:25604]) == (tree / "f").read_bytes()
    assert file.read(24 * 1024 // PAGE * PAGE, into[:PAGE]) == 25604 - 24576
    assert file.read(40960, into[:PAGE]) == 0
    how = "disk_direct_bytes" if file.access == "direct" else "disk_buffered_bytes"
    assert disk.counters[how] == disk.counters["disk_read_bytes"] == 25604 + 1028
    file.close()
    disk.close()


def test_a_file_that_cant_be_read_directly_is_dropped_behind(tmp_path, tree):
    """Alignment that no page has: buffered."""
    fd = os.open(tree / "f", os.O_RDWR)
    from emu.host.disk import HostFile, _counters

    counters = _counters()
    file = HostFile(fd, writable=True, align=(1 << 20, 1 << 20), counters=counters)
    assert file.access in ("buffered", "memory")
    into = buffer(8)
    assert file.read(0, into) == 25604
    file.write(0, memoryview(b"new").toreadonly())
    file.sync()
    assert (tree / "f").read_bytes()[:5] == b"new\x03\x04"
    assert counters["disk_buffered_bytes"] == 25604 + 3
    assert counters["disk_direct_bytes"] == 0
    file.close()


def test_writes_of_whole_blocks_and_of_the_tail(tree):
    """The tail doesn't round the file up."""
    disk = DirectoryDisk(tree)
    file = disk.open("new", write=True, create=True)
    data = buffer(3)
    data[:] = bytes(range(256)) * 48
    file.write(0, data[: 2 * PAGE + 100])
    file.sync()
    assert (tree / "new").read_bytes() == bytes(data[: 2 * PAGE + 100])
    file.truncate(10)
    assert file.version()[0] == 10
    file.close()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../secret", errno.EXDEV),
        ("sub/../../secret", errno.EXDEV),
        ("link-out", errno.EXDEV),
        ("link-abs", errno.EXDEV),
        ("folder-out/secret", errno.EXDEV),
        ("missing", errno.ENOENT),
        ("sub", errno.EISDIR),
        ("fifo", errno.EINVAL),
        ("f/x", errno.ENOTDIR),
        ("a\0b", errno.EINVAL),
        ("n" * 300, errno.ENAMETOOLONG),
    ],
)
def test_paths_that_lead_out_or_nowhere_are_refused(tree, path, code):
    """By the host's kernel, for reading, writing, making and removing."""
    with emu.Machine("16MiB", disk=tree, clock=StepClock(), uffd="off") as m:
        for mode in ("r", "r+"):
            with pytest.raises(GuestIOError) as caught:
                m.guest.open(path, mode)
            assert caught.value.errno == code
        if code == errno.EXDEV:
            assert "leads out of the disk" in str(caught.value)
            with pytest.raises(GuestIOError):
                m.guest.open(path, "w")
    assert (tree.parent / "secret").read_bytes() == b"secret"


def test_an_absolute_path_is_one_of_the_disks(tree):
    """The guest's root is the disk's: /f is f, and /etc isn't the host's."""
    with emu.Machine("16MiB", disk=tree, clock=StepClock(), uffd="off") as m:
        assert m.guest.open("/f").read(0, 4) == b"\0\1\2\3"
        with pytest.raises(GuestIOError, match="No such file"):
            m.guest.open("/etc/passwd")
        with pytest.raises(GuestIOError, match="leads out"):
            m.guest.unlink("../secret")
        with pytest.raises(GuestIOError, match="leads out"):
            m.guest.listdir("..")
        assert m.guest.open("link-in").read(0, 9) == b"g"
        assert m.guest.open("link-in").inode is m.guest.open("sub/g").inode
        assert list(m.guest.walk()) == [("f", 25604), ("sub/g", 1)]


def test_a_read_only_disk_is_never_written(tree):
    before = {path: path.stat() for path in tree.rglob("*") if path.is_file() and not path.is_symlink()}
    with emu.Machine("16MiB", disk=tree, disk_read_only=True, clock=StepClock(), uffd="off") as m:
        for mode in ("r+", "w", "x", "a"):
            with pytest.raises(GuestIOError, match="Read-only"):
                m.guest.open("f", mode)
        with pytest.raises(GuestIOError, match="Read-only"):
            m.guest.unlink("f")
        assert len(m.guest.open("f").read(0, 1 << 20)) == 25604
    for path, status in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)


def test_an_image_is_one_file_of_a_fixed_size(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * PAGE))
    with emu.Machine("16MiB", disk=image, clock=StepClock(), uffd="off") as m:
        assert list(m.guest.walk()) == [("vda", 8 * PAGE)]
        with m.guest.open("vda", "r+") as vda:
            vda.write(PAGE, b"block")
            vda.fsync()
            with pytest.raises(GuestIOError, match="truncating it to 4096 bytes failed: Invalid"):
                vda.truncate(PAGE)
            with pytest.raises(GuestIOError, match="keeps its size: No space left"):
                vda.truncate(100 * PAGE)
            with pytest.raises(GuestIOError, match="keeps its size: No space left"):
                vda.write(8 * PAGE, b"beyond")
        with pytest.raises(GuestIOError):
            m.guest.open("other")
        with pytest.raises(GuestIOError):
            m.guest.unlink("vda")
    assert image.read_bytes() == bytes(PAGE) + b"block" + bytes(7 * PAGE - 5)
    assert isinstance(open_disk(image), ImageDisk)


@pytest.mark.parametrize("path", ["/nonexistent", "/dev/null"])
def test_what_is_no_disk_is_refused(path):
    with pytest.raises(BadValue, match="neither a directory nor a file"):
        emu.Machine("16MiB", disk=path, uffd="off")


def test_a_closed_machine_leaves_no_file_open(tree):
    before = set(os.listdir("/proc/self/fd"))
    with emu.Machine("16MiB", disk=tree, clock=StepClock(), uffd="off") as m:
        files = [m.guest.open(name, "r+") for name in ("f", "sub/g")]
        files[0].write(0, b"never written back")
        mapping = m.guest.spawn("a").mmap(4096, file=files[1])
        mapping.read(0, 1)
    for file in files:  # late, and harmless
        file.close()
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(BadValue):
        emu.Machine("16MiB", "reporting:order=99", disk=Path(tree), uffd="off")
    assert set(os.listdir("/proc/self/fd")) == before
