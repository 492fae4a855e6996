"""mlock and pins: what they keep stays, in reclaim, in truncation, and when the host steals; and why it was said."""

import errno
import os
import random

import pytest

import emu
from emu._native import disabled
from emu.errors import BadValue, GuestError, GuestIOError
from emu.frames import Cause, FrameState, Usage
from emu.guest.filecache import FileCache
from emu.guest.page import Lru
from emu.testing import StepClock

MIB = 1 << 20
PAGE = 4096
pytestmark = [pytest.mark.uffd, pytest.mark.inline, pytest.mark.skipif("wp" in disabled() and "move" in disabled(),
              reason="nothing leaves a running guest here")]  # fmt: skip
MODES = ["none", "cmm2", "cmm2:minor=yes", "cmm2:dirty=mapping", "cmm2-light"]


@pytest.fixture
def tree(tmp_path):
    data = random.Random(3).randbytes(8 * MIB)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data)
    return tmp_path, data


def machine(mechanism, folder, ram="64MiB"):
    return emu.Machine(ram, mechanism, disk=folder, clock=StepClock())


def steal_all(m):
    return m.host.steal("64MiB") if m.host.stealing is not None else 0


@pytest.mark.parametrize("mode", MODES)
def test_what_is_mlocked_stays(tree, mode):
    """Reclaim under pressure, drop_caches and the host take the rest of the file, and none of these pages."""
    folder, data = tree
    with machine(mode, folder) as m:
        file = m.guest.open("a")
        mapping = m.guest.spawn("app").mmap(8 * MIB, file=file)
        mapping.mlock(MIB, 2 * MIB)
        assert mapping.read(0, 8 * MIB) == data
        assert m.guest.memmap.nr(Lru.UNEVICTABLE) == 512
        frames = {mapping.frame_of(page) for page in range(256, 768)}
        usages = m.ram.usages() if mode != "none" else bytes(m.ram.frames)
        assert {usages[gfn] for gfn in frames} == {Usage.STABLE}
        steal_all(m)
        m.guest.reclaim.proactive(4096)
        m.guest.drop_caches(3)
        hog = m.guest.spawn("hog").mmap("44MiB")
        hog.touch()
        steal_all(m)
        states = m.ram.states()
        assert {states[gfn] for gfn in frames} == {FrameState.RESIDENT}
        assert {mapping.frame_of(page) for page in range(256, 768)} == frames
        read = m.stats()["disk_read_bytes"]
        assert mapping.read(MIB, 2 * MIB) == data[MIB : 3 * MIB]
        assert m.stats()["disk_read_bytes"] == read
        hog.munmap()
        mapping.munlock(MIB, MIB)
        assert m.guest.memmap.nr(Lru.UNEVICTABLE) == 256
        mapping.munmap()
        assert m.guest.memmap.nr(Lru.UNEVICTABLE) == 0
        m.guest.reclaim.proactive(4096)
        assert m.guest.cached_bytes == 0
        assert file.read(0, 8 * MIB) == data
        file.close()


