"""The host of a fleet: starts the guests' processes, keeps the budget, and contains what goes wrong with one of them.

One loop, twenty times a second: read what the guests say, look at the gate (each guest's charge, from memory that its C
core shares with us, not from its messages), let the budget decide, send requests.

What a guest does wrong stays its own:
 - it dies, or is killed: its pidfd tells; its charge goes back to the gate, the others go on
 - it hangs: a process that says nothing for `silence` seconds is killed, and a request that isn't answered by its
   deadline
   is no longer waited for
 - it floods: a tick reads so many messages of each, and no more; the rest waits in its own socket, and then so does it
 - it lies: its figures are shown as its word. Decisions go by the gate, and what a process holds by /proc
 - it sends what isn't a message, or one again: the connection is closed, and the process ended

Nothing is left behind when this process is killed: guests die with it (PR_SET_PDEATHSIG), the gate is a memfd, stores
are files without a name, and the socket's name is gone before the first guest is started: they come by an O_PATH
descriptor of it, through /proc/self/fd.
"""

import contextlib
import fcntl
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from emu.errors import HostError
from emu.fleet.ceiling import Ceiling
from emu.fleet.guest import START
from emu.fleet.scenario import Fleet, Guest
from emu.fleet.wire import Answer, Ask, Bad, Done, Frames, Go, Hello, Message, Row, Status, Stop, encode
from emu.gate import Gate
from emu.host import budget as host_budget
from emu.host.budget import DEFAULT_ORDER, Budget, GuestView, Request
from emu.host.pressure import stall_percent
from emu.observe.environment import environment
from emu.observe.fleet import Believed, FleetResult, GuestResult, Sample
from emu.units import FRAME_SIZE

__all__ = ["run_fleet"]

_TICK = 0.05
_MESSAGES = 64  # of one guest in a tick
_READ = 1 << 18  # bytes of one guest in a tick
_HELLO = 30.0  # seconds in which a guest must have said who it is
_LAST_WORDS = 3.0  # seconds after the fleet's timeout
_END = 20.0  # seconds in which it must have ended when it was told to
_OVER_MAX = 2 << 20  # bytes a vCPU: what forced charges may add to max (csrc/gate.c)
_PREFIX = "emu-fleet-"


def _runtime() -> str:
    return os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()


def _listen() -> tuple[socket.socket, int]:
    """Return a listening socket, and a descriptor of its place: the name is gone when this returns."""
    runtime = _runtime()
    _clear_stale(Path(runtime))
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=runtime)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{lock}/host")
        finally:
            os.umask(before)
        place = os.open("host", os.O_PATH | os.O_CLOEXEC, dir_fd=lock)
        listener.listen(64)
        return listener, place
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _clear_stale(runtime: Path) -> None:
    # of a host that was killed between making its folder and removing it
    for folder in runtime.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


