"""The big kernel lock: one thread at a time is in the guest's kernel.

The guest kernel is single-threaded by design. Calls from several Python threads are serialised here, as a guest with
one CPU would serialise them; work in parallel is for the C loops (`threads=`). Reentrant, since a call may run timers.
"""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["KernelLock", "as_current", "in_kernel"]


class KernelLock:
    """A reentrant lock that is free in a forked child, where its holder may not exist."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self.lock.release()

    def renew(self) -> None:
        """Forget who holds it."""
        self.lock = threading.RLock()


_locks: "weakref.WeakSet[KernelLock]" = weakref.WeakSet()


def _forked() -> None:
    for lock in list(_locks):
        lock.renew()


os.register_at_fork(after_in_child=_forked)

P = ParamSpec("P")
R = TypeVar("R")


class _HasLock(Protocol):
    kernel_lock: Any


S = TypeVar("S", bound=_HasLock)


class _OfProcess(_HasLock, Protocol):
    process: Any


M = TypeVar("M", bound=_OfProcess)


def as_current(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Make a method enter the kernel on behalf of its object's process, which is `current` meanwhile."""

    @functools.wraps(method)
    def entered(self: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.kernel_lock.lock:
            kernel = self.process.kernel
            before, kernel.current = kernel.current, self.process
            try:
                return method(self, *args, **kwargs)
            finally:
                kernel.current = before

    return entered


def in_kernel(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method enter the kernel: it holds its object's kernel_lock."""

    @functools.wraps(method)
    def locked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.kernel_lock.lock:  # not the object: its methods are Python, and this is every call's way in
            return method(self, *args, **kwargs)

    return locked
