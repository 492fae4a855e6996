"""The stage that a row is measured on: which cores, and whether a second thread of the process is running.

The measuring thread is pinned to the first core. The second thread computes a long hash on the second one, over and
over, with Python's lock released and no memory to speak of: it never waits for the measuring thread, nor that one for
it. The reference's process has a spinning thread of its own, which runs during its measures only; meanwhile ours
sleeps, since two on one core would run half of the time each.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from emu.bench.reference import Reference
from emu.errors import HostError

__all__ = ["Stage"]

_ROUNDS = 5000  # of the hash, some 2 ms: how long it takes until the thread sleeps


class _Runner:
    """A thread that runs, but for while it is paused."""

    def __init__(self, cpu: int) -> None:
        self._change = threading.Condition()
        self._wanted, self._running, self._ended = True, False, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._thread.native_id is not None
        try:
            os.sched_setaffinity(self._thread.native_id, [cpu])
        except OSError as error:
            self.end()
            raise HostError(f"no thread can run on core {cpu}: {error.strerror}") from None

    def _run(self) -> None:
        while True:
            with self._change:
                self._running = self._wanted
                self._change.notify_all()
                if self._ended:
                    return
                if not self._wanted:
                    self._change.wait()
                    continue
            hashlib.pbkdf2_hmac("sha256", b"emu", b"bench", _ROUNDS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._want(False)
        try:
            yield
        finally:
            self._want(True)

    def _want(self, running: bool) -> None:
        with self._change:
            self._wanted = running
            self._change.notify_all()
            if not self._change.wait_for(lambda: self._running is running, timeout=10):
                raise HostError("the second thread doesn't answer")

    def end(self) -> None:
        with self._change:
            self._ended = True
            self._change.notify_all()
        self._thread.join()


class Stage:
    """Cores and the reference. With fewer than two cores, rows that need a second one raise HostError."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.cpus = sorted(os.sched_getaffinity(0))

    @property
    def cpu(self) -> int:
        """The core of the measuring thread."""
        return self.cpus[0]

    @property
    def second_cpu(self) -> int:
        """The core of whatever runs beside it."""
        if len(self.cpus) < 2:
            raise HostError("a second core is needed, and this process may use one only")
        return self.cpus[1]

    @contextmanager
    def placed(self, *, second_thread: bool = False, both: bool = False) -> Iterator[None]:
        """Pin this thread and the reference's to the first core, or, with `both`, allow them the first two.

        second_thread: keep one running on the second core, on either side.
        """
        before = os.sched_getaffinity(0)
        mine = [self.cpu, self.second_cpu] if both else [self.cpu]
        runner = _Runner(self.second_cpu) if second_thread else None
        try:
            os.sched_setaffinity(0, mine)
            self.reference.place(mine)
            if runner is not None:
                self.reference.beside = (self.second_cpu, runner.paused)
            yield
        finally:
            self.reference.beside = None
            if runner is not None:
                runner.end()
            os.sched_setaffinity(0, before)
            self.reference.place(self.cpus)