@pytest.mark.parametrize("mode", ["cmm2", "cmm2:minor=yes"])
def test_a_file_that_was_locked_once_is_never_volatile_again(tree, mode):
    folder, data = tree
    with machine(mode, folder) as m:
        a, b = m.guest.open("a"), m.guest.open("b")
        mapping = m.guest.spawn("app").mmap(MIB, file=a)
        mapping.mlock(0, PAGE)
        mapping.munmap()
        assert a.read(0, 8 * MIB) == b.read(0, 8 * MIB) == data
        volatile = sum(n for (u, _), n in m.ram.usage_matrix().items() if u is Usage.VOLATILE)
        # b's, and of a's what the fault read around, which no one has used since
        assert volatile == 2048
        assert steal_all(m) >= 8 * MIB
        assert a.read(0, 8 * MIB) == b.read(0, 8 * MIB) == data
        a.close()
        b.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_pin_keeps_its_frames_for_a_device(tree, mode):
    folder, data = tree
    with machine(mode, folder) as m:
        file = m.guest.open("a", "r+")
        mapping = m.guest.spawn("app").mmap(MIB, file=file, shared=True)
        with mapping.pin(PAGE, 16 * PAGE, write=True) as pin:
            frames = [gfn + k for gfn, count, _ in pin.frames for k in range(count)]
            assert pin.pages == len(frames) == 16
            m.guest.sync()
            steal_all(m)
            m.guest.reclaim.proactive(4096)
            m.guest.drop_caches(3)
            states = m.ram.states()
            assert {states[gfn] for gfn in frames} == {FrameState.RESIDENT}
            assert m.ram.read(frames[3] * PAGE, PAGE) == data[4 * PAGE : 5 * PAGE]
            m.ram.write(frames[3] * PAGE, b"by a device")  # no page table is asked
            with pytest.raises(GuestIOError) as caught:
                file.truncate(3 * PAGE)
            assert caught.value.errno == errno.EBUSY
        pin.unpin()  # once is enough
        wanted = data[: 4 * PAGE] + b"by a device" + data[4 * PAGE + 11 : MIB]
        steal_all(m)
        assert mapping.read(0, MIB) == file.read(0, MIB) == wanted
        m.guest.sync()
        assert (folder / "a").read_bytes()[:MIB] == wanted
        file.truncate(3 * PAGE)
        file.close()


def test_a_pin_ends_with_its_mapping_and_not_before(tree):
    folder, data = tree
    with machine("cmm2", folder) as m:
        file = m.guest.open("a")
        process = m.guest.spawn("app")
        mapping = process.mmap(MIB, file=file)
        pin = mapping.pin(0, 16 * PAGE)
        with pytest.raises(BadValue, match="shared"):
            mapping.pin(0, PAGE, write=True)
        mapping.munmap(15 * PAGE, PAGE)  # ends no pin, as in Linux
        m.host.steal("64MiB")
        frames = [gfn + k for gfn, count, _ in pin.frames for k in range(count)]
        assert {m.ram.states()[gfn] for gfn in frames} == {FrameState.RESIDENT}
        process.exit()
        pin.unpin()
        own = m.guest.spawn("app").mmap(MIB, file=file)
        own.write(5 * PAGE, b"mine")
        with pytest.raises(GuestError, match="a copy"):
            own.pin(0, 8 * PAGE)
        own.mlock()
        with pytest.raises(GuestError, match="EINVAL"):
            own.madvise_dontneed(0, MIB)
        own.munlock()
        own.madvise_dontneed(0, MIB)
        assert own.read(5 * PAGE, 4) == data[5 * PAGE : 5 * PAGE + 4]
        own.munmap()
        assert m.guest.memmap.nr(Lru.UNEVICTABLE) == 0
        m.guest.drop_caches(3)
        assert m.guest.cached_bytes == 0
        file.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_changes_behind_a_pin_keeps_its_pinned_pages(tree, mode):
    """A device may be writing there: nobody else gets the frames, and what it wrote isn't lost."""
    folder, data = tree
    with machine(mode, folder) as m:
        file = m.guest.open("a", "r+")
        mapping = m.guest.spawn("app").mmap(MIB, file=file, shared=True)
        pin = mapping.pin(0, 16 * PAGE, write=True)
        m.guest.sync()
        gfn = next(iter(pin.frames))[0]
        m.ram.write(gfn * PAGE, b"by a device")
        os.utime(folder / "a")
        file.close()
        again = m.guest.open("a", "r+")
        m.ram.write(gfn * PAGE, b"by a DEVICE")
        steal_all(m)
        assert again.read(0, 11) == b"by a DEVICE"
        pin.unpin()
        m.guest.sync()
        assert (folder / "a").read_bytes()[:MIB] == b"by a DEVICE" + data[11:MIB]
        reader = mapping.pin(0, PAGE)
        again.close()
        (folder / "a").write_bytes(b"cut")
        short = m.guest.open("a")
        assert short.read(0, 11) == b"by a DEVICE"  # older than the disk, as long as a device reads it
        reader.unpin()
        short.close()
        with m.guest.open("a") as file:
            assert file.read(0, 11) == b"cut"


