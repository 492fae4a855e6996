"""A guest's process: its machine and workload in the main thread, and the host's hand in two others.

It reads what it is to be from descriptor 0, as one line of JSON.

The link thread talks to the host: a status every 0.1 s, requests in, answers out. It never takes the guest kernel's
lock, so a guest that is busy, or hangs, is still heard of. Requests are done by the hand: epochs and purges in the
guest's kernel, for whose lock they wait; taking memory without asking needs none.

The process dies with its host, and its memory with it: what sees to that (START) comes before all imports, since they
take a second, and many on a machine that is busy. The parent is compared afterwards: it may have died before. A
terminal's interrupt is for the host, who ends us; it has it blocked until here.

A guest that waits for memory at the gate can't do what it is asked for: its one CPU is in the fault, as a real vCPU
that the host throttles would be. So epochs and purges take from the others, and a guest alone at max is left to
swapping.
"""

import contextlib
import dataclasses
import json
import os
import queue
import select
import socket
import sys
import threading
import time
from typing import Any, Literal

from emu.errors import EmuError
from emu.fleet.wire import Answer, Ask, Bad, Done, Frames, Go, Hello, Message, Row, Status, Stop, encode
from emu.gate import Gate
from emu.host.stealing import KINDS
from emu.machine import Machine
from emu.mechanisms import Mechanism, make_mechanism
from emu.mechanisms.swap import SwapMechanism
from emu.observe.snapshot import Snapshot
from emu.units import FRAME_SIZE
from emu.workloads.registry import make_workload
from emu.workloads.runner import Stopped, run

__all__ = ["main"]

_STATUS = 0.1  # seconds
_OFFER = 0.5  # seconds between two looks at what could be stolen
_SCAN = 5.0  # guest seconds between two looks at accessed bits
#: what the process runs, with the host's pid and the guest's name as arguments
START = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[2]):
    os._exit(3)
from emu.fleet.guest import main
sys.exit(main())
"""


class Link:
    """The socket to the host, shared by the threads that send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._number = 0
        self.frames = Frames()

    def send(self, message: Message) -> None:
        """Send one message. A host that is gone ends the process: there is nobody to be a guest of."""
        with self._lock:
            self._number += 1
            try:
                self._sock.sendall(encode(message, self._number))
            except OSError:
                os._exit(3)

    def receive(self, timeout: float) -> list[Message]:
        """Return what has come within a time."""
        readable, _, _ = select.select([self._sock], [], [], timeout)
        if readable:
            data = self._sock.recv(1 << 16)
            if not data:
                os._exit(3)
            self.frames.feed(data)
        messages = []
        while (message := self.frames.take()) is not None:
            messages.append(message)
        return messages


