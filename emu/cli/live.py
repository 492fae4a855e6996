"""emu run --live: the view on a terminal, its keys, and the terminal given back as it was found, whatever happens.

There is no second thread. The machine calls the view in the guest's own thread, between native calls and while it
sleeps (Machine.watch); the view takes a snapshot, draws, reads the keys, and meanwhile the guest's clock stands still.
So what is drawn is a moment between two steps of the guest, nothing races, and looking costs wall time that is measured
and shown, and no guest time. (Loops that only touch go in shorter parts meanwhile, and lose some per cent by it.) The
time between two looks is at least twenty times what the last one took.

In a pipe there is a plain line each second instead.
"""

import contextlib
import dataclasses
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live

from emu.clock import ScaledClock
from emu.errors import EmuError
from emu.frames import Event
from emu.machine import Machine
from emu.mechanisms import MECHANISMS, Mechanism
from emu.observe.pagemap import PageMap
from emu.observe.snapshot import Snapshot
from emu.report.live import LiveState, compose, map_cells, plain_line
from emu.units import format_size, seconds_text
from emu.workloads.runner import Stopped

__all__ = ["View", "open_view"]

_SHARE = 20  # of the time, at most one part in so many is spent on looking
_SHORTEST = 0.1  # seconds between two looks
_SPEEDS = (0.1, 1000.0)


class View(Protocol):
    """What the runner tells a view, and the view's life as a context."""

    def on_step(self, name: str) -> None: ...

    def on_sample(self, snapshot: Snapshot) -> None: ...

    def ended(self) -> None:
        """The run is over: show its last state, and on a terminal wait until it has been seen."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def open_view(machine: Machine, title: str, console: Console) -> View:
    """Return the view for where the output goes: a terminal, or a pipe."""
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalView(machine, title, console)
    return PlainView(machine, title, console)


def _event_text(event: Event) -> str:
    what = event.type.replace("_", " ")
    if event.type == "service_died":
        return f"the fault service died: {os.strerror(event.arg)}"
    return f"{what} from gfn {event.gfn:#x}: {event.count:,} frames, {format_size(event.count * 4096)}"


class _Watching:
    """What both views do: keep a LiveState up to date at a bounded cost."""

    def __init__(self, machine: Machine, title: str, console: Console) -> None:
        self._machine = machine
        self._console = console
        self._started = time.monotonic()
        self._next = 0.0
        self.state = LiveState(title, unicode=console.encoding.lower().startswith("utf"))

    def on_step(self, name: str) -> None:
        # at the time of its row, which has just been sampled
        at = self.state.snapshot.t if self.state.snapshot else self._machine.clock.now()
        self.state.events.append((at, name))

    def _guest_time_stands(self) -> contextlib.AbstractContextManager[None]:
        clock = self._machine.clock
        return clock.stopped() if isinstance(clock, ScaledClock) else contextlib.nullcontext()

    def _take(self, snapshot: Snapshot) -> None:
        for event in self._machine.ram.events():
            self.state.events.append((snapshot.t, _event_text(event)))
        self.state.add(snapshot)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        now = time.monotonic()
        state = self.state
        state.look_seconds = now - start
        state.looked_seconds += now - start
        state.looks += 1
        state.run_seconds = now - self._started
        self._next = now + max(_SHORTEST, _SHARE * state.look_seconds)


class PlainView(_Watching):
    """A line a second."""

    def __init__(self, machine: Machine, title: str, console: Console) -> None:
        super().__init__(machine, title, console)
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._machine.watch(self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if not self._machine.ram.closed:
            self._machine.watch(None)

    def _look(self, idle: bool) -> None:
        if time.monotonic() < max(self._next, self._next_line):
            return
        self._next_line = time.monotonic() + 1.0
        with self._guest_time_stands(), self._timed():
            self._take(self._machine.snapshot())
            self._print(plain_line(self.state))

    def on_step(self, name: str) -> None:
        super().on_step(name)
        self._print(f"t {seconds_text(self.state.events[-1][0]):>7}  -- {name}")

    def on_sample(self, snapshot: Snapshot) -> None:
        self._take(snapshot)

    def ended(self) -> None:
        self._print(plain_line(self.state))

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)


class _Keys:
    """Single keys from a terminal, without waiting for a line; nothing when stdin isn't one."""

    def __init__(self, file: TextIO) -> None:
        self._fd = file.fileno() if file.isatty() else -1
        self._saved: Any = None

    def start(self) -> None:
        if self._fd >= 0:
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSANOW)

    def stop(self) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
            self._saved = None

    @property
    def there(self) -> bool:
        return self._fd >= 0

    def read(self, timeout: float = 0.0) -> str:
        """Return what was typed; "" for nothing."""
        if self._fd < 0:
            time.sleep(timeout)
            return ""
        if not select.select([self._fd], [], [], timeout)[0]:
            return ""
        data = os.read(self._fd, 64)
        if not data:  # the terminal is gone
            self._fd = -1
        return data.decode(errors="ignore")


