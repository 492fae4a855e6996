"""emu.uffd: the ladder, the handshake, and partial results as values."""

import ctypes
import errno
import mmap
import os
import select
import threading

import pytest

from emu import _native
from emu.errors import BadValue, ClosedError, UffdError
from emu.uffd import Done, Features, Mode, Pagefault, Rung, Userfaultfd, probe

pytestmark = pytest.mark.uffd
PAGE = 4096
memset = ctypes.CDLL(None).memset  # ctypes lets the GIL go around it
memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


@pytest.fixture
def area():
    """64 pages of private memory, and its address."""
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        start, lease = _native.address_of(mapping)
        yield mapping, start
        _native.ffi.release(lease)


@pytest.fixture
def source():
    """8 pages of content, and their address."""
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.write(b"".join(bytes([65 + i]) * PAGE for i in range(8)))
        start, lease = _native.address_of(mapping)
        yield start
        _native.ffi.release(lease)


def test_a_probe_never_raises_and_says_why():
    """Everything switched off is an answer, too."""
    assert probe().rung in (Rung.USER, Rung.FULL)
    nothing = probe("uffd")
    assert (nothing.rung, nothing.features, nothing.why) == (Rung.OFF, Features(0), "switched off")
    lower = probe("full")
    assert lower.rung is Rung.USER
    assert "switched off" in lower.why


def test_missing_pages_are_copied_and_zeroed_and_second_times_are_values(area, source):
    """EEXIST with the bytes done before it, as the kernel gives it: EAGAIN first, then EEXIST at the page."""
    mapping, start = area
    with Userfaultfd() as uffd:
        mask = uffd.register(start, 64 * PAGE)
        assert mask >> 3 & 1, "UFFDIO_COPY is offered"
        assert uffd.copy(start + 2 * PAGE, source, PAGE) == Done(PAGE, 0)
        assert uffd.copy(start, source, 8 * PAGE) == Done(2 * PAGE, errno.EAGAIN)
        assert uffd.copy(start + 2 * PAGE, source, PAGE) == Done(0, errno.EEXIST)
        assert uffd.zeropage(start + 3 * PAGE, PAGE, wake=False) == Done(PAGE, 0)
        assert uffd.zeropage(start + 3 * PAGE, PAGE) == Done(0, errno.EEXIST)
        assert uffd.copy(start + 1, source, PAGE) == Done(0, errno.EINVAL)
        assert mapping[:4] == b"AAAA"
        assert mapping[PAGE : PAGE + 1] == b"B"
        assert mapping[2 * PAGE : 2 * PAGE + 1] == b"A"
        assert mapping[3 * PAGE : 4 * PAGE] == bytes(PAGE)
        uffd.unregister(start, 64 * PAGE)
        assert uffd.copy(start + 9 * PAGE, source, PAGE) == Done(0, errno.ENOENT)


def test_a_fault_of_another_thread_is_read_and_served(area, source):
    """Message, copy, and the sleeper goes on."""
    mapping, start = area
    with Userfaultfd(wanted=Features.THREAD_ID) as uffd:
        uffd.register(start, 64 * PAGE)
        assert uffd.read() == []
        thread = threading.Thread(target=memset, args=(start + 5 * PAGE + 100, 7, 1))
        thread.start()
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        assert poll.poll(10_000)
        [event] = uffd.read()
        assert isinstance(event, Pagefault)
        assert (event.address & -PAGE, event.write, event.wp, event.minor) == (start + 5 * PAGE, True, False, False)
        assert event.tid == thread.native_id
        assert uffd.copy(start + 5 * PAGE, source + PAGE, PAGE, wake=False) == Done(PAGE, 0)
        assert thread.is_alive()
        uffd.wake(start + 5 * PAGE, PAGE)
        thread.join(10)
        assert not thread.is_alive()
        assert mapping[5 * PAGE + 99 : 5 * PAGE + 102] == b"B\x07B"


def test_a_required_feature_that_is_not_there_is_an_error_and_a_wanted_one_is_not():
    """Unknown bits of newer kernels are kept as bits."""
    future = Features(1 << 40)
    with pytest.raises(UffdError) as caught:
        Userfaultfd(required=future)
    assert caught.value.errno == errno.EINVAL
    with Userfaultfd(wanted=future | Features.SIGBUS) as uffd:
        assert uffd.features & Features.SIGBUS == probe().features & Features.SIGBUS
        assert not uffd.features & future
        assert uffd.features <= uffd.offered or uffd.features & uffd.offered == uffd.features


def test_a_range_has_one_userfaultfd(area):
    """The second one gets EBUSY."""
    _, start = area
    with Userfaultfd() as one, Userfaultfd() as two:
        one.register(start, PAGE * 64, Mode.MISSING)
        with pytest.raises(UffdError, match="UFFDIO_REGISTER") as caught:
            two.register(start, PAGE * 64)
        assert caught.value.errno == errno.EBUSY


def test_poison_is_done_where_the_kernel_can(area):
    """UFFDIO_POISON, 6.6; over a present page it is EEXIST."""
    mapping, start = area
    if Features.POISON not in probe().features:
        pytest.skip("no UFFD_FEATURE_POISON")
    with Userfaultfd(required=Features.POISON) as uffd:
        mapping[0] = 1
        uffd.register(start, 64 * PAGE)
        assert uffd.poison(start, PAGE) == Done(0, errno.EEXIST)
        assert uffd.poison(start + PAGE, 2 * PAGE) == Done(2 * PAGE, 0)


def test_closed_is_closed():
    """And twice is fine; the descriptor is close-on-exec and non-blocking."""
    uffd = Userfaultfd()
    fd = uffd.fileno()
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)
    uffd.close()
    uffd.close()
    with pytest.raises(ClosedError):
        uffd.read()
    with pytest.raises(BadValue):
        Userfaultfd(disable="nonsense")
