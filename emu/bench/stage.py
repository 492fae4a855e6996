"""The stage that a row is measured on: which cores, and whether a second thread of the process is running.

The measuring thread is pinned to the first core. The second thread hashes a large buffer on the second one, over and
over, with Python's lock released: it never waits for the measuring thread, nor that one for it.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from emu.bench.reference import Reference
from emu.errors import HostError

__all__ = ["Stage"]

_BUFFER = bytes(8 << 20)  # some 5 ms a hash: how long ending the thread may take


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
        stop = threading.Event()
        runner = None
        if second_thread:
            runner = threading.Thread(target=self._run, args=(stop, self.second_cpu), daemon=True)
            runner.start()
        try:
            os.sched_setaffinity(0, mine)
            self.reference.place(mine, self.second_cpu if second_thread else None)
            yield
        finally:
            stop.set()
            if runner is not None:
                runner.join()
            os.sched_setaffinity(0, before)
            self.reference.place(self.cpus)

    @staticmethod
    def _run(stop: threading.Event, cpu: int) -> None:
        os.sched_setaffinity(0, [cpu])  # of this thread
        while not stop.is_set():
            hashlib.sha256(_BUFFER)
