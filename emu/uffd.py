"""A typed binding of userfaultfd(2), useful by itself.

    with Userfaultfd(required=Features.SIGBUS) as uffd:
        uffd.register(address, length, Mode.MISSING)
        done = uffd.copy(destination, source, length)      # Done(bytes, errno): partial results are values

Opening walks the privilege ladder: full by system call (CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1), full by
/dev/userfaultfd (file permission, Linux 6.1), user-mode-only (anybody, 5.11; a system call on a missing page then gives
EFAULT). `rung`, `door` and `why` tell which one it was and what kept it from the higher ones.

Fill operations never raise for what the kernel reports about pages (EEXIST, EAGAIN, ENOENT, ESRCH ...): they return how
far they got and the errno, and the caller decides. A page touched by a Python thread that holds the GIL can't be served
by another Python thread; serve such memory from C (`emu.GuestRam`), or from another process.

Source: userfaultfd(2), ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h of Linux 6.18.
"""

import enum
import errno
import os
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from emu import _native
from emu._native import ffi, lib
from emu.errors import ClosedError, UffdError

__all__ = [
    "Done",
    "Event",
    "Features",
    "Fork",
    "Mode",
    "Pagefault",
    "Remap",
    "Remove",
    "Rung",
    "Unknown",
    "Unmap",
    "Userfaultfd",
    "probe",
]


class Features(enum.IntFlag, boundary=enum.KEEP):
    """UFFD_FEATURE_*: bits of the handshake. Bits of newer kernels are kept, not errors."""

    PAGEFAULT_FLAG_WP = lib.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = lib.UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = lib.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = lib.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = lib.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = lib.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = lib.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = lib.UFFD_FEATURE_SIGBUS
    THREAD_ID = lib.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = lib.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = lib.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = lib.UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = lib.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = lib.UFFD_FEATURE_WP_UNPOPULATED
    POISON = lib.UFFD_FEATURE_POISON
    WP_ASYNC = lib.UFFD_FEATURE_WP_ASYNC
    MOVE = lib.UFFD_FEATURE_MOVE


NO_FEATURES = Features(0)


class Mode(enum.IntFlag, boundary=enum.KEEP):
    """UFFDIO_REGISTER_MODE_*: which accesses of a range raise faults."""

    MISSING = lib.UFFDIO_REGISTER_MODE_MISSING
    WP = lib.UFFDIO_REGISTER_MODE_WP
    MINOR = lib.UFFDIO_REGISTER_MODE_MINOR


class Rung(enum.IntEnum):
    """What this process may do with userfaultfd, worst to best."""

    OFF = lib.EMU_RUNG_OFF
    USER = lib.EMU_RUNG_USER
    FULL = lib.EMU_RUNG_FULL


class Done(NamedTuple):
    """How far an operation got: bytes finished, and the errno that stopped it (0 = nothing did)."""

    bytes: int
    errno: int