def test_what_was_handed_over_before_is_the_guests_again(tree):
    """From the inactive queue to page states: what is locked then isn't evicted by what was promised before."""
    folder, data = tree
    with machine("inactive:seconds=5s,keep=200s", folder) as m:
        file = m.guest.open("a")
        file.read(0, MIB)
        m.run_for(30)
        assert m.ram.stats()["nr_aside"] >= 256
        m.switch_mechanism("cmm2")
        assert m.ram.stats()["nr_aside"] == 0
        mapping = m.guest.spawn("app").mmap(MIB, file=file)
        mapping.mlock()
        m.run_for(400)
        read = m.stats()["disk_read_bytes"]
        assert mapping.read(0, MIB) == data[:MIB]
        assert m.stats()["disk_read_bytes"] == read
        m.switch_mechanism("inactive:seconds=5s,keep=10s")  # and back: it evicts again
        mapping.munmap()
        m.run_for(60)
        assert m.ram.stats()["aside_dropped"] >= 256
        assert file.read(0, MIB) == data[:MIB]
        file.close()


@pytest.mark.parametrize("at", [0, 1, 100, 255])
def test_an_interrupt_while_page_states_end_leaves_no_zeros(tree, at, monkeypatch):
    """What the host has taken, and hasn't left the cache yet, is told at each use; and ending it again goes on."""
    folder, data = tree
    with machine("cmm2", folder) as m:
        file = m.guest.open("a")
        mapping = m.guest.spawn("app").mmap(MIB, file=file)
        assert mapping.read(0, MIB) == data[:MIB]
        assert m.host.steal("64MiB") >= MIB
        real, done = FileCache.forget_discarded, []

        def interrupted(inode, index):
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(index)
            real(inode, index)

        monkeypatch.setattr(FileCache, "forget_discarded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            m.switch_mechanism("none")
        monkeypatch.undo()
        assert mapping.read(0, MIB) == data[:MIB]
        assert file.read(0, 8 * MIB) == data
        m.switch_mechanism("none")
        assert file.read(0, 8 * MIB) == data
        assert m.guest.page_states is None
        file.close()


def test_each_hook_says_why(tree):
    """What makes a page stable, by cause: a lookup, a mapping, its first write, a copy, a pin; and a discard fault."""
    folder, _ = tree
    with machine("cmm2", folder) as m:
        file = m.guest.open("a", "r+")
        file.read(0, 64 * PAGE)
        process = m.guest.spawn("app")

        def said(work):
            before = m.ram.transitions()
            work()
            after = m.ram.transitions()
            return {
                cause: n
                for cause in Cause
                if (n := sum(after.moved.get(cause, {}).values()) - sum(before.moved.get(cause, {}).values()))
            }

        assert said(lambda: file.read(0, 64 * PAGE)) == {Cause.LOOKUP: 64, Cause.PUT: 64}
        shared = process.mmap(64 * PAGE, file=file, shared=True)
        assert said(lambda: shared.touch(write=False)) == {Cause.MAP: 64, Cause.PUT: 64}
        assert said(lambda: shared.touch(write=True)) == {Cause.MKWRITE: 64, Cause.PUT: 64}
        private = process.mmap(64 * PAGE, file=file)
        assert said(lambda: private.touch(write=True)) == {Cause.ALLOC: 64, Cause.COW: 64, Cause.PUT: 64}
        pin = shared.pin(0, 8 * PAGE)
        assert said(pin.unpin) == {Cause.PUT: 8}
        assert said(lambda: shared.pin(0, 8 * PAGE)) == {Cause.PIN: 8}
        file.close()


def test_a_discard_fault_is_a_cause_of_its_own(tree):
    folder, data = tree
    with machine("cmm2:minor=yes", folder) as m:
        file = m.guest.open("a")
        mapping = m.guest.spawn("app").mmap(16 * PAGE, file=file)
        mapping.touch(write=False)
        read_around = m.guest.cached_bytes
        assert m.host.steal("1MiB") >= read_around
        assert mapping.read(0, 16 * PAGE) == data[: 16 * PAGE]
        assert sum(m.ram.transitions().moved[Cause.DISCARDED].values()) >= 16
        assert m.guest.vmstat["pgdiscard_fault"] >= 1
        file.close()