def _peer(conn: socket.socket) -> tuple[int, int]:
    pid, uid, _ = struct.unpack("3i", conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _peak_rss(pid: int) -> int:
    # VmHWM; a process that is gone has had anything
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


@dataclass(eq=False)
class _Guest:
    spec: Guest
    slot: int
    result: GuestResult
    token: str
    process: subprocess.Popen[bytes]
    pidfd: int
    begun: float
    conn: socket.socket | None = None
    frames: Frames = field(default_factory=Frames)
    number: int = 0
    out: bytearray = field(default_factory=bytearray)
    can: frozenset[Request] = frozenset()
    status: Status | None = None
    #: bytes that could be stolen of it, what goes first first, less what it was asked for since
    offer: list[int] = field(default_factory=list)
    heard: float = 0.0
    said_hello: bool = False
    going: bool = False
    done: bool = False
    dead: bool = False


def _less(offer: list[int], size: int) -> list[int]:
    # without the first `size` bytes
    left = []
    for there in offer:
        gone = min(there, size)
        size -= gone
        left.append(there - gone)
    return left


class _Host:
    def __init__(self, fleet: Fleet, command: str, on_sample: Callable[[Sample], None]) -> None:
        self.fleet = fleet
        self.on_sample = on_sample
        self.budget = Budget(
            fleet.limits,
            fleet.order,
            step=fleet.step,
            period=fleet.period,
            deadline=fleet.deadline,
            spread=fleet.spread,
            oldest=fleet.oldest,
            stall_low=fleet.psi_low,
            stall_high=fleet.psi_high,
        )
        self.listener, self.place = _listen()
        self.gate = Gate.create(fleet.max)
        self.ceiling = Ceiling(self.gate, sum(_OVER_MAX * guest.cpus for guest in fleet.guests))
        self.selector = selectors.DefaultSelector()
        self.guests: list[_Guest] = []
        self.asks: dict[int, tuple[_Guest, host_budget.Ask]] = {}
        self.next_ask = 1
        self.t0 = time.monotonic()
        self.told_to_end = False
        self.stall = 0.0
        self.strangers: dict[socket.socket, Frames] = {}
        settings = fleet.model_dump(exclude={"guests"}, mode="json")
        self.result = FleetResult(command, settings, environment(), fleet.max, [])
        self.result.notes += fleet.notes
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)

    @property
    def now(self) -> float:
        return time.monotonic() - self.t0

    # ---- processes

    def start(self, spec: Guest) -> None:
        slot = len(self.guests)
        token = secrets.token_hex(16)
        told = {
            "socket": self.place,
            "gate": self.gate.fileno(),
            "slot": slot,
            "token": token,
            "speed": self.fleet.speed,
            "wait": self.fleet.wait,
            "store": self.fleet.store,
            "store_memory": self.fleet.store_memory,
            **spec.model_dump(include={"name", "ram", "mechanism", "on_return", "workload", "args", "seed", "disk"}),
            **spec.model_dump(include={"service", "cpus"}),
        }
        # the terminal's interrupt is for us: it waits in the guest until that one ignores it
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", START, "emu.fleet.guest", str(os.getpid()), spec.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self.place, self.gate.fileno()),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        result = GuestResult(spec.name, spec.mechanism, spec.workload, spec.ram)
        guest = _Guest(spec, slot, result, token, process, os.pidfd_open(process.pid), self.now)
        guest.heard = self.now
        self.guests.append(guest)
        self.result.guests.append(result)
        self.selector.register(guest.pidfd, selectors.EVENT_READ, lambda: self._died(guest))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its pidfd tells
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.close()

    def _died(self, guest: _Guest) -> None:
        if guest.dead:
            return
        guest.dead = True
        self.selector.unregister(guest.pidfd)
        os.close(guest.pidfd)
        code = guest.process.wait()
        # what it said before it died, its result among it
        if guest.conn is not None:
            self._read(guest, everything=True)
            self._hang_up(guest)
        slot = self.gate.slot(guest.slot)
        guest.result.throttled, guest.result.throttled_seconds = slot.throttled, slot.throttled_seconds
        guest.result.returned_bytes = self.gate.release(guest.slot)
        self.budget.forget(guest.spec.name)
        self.asks = {n: ask for n, ask in self.asks.items() if ask[0] is not guest}
        if not guest.done and guest.result.state == "lost":
            guest.result.state = "killed"
            guest.result.detail = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            guest.result.ended = self.now
        guest.done = True

    def kill(self, guest: _Guest, state: str, detail: str) -> None:
        if guest.result.state == "lost":
            guest.result.state, guest.result.detail, guest.result.ended = state, detail, self.now
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(guest.pidfd, signal.SIGKILL)

    # ---- messages

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                conn, _ = self.listener.accept()
                conn.setblocking(False)
                if _peer(conn)[1] != os.getuid() or len(self.strangers) >= 128:
                    self.result.refused_peers += 1
                    conn.close()
                    continue
                self.strangers[conn] = Frames(limit=4096)
                self.selector.register(conn, selectors.EVENT_READ, lambda conn=conn: self._greeted(conn))

    def _greeted(self, conn: socket.socket) -> None:
        # the first message says which guest this is; it must come from the process that we started
        frames = self.strangers[conn]
        try:
            data = conn.recv(4096)
            if not data:
                raise Bad("malformed", "it hung up")
            frames.feed(data)
            message = frames.take()
            if message is None:
                return
            if not isinstance(message, Hello):
                raise Bad("invalid", "no hello")
            guest = next((g for g in self.guests if secrets.compare_digest(g.token, message.token)), None)
            if guest is None or guest.conn is not None or guest.dead or _peer(conn)[0] != guest.process.pid:
                raise Bad("invalid", "not a guest of ours")
        except BlockingIOError:
            return
        except (Bad, OSError):
            if _peer(conn)[0] not in (guest.process.pid for guest in self.guests):  # its pidfd tells of it
                self.result.refused_peers += 1
            self.selector.unregister(conn)
            del self.strangers[conn]
            conn.close()
            return
        del self.strangers[conn]
        guest.conn, guest.said_hello, guest.heard = conn, True, self.now
        frames.limit = guest.frames.limit
        guest.frames = frames
        guest.can = frozenset(Request(name) for name in message.can)
        # read by the tick from now on, and not whenever there is something: so that a flood finds no open door
        self.selector.unregister(conn)

    def _read(self, guest: _Guest, *, everything: bool = False) -> None:
        # so many messages a tick: who sends more waits in his own socket
        assert guest.conn is not None
        left = 1 << 30 if everything else _MESSAGES
        try:
            while left and guest.conn is not None:
                while left and (message := guest.frames.take()) is not None:
                    left -= 1
                    self._heard(guest, message)
                if left:
                    data = guest.conn.recv(_READ)
                    if not data:
                        self._hang_up(guest)
                        return
                    guest.frames.feed(data)
        except BlockingIOError:
            return
        except Bad as error:
            guest.result.refused[error.reason] = guest.result.refused.get(error.reason, 0) + 1
            if not guest.dead:
                self.kill(guest, "refused", str(error))
            self._hang_up(guest)
        except OSError:
            self._hang_up(guest)

    def _hang_up(self, guest: _Guest) -> None:
        if guest.conn is not None:
            guest.conn.close()
            guest.conn = None

    def _heard(self, guest: _Guest, message: Message) -> None:
        guest.heard = self.now
        result = guest.result
        if isinstance(message, Status):
            guest.status = message
            # what it says while it is being stolen from was counted before
            if not any(g is guest and ask.request is Request.STEAL for g, ask in self.asks.values()):
                guest.offer = message.stealable
            result.peak_rss_bytes = max(result.peak_rss_bytes, message.rss)
            result.swap_out_bytes, result.swap_in_bytes = message.swap_out, message.swap_in
            result.stolen_bytes = message.stolen
            result.disk_read_bytes = message.disk_read
            self._believe(guest, message)
        elif isinstance(message, Row):
            # the first row is the boot; the second one is where it has its memory
            if result.admitted is None and result.started is not None and not message.name.startswith("boot"):
                result.admitted = self.now - result.started
        elif isinstance(message, Answer):
            ask = self.asks.pop(message.ask, None)
            if ask is None or ask[0] is not guest:
                raise Bad("invalid", f"an answer to request {message.ask}, which it doesn't have")
            self.budget.answered(ask[1], message.freed)
        elif isinstance(message, Done):
            if guest.done:
                raise Bad("invalid", "done twice")
            guest.done = True
            result.ended = self.now
            result.state = "failed" if message.error else "ok"
            result.detail = message.error or ""
            result.result = message.result
            result.verified_frames, result.corrupt_frames = message.verified, message.corrupt
        else:
            raise Bad("invalid", f"a {message.type} is the host's to send")

    def _believe(self, guest: _Guest, status: Status) -> None:
        # figures that a host could have, against what the guest's kernel and its accesses know
        ram, b = guest.spec.ram, guest.result.believed
        n, m = b.samples + 1, b.sampled_samples
        balloon = b.balloon + (abs(ram - status.available - status.used) / ram - b.balloon) / n
        rss = b.rss + (abs(status.rss - status.used) / ram - b.rss) / n
        sampled = b.sampled
        if status.sampled is not None and status.touched is not None:
            m += 1
            sampled += (abs(status.sampled - status.touched) / ram - sampled) / m
        guest.result.believed = Believed(n, balloon, rss, m, sampled)
        # More than its process has ever held: a status is up to 0.1 s old, so what it holds now is no measure.
        if status.rss + status.side + status.pool > _peak_rss(guest.process.pid) + (8 << 20):
            guest.result.lies += 1

    def send(self, guest: _Guest, message: Message) -> None:
        if guest.conn is None:
            return
        guest.number += 1
        guest.out += encode(message, guest.number)
        self._flush(guest)

    def _flush(self, guest: _Guest) -> None:
        if guest.conn is None:
            return
        try:
            while guest.out:
                del guest.out[: guest.conn.send(guest.out)]
        except BlockingIOError:
            if len(guest.out) > 1 << 20:  # it doesn't read what it is told
                self.kill(guest, "silent", "it doesn't read its messages")
        except OSError:
            self._hang_up(guest)

    # ---- the loop

    def _views(self) -> list[GuestView]:
        return [
            GuestView(
                guest.spec.name,
                self.gate.slot(guest.slot).charged,
                guest.can,
                tuple(guest.offer),
            )
            for guest in self.guests
            if not guest.dead
        ]

    def _obey_cgroups(self) -> None:
        room = self.ceiling.most({guest.slot: guest.process.pid for guest in self.guests if not guest.dead})
        most = self.fleet.max if room is None else max(min(room, self.fleet.max), FRAME_SIZE)
        self.budget.limits = self.fleet.limits.within(most)
        self.gate.max = most
        if most < self.fleet.max:
            least = self.result.least_max_bytes
            self.result.least_max_bytes = most if least is None else min(least, most)

    def _pressure(self) -> float:
        # what the kernel doesn't tell this time is as it was, and said once
        try:
            if self.fleet.cgroup:
                self._obey_cgroups()
            if self.fleet.psi is not None:
                self.stall = stall_percent(self.fleet.psi)
        except HostError as error:
            if str(error) not in self.result.notes:
                self.result.notes.append(str(error))
        return self.stall

    def _decide(self) -> None:
        stall = self._pressure()
        by_name = {guest.spec.name: guest for guest in self.guests}
        for ask in self.budget.decide(self.now, self._views(), stall):
            guest = by_name[ask.guest]
            number, self.next_ask = self.next_ask, self.next_ask + 1
            self.asks[number] = (guest, ask)
            self.result.first.setdefault(ask.request, self.now)
            within = max(ask.deadline - self.now, 0.0)
            if ask.request is Request.STEAL:
                guest.offer = _less(guest.offer, ask.size)
            self.send(guest, Ask(ask=number, request=ask.request.value, size=ask.size, age=ask.age, within=within))

    def _sample(self) -> None:
        statuses = [guest.status for guest in self.guests if guest.status is not None and not guest.dead]
        result, last = self.result, self.result.samples[-1] if self.result.samples else None
        sample = Sample(
            t=self.now,
            charged=self.gate.charged,
            rss=sum(s.rss for s in statuses),
            side=sum(s.side for s in statuses),
            pool=sum(s.pool for s in statuses),
            swapped=sum(s.swapped for s in statuses),
            used=sum(s.used for s in statuses),
            cached=sum(s.cached for s in statuses),
            evicted=sum(s.evicted for s in statuses),
            disk_read=sum(s.disk_read for s in statuses),
        )
        result.peak_rss_bytes = max(result.peak_rss_bytes, sample.rss)
        if last is not None:
            result.rss_byte_seconds += (sample.t - last.t) * (sample.rss + last.rss) / 2
            second = next((s for s in reversed(result.samples) if s.t <= sample.t - 1), None)
            if second is not None:
                span = sample.t - second.t
                result.peak_evicted_rate = max(result.peak_evicted_rate, (sample.evicted - second.evicted) / span)
                result.peak_disk_rate = max(result.peak_disk_rate, (sample.disk_read - second.disk_read) / span)
        result.samples.append(sample)
        self.on_sample(sample)

    def _tend(self) -> None:
        for i, guest in enumerate(self.guests):
            if guest.dead:
                continue
            self._flush(guest)
            if guest.conn is not None:
                self._read(guest)
            limit = self.fleet.silence if guest.said_hello else _HELLO
            if not guest.dead and self.now - guest.heard > limit:
                # one that was done already stays what it was, but doesn't stay
                guest.result.detail = guest.result.detail or f"nothing heard for {limit:g} s"
                self.kill(guest, "silent", f"nothing heard for {limit:g} s")
            if not guest.going and guest.said_hello and self._may_go(i):
                guest.going = True
                guest.result.started = self.now
                self.send(guest, Go())

    def _may_go(self, i: int) -> bool:
        start = self.guests[i].spec.start
        if start is None:
            return i == 0 or self.guests[i - 1].done
        return self.now >= start and all(guest.said_hello or guest.dead for guest in self.guests)

    def _step(self, timeout: float = _TICK) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()

    def run(self) -> None:
        for spec in self.fleet.guests:
            self.start(spec)
        next_tick = self.now
        while not all(guest.done or guest.dead for guest in self.guests):
            self._step(max(next_tick - self.now, 0.0))
            if self.now < next_tick:
                continue
            if (late := self.now - next_tick) > 1.0:
                # this process was stopped, or its machine slept: so, perhaps, were the guests
                for guest in self.guests:
                    guest.heard += late
            next_tick = self.now + _TICK
            self._tend()
            self._decide()
            self._sample()
            if self.now > self.fleet.timeout:
                self._out_of_time()
        for guest in self.guests:
            self.send(guest, Stop())
        until = self.now + _END
        while not all(guest.dead for guest in self.guests):
            self._step()
            self._tend_the_last(until)

    def _out_of_time(self) -> None:
        # told to end, a guest sends what it has; one that doesn't is ended
        if not self.told_to_end:
            self.told_to_end = True
            for guest in self.guests:
                self.send(guest, Stop())
        elif self.now > self.fleet.timeout + _LAST_WORDS:
            for guest in self.guests:
                if not guest.done and not guest.dead:
                    self.kill(guest, "silent", f"the fleet's timeout of {self.fleet.timeout:g} s is over")

    def _tend_the_last(self, until: float) -> None:
        for guest in self.guests:
            if not guest.dead:
                self._flush(guest)
                if self.now > until:
                    self.kill(guest, "silent", "it didn't end when it was told to")

    def close(self) -> None:
        for guest in self.guests:
            if not guest.dead:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(guest.pidfd, signal.SIGKILL)
                guest.process.wait()
                os.close(guest.pidfd)
                guest.dead = True
            self._hang_up(guest)
        for conn in self.strangers:
            conn.close()
        self.selector.close()
        self.listener.close()
        os.close(self.place)
        self.gate.close()

    def finish(self) -> FleetResult:
        result, budget = self.result, self.budget
        result.seconds = self.now
        wanted = [request for line in budget.lines for request in line.requests]
        nobody = [r.value for r in wanted if not any(r in guest.can for guest in self.guests)]
        if self.fleet.order == DEFAULT_ORDER and Request.STEAL.value in nobody:
            nobody.remove(Request.STEAL.value)  # nobody has asked for it
        if nobody:
            result.notes.append(f"no guest could be asked for: {', '.join(nobody)}")
        result.peak_charged_bytes = self.gate.peak
        result.asked = {request.value: n for request, n in budget.asked.items()}
        result.answered = {request.value: n for request, n in budget.answers.items()}
        result.late = {request.value: n for request, n in budget.late.items()}
        result.freed = {request.value: n for request, n in budget.freed.items()}
        return result


def run_fleet(
    fleet: Fleet, *, command: str = "", on_sample: Callable[[Sample], None] = lambda sample: None
) -> FleetResult:
    """Run a fleet to its end: until every guest's workload is done, or it is dead. Whatever happens, no process is
    left.

    Raises HostError if the fleet can't be started at all.
    """
    try:
        host = _Host(fleet, command, on_sample)
    except OSError as error:
        raise HostError(f"no socket for the fleet in {_runtime()} (XDG_RUNTIME_DIR): {error.strerror}") from error
    try:
        host.run()
        return host.finish()
    finally:
        host.close()
