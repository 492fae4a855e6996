"""What can go wrong, in few classes that carry data and say what to do.

Bad input is a `BadValue` (a ValueError) with the value and the limit in its one line. A guest's own mistake is a
`GuestError`. What the kernel refuses is a `UffdError` with its errno. Memory that can't be read is a
`GuestMemoryError` with the frame. Only the CLI prints and exits.
"""

import errno as _errno
import os

__all__ = [
    "AllocatorError",
    "BadValue",
    "ClosedError",
    "DiscardFault",
    "EmuError",
    "ForkedError",
    "GuestError",
    "GuestIOError",
    "GuestMemoryError",
    "HostError",
    "OomKilled",
    "OutOfMemory",
    "RangeError",
    "ServiceDeadError",
    "UffdError",
]


_EHWPOISON = 133  # include/uapi/asm-generic/errno.h; Python's errno module doesn't have it


class EmuError(Exception):
    """Root of all errors that emu raises."""


class BadValue(EmuError, ValueError):
    """An argument that can't be: the message names the value and the limit."""


class RangeError(BadValue):
    """Frames outside the RAM, or named twice in one call.

    Attributes: gfn, count (frames), frames (of the RAM).
    """

    def __init__(self, message: str, *, gfn: int = 0, count: int = 0, frames: int = 0) -> None:
        super().__init__(message)
        self.gfn = gfn
        self.count = count
        self.frames = frames


class ClosedError(EmuError):
    """Use after close()."""


class ForkedError(EmuError):
    """Use in a forked child: the RAM is not inherited, and its faults would not be served there."""


class HostError(EmuError):
    """The machine can't give what was asked: a limit, a missing feature, a refused system call."""


class UffdError(HostError, OSError):
    """A userfaultfd operation failed. Attributes: errno, operation, done (bytes finished before the error)."""

    def __init__(self, errno: int, operation: str, *, done: int = 0, hint: str = "") -> None:
        super().__init__(errno, f"{operation}: {os.strerror(errno)}" + (f"; {hint}" if hint else ""))
        self.operation = operation
        self.done = done

    def __str__(self) -> str:
        return str(self.strerror)


class ServiceDeadError(HostError):
    """The fault service's thread has ended: missing frames were poisoned, close the RAM."""


class GuestMemoryError(EmuError):
    """An access met a frame that can't be served: poisoned, taken behind our back, or no memory for it.

    Attributes: gfn; errno (EHWPOISON, EFAULT, ENOMEM); done (frames, or bytes of a read or write, finished before).
    """

    def __init__(self, errno: int, gfn: int, done: int) -> None:
        why = {
            _EHWPOISON: "the frame is poisoned (LOST): its content is gone; ram.unpoison() makes it usable again",
            _errno.EFAULT: "the frame's page was taken behind our back (a madvise on the mapping?)",
            _errno.ENOMEM: "the host has no memory for it (a cgroup's limit, or a budget's max for too long)",
            _errno.ENODATA: "the host has taken it while its owner could make it anew: make it anew",
            _errno.EIO: "the store couldn't be read; the content is still there, and may be read later",
        }.get(errno, os.strerror(errno))
        super().__init__(f"guest frame {gfn:#x}: {why}")
        self.errno = errno
        self.gfn = gfn
        self.done = done


class DiscardFault(GuestMemoryError):
    """An access met a frame that the host has taken while it was the guest's to lose: a clean page of the page cache.

    The guest drops that page from its cache, and reads it again. Overwriting the whole frame needs nothing of the kind.
    """


class GuestError(EmuError):
    """The guest did something wrong, or can't do what was asked of it."""


class AllocatorError(GuestError):
    """A double free, a free with the wrong order, a pfn outside. The allocator is unchanged.

    Attributes: pfn, order.
    """

    def __init__(self, message: str, *, pfn: int, order: int) -> None:
        super().__init__(message)
        self.pfn = pfn
        self.order = order


class OutOfMemory(GuestError):
    """The guest has no free frames above its min watermark. Attributes: order, wanted and free (frames)."""

    def __init__(self, message: str, *, order: int, wanted: int, free: int) -> None:
        super().__init__(message)
        self.order = order
        self.wanted = wanted
        self.free = free


class OomKilled(OutOfMemory):
    """The guest's OOM killer has ended the process that asked for memory. Attributes: pid, and OutOfMemory's."""

    def __init__(self, message: str, *, pid: int, order: int, wanted: int, free: int) -> None:
        super().__init__(message, order=order, wanted=wanted, free=free)
        self.pid = pid


class GuestIOError(GuestError, OSError):
    """A guest's system call on a file failed. Attributes: errno, path (in the guest), offset (bytes)."""

    def __init__(self, errno: int, path: str, what: str, *, offset: int = 0) -> None:
        super().__init__(errno, f"{path}: {what}: {os.strerror(errno)}")
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        return str(self.strerror)
