"""The plain C references (benchmarks/*.c) as a coprocess: built once, then one line in and one line out per measure.

A process of its own: so its SIGBUS handler, its mappings and its threads are nobody else's.
"""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from emu.errors import HostError

__all__ = ["SOURCES", "Reference"]

#: where a clone has them; an installed package doesn't
SOURCES = Path(__file__).resolve().parents[2] / "benchmarks"


class Reference:
    """The running reference. sources: the folder that holds its Makefile. Raises HostError if it can't be built."""

    def __init__(self, sources: Path = SOURCES) -> None:
        if not (sources / "Makefile").is_file():
            raise HostError(f"no {sources}/Makefile: the bench needs a clone of the project (script/bench)")
        made = subprocess.run(["make", "-s", "-C", str(sources)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise HostError(f"the references in {sources} can't be built: {made.stderr.strip() or made.stdout.strip()}")
        #: the core of a second, always running thread during measures, and what makes our own sleep meanwhile
        self.beside: tuple[int, Callable[[], AbstractContextManager[None]]] | None = None
        build = sources / "build"
        #: benchmarks/loops.c: loops over pages of ours
        self.loops = ctypes.CDLL(str(build / "loops.so"))
        self._process = subprocess.Popen(
            [str(build / "reference")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _ask(self, line: str) -> int:
        process = self._process
        stdin, stdout, stderr = _pipe(process.stdin), _pipe(process.stdout), _pipe(process.stderr)
        try:
            stdin.write(line + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise HostError(f"the reference failed at {line!r}: {stderr.read().strip() or 'no answer'}")
        return int(answer)

    def measure(self, name: str, *, pages: int, run: int = 0, threads: int = 1, cpu: int = -1) -> int:
        """Run one measure; return the ns of its timed stretch. cpu: where a service thread runs."""
        line = f"{name} {pages} {run} {threads} {cpu}"
        if self.beside is None:
            return self._ask(line)
        core, ours_paused = self.beside
        with ours_paused():
            self._ask(f"spin {core}")
            try:
                return self._ask(line)
            finally:
                self._ask("spin -1")

    def place(self, cpus: Sequence[int]) -> None:
        """Run on these cores from now on."""
        self._ask("cpus " + ",".join(map(str, cpus)))

    def close(self) -> None:
        """End the coprocess, and wait for it."""
        _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        _pipe(self._process.stderr).close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