class GuestProcess:
    """One guest of a fleet."""

    def __init__(self, link: Link, machine: Machine, settings: dict[str, Any]) -> None:
        self.link = link
        self.machine = machine
        self.settings = settings
        self.go = threading.Event()
        self.stop = threading.Event()
        # with the time until which each is waited for
        self._asks: queue.SimpleQueue[tuple[Ask, float]] = queue.SimpleQueue()
        self._takes: queue.SimpleQueue[tuple[Ask, float]] = queue.SimpleQueue()
        self._offer: list[int] = []
        self._offer_due = 0.0
        self._steals = 0

    @property
    def can(self) -> list[Literal["steal", "epoch", "purge", "swap"]]:
        """What this guest can be asked for."""
        can: list[Literal["steal", "epoch", "purge", "swap"]] = []
        if self.machine.host.stealing is not None:
            can.append("steal")
        if self.machine.guest.pressure is not None:
            can += ["epoch", "purge"]
        if self.machine.ram.has_store:
            can.append("swap")
        return can

    # ---- the threads

    def start(self) -> None:
        """Start them; they end with the process."""
        for name, body in (("link", self._talk), ("hand", self._ask), ("take", self._take)):
            threading.Thread(target=self._guarded, args=(body,), name=f"emu-{name}", daemon=True).start()

    def _guarded(self, body: Any) -> None:
        try:
            body()
        except Bad as error:
            print(f"emu fleet guest: the host's message was refused: {error}", file=sys.stderr)
            os._exit(4)
        except EmuError as error:  # the machine was closed under us: the main thread is ending
            if not self.stop.is_set():
                print(f"emu fleet guest: {error}", file=sys.stderr)
                os._exit(5)

    def _talk(self) -> None:
        due = time.monotonic()
        while not self.stop.is_set():
            now = time.monotonic()
            if now >= due:
                self.link.send(self._status())
                due = now + _STATUS
            for message in self.link.receive(max(due - time.monotonic(), 0.0)):
                if isinstance(message, Go):
                    self.go.set()
                elif isinstance(message, Stop):
                    self.stop.set()
                elif isinstance(message, Ask):
                    due_by = time.monotonic() + message.within
                    (self._takes if message.request in ("steal", "swap") else self._asks).put((message, due_by))

    def _status(self) -> Status:
        machine = self.machine
        ram, guest = machine.ram, machine.guest
        stats, store = ram.stats(), ram.store
        working_set = machine.host.working_set
        seen = working_set.estimates if working_set is not None else []
        evicted = (
            guest.pressure.counters["epoch_freed"] + guest.pressure.counters["purge_freed"] if guest.pressure else 0
        )
        return Status(
            t=max(machine.clock.now(), 0.0),
            rss=ram.look().rss,
            side=ram.side_bytes,
            pool=store.pool_resident,
            swapped=store.pages * FRAME_SIZE,
            used=max(guest.used_bytes, 0),
            cached=max(guest.cached_bytes, 0),
            free=max(guest.free_bytes, 0),
            available=max(guest.available_bytes, 0),
            sampled=seen[-1].sampled if seen else None,
            touched=seen[-1].truth if seen else None,
            disk_read=guest.vmstat["pgpgin"] * 1024,
            evicted=evicted * FRAME_SIZE,
            throttled=stats["gate_throttled"],
            swap_out=stats["swap_out_frames"] * FRAME_SIZE,
            swap_in=stats["swap_in_frames"] * FRAME_SIZE,
            stolen=sum(stats[f"steal_{kind}"] for kind in KINDS) * FRAME_SIZE,
            stealable=self._offered(),
        )

    def _offered(self) -> list[int]:
        # a walk over all frames in memory: not for every status
        if self.machine.host.stealing is None:
            return []
        steals = self._steals
        if time.monotonic() >= self._offer_due:
            self._offer = self.machine.host.stealing.offer()
            # one that was counted while some of it was taken is old already
            self._offer_due = time.monotonic() + _OFFER if steals == self._steals else 0.0
        return self._offer

    def _ask(self) -> None:
        while True:
            ask, until = self._asks.get()
            driver = self.machine.guest.pressure
            freed = 0
            # the guest was too busy for it until nobody waited any more: then there is nothing to be done
            with self.machine.guest.kernel_lock, contextlib.suppress(EmuError):
                if driver is not None and time.monotonic() < until:
                    freed = driver.purge() if ask.request == "purge" else driver.epoch(ask.age, ask.size)
            self.link.send(Answer(ask=ask.ask, freed=freed))

    def _take(self) -> None:
        while True:
            ask, until = self._takes.get()
            freed = 0
            with contextlib.suppress(EmuError):
                if time.monotonic() < until:
                    freed = self._take_without_asking(max(ask.size, FRAME_SIZE), swap=ask.request == "swap")
            self._steals += 1
            self._offer_due = 0.0  # it has less to offer now
            self.link.send(Answer(ask=ask.ask, freed=freed))

    def _take_without_asking(self, size: int, *, swap: bool) -> int:
        # what the guest doesn't need, or can have again, goes before anything is swapped
        host, freed = self.machine.host, 0
        if host.stealing is not None:
            freed = host.steal(size)
        if swap and freed < size and self.machine.ram.has_store:
            freed += host.swap_out(size - freed)
        return freed

    # ---- the guest

    def run(self) -> None:
        """Wait for the word, run the workload, and live on until the fleet ends."""
        machine, settings = self.machine, self.settings
        self._idle(self.go)
        error, result = None, None
        if not self.stop.is_set():
            try:
                result = run(
                    machine,
                    make_workload(settings["workload"], settings["args"], settings["seed"]),
                    seed=settings["seed"],
                    command="",
                    on_step=self._row,
                    on_sample=self._sample,
                ).as_json()
                error = result["error"]
            except EmuError as failed:
                error = str(failed)
        counts = (result or {}).get("verified_frames", 0), (result or {}).get("corrupt_frames", 0)
        self.link.send(
            Done(verified=counts[0], corrupt=counts[1], result=result, error=None if error is None else error[:4000])
        )
        self._idle(self.stop)

    def _row(self, name: str) -> None:
        self.link.send(Row(name=name[:4096], t=max(self.machine.clock.now(), 0.0)))

    def _sample(self, snapshot: Snapshot) -> None:
        if self.stop.is_set():
            raise Stopped(snapshot)

    def _idle(self, until: threading.Event) -> None:
        # its timers go on: reporting, aging, the flusher
        while not (until.is_set() or self.stop.is_set()):
            self.machine.run_for(0.05 * self.machine.clock.speed)


def _mechanism(settings: dict[str, Any]) -> Mechanism:
    # swap without a file of its own uses the fleet's
    mechanism = make_mechanism(settings["mechanism"])
    if isinstance(mechanism, SwapMechanism) and mechanism.file is None:
        memory = settings["store_memory"] if mechanism.memory is None else mechanism.memory
        return dataclasses.replace(mechanism, file=settings["store"], memory=memory)
    return mechanism


def _machine(settings: dict[str, Any]) -> Machine:
    gate = Gate(settings["gate"])
    machine = Machine(
        settings["ram"],
        _mechanism(settings),
        disk=settings["disk"],
        disk_read_only=True,
        on_return=settings["on_return"],
        speed=settings["speed"],
        service=settings["service"],
        cpus=settings["cpus"],
    )
    try:
        gate.attach(machine.ram, settings["slot"], deadline=settings["wait"])
        stores = settings["store"] is not None or settings["store_memory"] is not None
        if machine.ram.aside_how != "none":
            if stores and not machine.ram.has_store:
                machine.ram.open_store(settings["store_memory"], file=settings["store"])
                machine.host.track_idle(_SCAN)
            machine.host.watch_working_set(period=2.0, window=10.0, seed=settings["seed"])
    except BaseException:
        machine.close()
        raise
    return machine


def main() -> int:
    """Be the guest that descriptor 0 describes."""
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(f"/proc/self/fd/{settings['socket']}")
    link = Link(sock)
    hello = {"name": settings["name"], "token": settings["token"], "pid": os.getpid()}
    try:
        machine = _machine(settings)
    except EmuError as error:  # it is a guest that failed, and not a process that died
        link.send(Hello(**hello, can=[]))
        link.send(Done(verified=0, corrupt=0, result=None, error=str(error)[:4000]))
        return 1
    with machine:
        process = GuestProcess(link, machine, settings)
        link.send(Hello(**hello, can=process.can))
        process.start()
        process.run()
    return 0