class TerminalView(_Watching):
    """The view on a terminal's alternate screen."""

    def __init__(self, machine: Machine, title: str, console: Console) -> None:
        super().__init__(machine, title, console)
        self._live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
        self._keys = _Keys(sys.stdin)
        self._first = machine.mechanism
        self.state.keys = self._keys.there
        self._paused = False
        self._pause_after: int | None = None  # passes of reporting
        self._suspended = False
        self._size = (0, 0)
        self._former: Any = None
        self._ended = False

    # ---- the terminal

    def __enter__(self) -> Self:
        # a former handler of None isn't Python's, and can't be put back; one that ignores (no job control) stays
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self._former = signal.signal(signal.SIGTSTP, self._on_stop)
        try:
            self._show()
            self._machine.watch(self._look)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._leave()
        if not self._machine.ram.closed:
            self._machine.watch(None)

    def _leave(self) -> None:
        self._hide()
        if self._former is not None:
            signal.signal(signal.SIGTSTP, self._former)
            self._former = None

    def _show(self) -> None:
        self._keys.start()
        self._live.start()

    def _hide(self) -> None:
        try:
            self._live.stop()
        finally:
            self._keys.stop()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._suspended = True  # the terminal is given back in _look, not in the middle of a line

    def _suspend(self) -> None:
        self._suspended = False
        self._hide()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._show()
        self._size = (0, 0)

    # ---- looking

    def _look(self, idle: bool) -> None:
        with self._guest_time_stands():
            if self._suspended:
                self._suspend()
            self._press(self._keys.read(), idle)
            if self._pause_after is not None and self._passes() >= self._pause_after:
                self._pause_after = None
                self._pause(True)
            if time.monotonic() >= self._next:
                self._draw_now()
            if self._paused:
                self._stay(idle)

    def _stay(self, idle: bool) -> None:
        # until the user goes on
        self._draw_now()
        while self._paused:
            if self._suspended:
                self._suspend()
            typed = self._keys.read(timeout=0.1)
            self._press(typed, idle)
            if typed or self._console.size != self._size:
                self._draw_now()
            if not self._keys.there:  # and so nobody to go on
                self._pause(False)

    def _draw_now(self) -> None:
        with self._timed():
            width, height = self._console.size
            self._take(self._machine.snapshot(cells=map_cells(width, height)))
            self._draw()

    def _draw(self) -> None:
        self._size = self._console.size
        width, height = self._size
        self._live.update(Group(*compose(self.state, width, height)), refresh=True)

    def on_sample(self, snapshot: Snapshot) -> None:
        # the runner's samples are for its table and carry no map: the last one drawn stays
        last = self.state.snapshot
        self.state.add(snapshot if last is None else _with_map(snapshot, last.page_map))

    def ended(self) -> None:
        if self._ended:  # the user has seen enough
            return
        last = self.state.snapshot
        with self._guest_time_stands():
            width, height = self._console.size
            if last is not None:
                # the numbers are the final sample's; only the map is taken now, of the same state
                now = self._machine.snapshot(cells=map_cells(width, height))
                self.state.snapshot = _with_map(last, now.page_map)
            self._ended = True
            self.state.status = "ended"
            self.state.message = "ended: q leaves, and prints the table" if self._keys.there else ""
            self._draw()
            while self._keys.there and "q" not in self._keys.read(timeout=0.1):
                if self._suspended:
                    self._suspend()
                if self._console.size != self._size:
                    self._draw()

    # ---- keys

    def _press(self, keys: str, idle: bool) -> None:
        for key in keys:
            self.state.message = ""
            if key == "q":
                self._ended = True
                raise Stopped(self._machine.snapshot(exact=True))
            if key == " ":
                self._pause(not self._paused)
            elif key in "+-":
                self._faster(2.0 if key == "+" else 0.5)
            elif key == "s":
                self._step(idle)
            elif key == "m":
                self._next_mechanism(idle)
            elif key in "?h":
                self.state.help = not self.state.help
            else:
                continue
            self._next = 0.0

    def _pause(self, on: bool) -> None:
        self._paused = on
        self.state.status = "paused" if on else "running"

    def _faster(self, factor: float) -> None:
        clock = self._machine.clock
        if not isinstance(clock, ScaledClock):
            self.state.message = "guest time is stepped here: it has no speed"
            return
        clock.set_speed(min(max(clock.speed * factor, _SPEEDS[0]), _SPEEDS[1]))
        self.state.events.append((clock.now(), f"speed {clock.name}"))

    def _passes(self) -> int:
        return self._machine.stats().get("report_passes", 0)

    def _step(self, idle: bool) -> None:
        reporting = self._machine.guest.reporting
        if reporting is None:
            self.state.message = f"mechanism {self._machine.mechanism.name} makes no passes"
            return
        self._pause_after = self._passes() + 1
        self._pause(False)
        clock = self._machine.clock
        if reporting.next_pass is None:
            self.state.message = "on to the next pass: one is queued when enough has been freed"
        elif idle and isinstance(clock, ScaledClock):
            clock.skip_to(reporting.next_pass)

    def _next_mechanism(self, idle: bool) -> None:
        if not idle:
            self.state.message = "the guest is busy: m works while it waits"
            return
        # the one that the run began with keeps its settings
        others = [name for name in MECHANISMS if name != self._first.name]
        known: list[Mechanism | str] = [self._first, *others]
        now = self._machine.mechanism
        at = 0 if now is self._first else known.index(now.name)
        new = known[(at + 1) % len(known)]
        try:
            self._machine.switch_mechanism(new)
        except EmuError as error:
            self.state.message = str(error)
            return
        self._pause_after = None
        self.state.events.append((self._machine.clock.now(), f"mechanism {self._machine.mechanism.name}"))


def _with_map(snapshot: Snapshot, page_map: PageMap | None) -> Snapshot:
    return dataclasses.replace(snapshot, page_map=page_map)