@dataclass(frozen=True, slots=True)
class Pagefault:
    """A missing, write-protect or minor fault. tid is 0 unless THREAD_ID was negotiated."""

    address: int
    write: bool
    wp: bool
    minor: bool
    tid: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; fd is the child's userfaultfd, and the receiver owns it."""

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap moved length bytes."""

    old: int
    new: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise took [start, end) away. From now on it reads as zero, whatever was there."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """munmap took [start, end) away."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """An event of a newer kernel: its number and the raw message."""

    event: int
    raw: bytes


Event = Pagefault | Fork | Remap | Remove | Unmap | Unknown

_MESSAGE = 32


def _decode(raw: bytes) -> Event:
    event, a, b, c = struct.unpack("<B7xQQQ", raw)
    if event == lib.UFFD_EVENT_PAGEFAULT:
        return Pagefault(
            address=b,
            write=bool(a & lib.UFFD_PAGEFAULT_FLAG_WRITE),
            wp=bool(a & lib.UFFD_PAGEFAULT_FLAG_WP),
            minor=bool(a & lib.UFFD_PAGEFAULT_FLAG_MINOR),
            tid=c & 0xFFFFFFFF,
        )
    if event == lib.UFFD_EVENT_FORK:
        return Fork(a & 0xFFFFFFFF)
    if event == lib.UFFD_EVENT_REMAP:
        return Remap(a, b, c)
    if event == lib.UFFD_EVENT_REMOVE:
        return Remove(a, b)
    if event == lib.UFFD_EVENT_UNMAP:
        return Unmap(a, b)
    return Unknown(event, raw)


def _open(want: Rung, off: frozenset[str]) -> tuple[int, Rung, str, str]:
    info = ffi.new("struct emu_uffd_info *")
    fd = -errno.EOPNOTSUPP if "uffd" in off else lib.emu_uffd_open(want, _native.disable_mask(off), info)
    switched_off = errno.EOPNOTSUPP
    why = []
    for name, err in (
        ("full by system call", info.full_errno),
        ("full by /dev/userfaultfd", info.device_errno),
        ("user-mode-only", info.user_errno),
    ):
        if err:
            why.append(f"{name}: {'switched off' if err == switched_off else os.strerror(err)}")
    if "uffd" in off:
        why = ["switched off"]
    elif "full" in off and want == Rung.FULL:
        why.insert(0, "full: switched off")
    door = {lib.EMU_DOOR_SYSCALL: "system call", lib.EMU_DOOR_DEVICE: "/dev/userfaultfd"}.get(info.door, "")
    return fd, Rung(info.rung), door, "; ".join(why)


@dataclass(frozen=True, slots=True)
class Probe:
    """What userfaultfd can do here. features is empty on Rung.OFF; why says what kept it from a higher rung."""

    rung: Rung
    door: str
    features: Features
    why: str


def probe(disable: str | frozenset[str] = frozenset()) -> Probe:
    """Return what can be had, by trying; never raises for what the kernel refuses."""
    fd, rung, door, why = _open(Rung.FULL, _native.disabled(disable))
    if fd < 0:
        return Probe(Rung.OFF, "", Features(0), why or os.strerror(-fd))
    try:
        features, ioctls = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        err = lib.emu_uffd_api(fd, 0, features, ioctls)
        return Probe(rung, door, Features(0 if err else features[0]), why)
    finally:
        os.close(fd)


class Userfaultfd:
    """One userfaultfd: opened, handshaken, closed with the object.

    required: features without which opening raises UffdError(EINVAL). wanted: taken where the kernel has them;
    `features` says what was got. rung: the highest to try for.
    """

    _fd = -1

    def __init__(
        self,
        *,
        required: Features = NO_FEATURES,
        wanted: Features = NO_FEATURES,
        rung: Rung = Rung.FULL,
        disable: str | frozenset[str] = frozenset(),
    ) -> None:
        off = _native.disabled(disable)
        # A second handshake on one descriptor is EINVAL: what exists is asked on one that is thrown away.
        offered = probe(off).features
        if missing := required & ~offered:
            raise UffdError(errno.EINVAL, "userfaultfd", hint=f"this kernel or process lacks {missing!r}")
        fd, self.rung, self.door, self.why = _open(rung, off)
        if fd < 0:
            raise UffdError(-fd, "userfaultfd", hint=self.why)
        features, ioctls = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        err = lib.emu_uffd_api(fd, required | (wanted & offered), features, ioctls)
        if err:
            os.close(fd)
            raise UffdError(-err, "UFFDIO_API")
        self._fd = fd
        #: features negotiated; `offered` is all that the kernel has
        self.features = required | (wanted & offered)
        self.offered = Features(features[0])
        self.ioctls: int = ioctls[0]

    def fileno(self) -> int:
        """Return the descriptor (for poll, or to send over a socket). Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("this userfaultfd is closed")
        return self._fd

    def close(self) -> None:
        """Close the descriptor. A thread asleep on one of its pages wakes to a page of zeros: wake it first."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def register(self, start: int, length: int, mode: Mode = Mode.MISSING) -> int:
        """Register a range; return the mask of ioctls that it allows (bit n = ioctl n)."""
        ioctls = ffi.new("uint64_t *")
        self._raise(lib.emu_uffd_register(self.fileno(), start, length, mode, ioctls), "UFFDIO_REGISTER")
        return int(ioctls[0])

    def unregister(self, start: int, length: int) -> None:
        """Unregister a range. A thread asleep there wakes to a page of zeros."""
        self._raise(lib.emu_uffd_unregister(self.fileno(), start, length), "UFFDIO_UNREGISTER")

    def wake(self, start: int, length: int) -> None:
        """Wake whoever sleeps on a fault in the range; those whose page is still missing fault again."""
        self._raise(lib.emu_uffd_wake(self.fileno(), start, length), "UFFDIO_WAKE")

    def copy(self, dst: int, src: int, length: int, *, wake: bool = True) -> Done:
        """Make [dst, dst + length) present with the bytes at src."""
        mode = 0 if wake else lib.UFFDIO_COPY_MODE_DONTWAKE
        done = ffi.new("int64_t *")
        return self._done(lib.emu_uffd_copy(self.fileno(), dst, src, length, mode, done), done)

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> Done:
        """Map the shared zero page over the range."""
        mode = 0 if wake else lib.UFFDIO_ZEROPAGE_MODE_DONTWAKE
        done = ffi.new("int64_t *")
        return self._done(lib.emu_uffd_zeropage(self.fileno(), start, length, mode, done), done)

    def poison(self, start: int, length: int, *, wake: bool = True) -> Done:
        """Make every access to the range raise SIGBUS, until it is unmapped or MADV_DONTNEED'd (Linux 6.6)."""
        mode = 0 if wake else lib.UFFDIO_POISON_MODE_DONTWAKE
        done = ffi.new("int64_t *")
        return self._done(lib.emu_uffd_poison(self.fileno(), start, length, mode, done), done)

    def read(self, most: int = 64) -> list[Event]:
        """Return up to `most` waiting messages; an empty list when there are none (the descriptor never blocks)."""
        buffer = bytearray(most * _MESSAGE)
        n = lib.emu_uffd_read(self.fileno(), ffi.from_buffer(buffer), len(buffer))
        if n == -errno.EAGAIN:
            return []
        self._raise(min(n, 0), "reading a userfaultfd")
        return [_decode(bytes(buffer[i : i + _MESSAGE])) for i in range(0, n, _MESSAGE)]

    @staticmethod
    def _done(err: int, done: "ffi.CData") -> Done:
        return Done(int(done[0]), -err)

    @staticmethod
    def _raise(err: int, operation: str) -> None:
        if err:
            raise UffdError(-err, operation)
