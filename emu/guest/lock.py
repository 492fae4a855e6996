"""The big kernel lock: one thread at a time is in the guest's kernel.

The guest kernel is single-threaded by design. Calls from several Python threads are serialised here, as a guest with
one CPU would serialise them; work in parallel is for the C loops (`threads=`). Reentrant, since a call may run timers.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["KernelLock", "in_kernel"]

KernelLock = threading.RLock

P = ParamSpec("P")
R = TypeVar("R")


class _HasLock(Protocol):
    kernel_lock: Any


S = TypeVar("S", bound=_HasLock)


def in_kernel(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method enter the kernel: it holds its object's kernel_lock."""

    @functools.wraps(method)
    def locked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.kernel_lock:
            return method(self, *args, **kwargs)

    return locked
