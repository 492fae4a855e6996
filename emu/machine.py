"""Machine: one guest on one host, with one mechanism between them, on one clock."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from emu.clock import Clock, make_clock
from emu.errors import BadValue, ClosedError
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.mechanisms import Mechanism, make_mechanism
from emu.observe.chain import ASIDE_ARROWS, RETURN_ARROWS, Arrow
from emu.observe.pagemap import Stage, take_page_map
from emu.observe.snapshot import Snapshot, take_snapshot
from emu.observe.usages import take_usage_view
from emu.observe.vmstat import read_vmstat
from emu.ram import GuestRam
from emu.units import FRAME_SIZE, parse_duration

__all__ = ["DEFAULT_SPEED", "Machine"]

_CLOCK = ("now", "sleep_until", "name", "speed")  # emu.clock.Clock
_SLICE = 0.05  # seconds of sleep between two looks of a watcher
DEFAULT_SPEED = 10.0  # guest seconds a second: reporting alone takes 30 of them


class Machine:
    """A machine.

    ram: bytes or text. mechanism: NAME[:key=value,...], or a Mechanism. disk: a directory, or an image file, of the
    host; nothing in it is written if disk_read_only, or unless the guest writes. on_return: what the host does with
    returned memory, "now", "grace:SECONDS", "lazy" or "lazy:aside". clock, or speed: a factor, "real", or "step";
    without either, guest time runs 10 times as fast. guest_thp: the guest's transparent huge page setting. cpus: the
    guest's. service, uffd, fault_around, service_cpu, write_tracking, disable: as in GuestRam.

    The guest's kernel is single-threaded: calls from several threads wait for each other. Ctrl-C in the middle of a
    guest's work leaves that guest, as a real one, in no state to go on: close it.

    Raises BadValue for arguments, HostError for what this machine can't give.
    """

    def __init__(
        self,
        ram: int | str = "1GiB",
        mechanism: str | Mechanism = "none",
        *,
        disk: str | Path | None = None,
        disk_read_only: bool = False,
        on_return: str = "now",
        clock: Clock | None = None,
        speed: float | str | None = None,
        guest_thp: Literal["always", "madvise", "never"] = "madvise",
        cpus: int = 1,
        service: Literal["auto", "inline", "thread"] = "auto",
        uffd: Literal["auto", "full", "user", "off"] = "auto",
        fault_around: int = 1,
        service_cpu: int | None = None,
        write_tracking: bool = False,
        disable: str | Iterable[str] = (),
    ) -> None:
        if clock is not None and speed is not None:
            raise BadValue("give a clock or a speed, not both")
        if not isinstance(mechanism, str) and not hasattr(mechanism, "attach"):
            raise BadValue(f"mechanism {mechanism!r} is neither a name nor a Mechanism")
        if clock is not None and (lacks := [name for name in _CLOCK if not hasattr(clock, name)]):
            raise BadValue(f"clock {clock!r} has no {', '.join(lacks)}")
        self.mechanism = make_mechanism(mechanism) if isinstance(mechanism, str) else mechanism
        self.clock = clock or make_clock(DEFAULT_SPEED if speed is None else speed)
        self._closed = False
        self._watcher: Callable[[bool], None] | None = None
        self._ram = GuestRam(
            ram,
            service=service,
            uffd=uffd,
            fault_around=fault_around,
            service_cpu=service_cpu,
            write_tracking=write_tracking,
            disable=disable,
        )
        try:
            self._host = Hypervisor(self._ram, now=self.clock.now, on_return=on_return)
            self._guest = GuestKernel(self._ram, self.clock, thp=guest_thp, cpus=cpus)
            if disk is not None:
                self._guest.mount(self._host.add_disk(disk, read_only=disk_read_only))
            self.mechanism.attach(self._guest, self._host)
        except BaseException:
            for opened in self._host.disks if hasattr(self, "_host") else ():
                opened.close()
            self._ram.close()
            if hasattr(self, "_host"):
                self._host.close()
            raise

    # ---- parts

    @property
    def ram(self) -> GuestRam:
        """The guest's memory."""
        return self._ram

    @property
    def guest(self) -> GuestKernel:
        """The guest's kernel. Raises ClosedError after close()."""
        self._check()
        return self._guest

    @property
    def host(self) -> Hypervisor:
        """The host. Raises ClosedError after close()."""
        self._check()
        return self._host

    def add_disk(self, path: str | Path, at: str, *, read_only: bool = False) -> None:
        """Mount another disk: a directory or an image file of the host, below `at` in the guest. Raises BadValue."""
        self.guest.mount(self.host.add_disk(path, read_only=read_only), at)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("this machine is closed")
        self._ram.check()

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        if self._closed:
            return
        self._ram.close()
        self._closed = True
        self._guest.close()
        self._host.close()

    def __enter__(self) -> Self:
        self._check()
        return self

    def __repr__(self) -> str:
        return f"<Machine {self._ram!r}, {self.mechanism.name}, clock {self.clock.name}>"

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- time

    def run_for(self, seconds: float | str) -> None:
        """Let guest time pass; the guest's timers run as they come due."""
        self._check()
        self._run_until(self.clock.now() + parse_duration(seconds), lambda: False)

    def settle(self, timeout: float | str = 600.0) -> bool:
        """Let guest time pass until nothing is on its way back, or timeout guest seconds; return whether it settled."""
        self._check()
        return self._run_until(
            self.clock.now() + parse_duration(timeout, "timeout"),
            lambda: not (self.mechanism.pending(self._guest) or self._host.discard.pending),
        )

    def _run_until(self, end: float, done: Callable[[], bool]) -> bool:
        while not done():
            dues = [
                due for due in (self._guest.next_timer, self._host.timers.next_due) if due is not None and due <= end
            ]
            self._sleep_until(min(dues, default=end))
            self._guest.run_timers()
            with self._guest.kernel_lock:  # what comes back in another thread goes aside, too
                self._host.run_timers()
            if not dues:
                return done()
        return True

    def _sleep_until(self, t: float) -> None:
        if self._watcher is None:
            self.clock.sleep_until(t)
            return
        while (now := self.clock.now()) < t:
            self.clock.sleep_until(min(t, now + _SLICE * self.clock.speed))
            self._watcher(True)

    def watch(self, watcher: Callable[[bool], None] | None) -> None:
        """Have a function called, in the guest's own thread, some 20 times a second; None ends it.

        It hears whether the guest is idle: True between its calls and timers, False in the middle of its work, where it
        may look, and raise to stop the run, and do nothing else. While it is there vCPU loops of one thread go in parts
        of 8 MiB, which costs some per cent of what only touches.
        """
        self._check()
        self._watcher = watcher
        self._ram.between = None if watcher is None else lambda: watcher(False)

    def switch_mechanism(self, mechanism: str | Mechanism) -> None:
        """Go on with another mechanism on the same state: the guest keeps its memory, what was given back stays so.

        Raises BadValue for one that the guest would have to be booted for, and changes nothing.
        """
        self._check()
        new = make_mechanism(mechanism) if isinstance(mechanism, str) else mechanism
        if getattr(new, "poison", None) != getattr(self.mechanism, "poison", None):
            raise BadValue("page poisoning is decided when a guest boots: start a new machine for it")
        with self._guest.kernel_lock:
            old = self.mechanism
            old.detach(self._guest, self._host)
            try:
                new.attach(self._guest, self._host)
            except BaseException:
                old.attach(self._guest, self._host)
                raise
            self.mechanism = new

    # ---- watching

    @property
    def rss_bytes(self) -> int:
        """Resident bytes of the guest's RAM, from the kernel."""
        self._check()
        return self._ram.rss_bytes

    @property
    def lazyfree_bytes(self) -> int:
        """Of those, what the kernel may drop without an event, from the kernel."""
        self._check()
        return self._ram.lazyfree_bytes

    @property
    def footprint_bytes(self) -> int:
        """What the host really holds for this guest: RSS, frames aside, the store's pool, tables."""
        return self.host.footprint_bytes

    def snapshot(self, *, exact: bool = False, cells: int = 0) -> Snapshot:
        """Return a picture of now.

        Above 512 MiB resident, RSS is asked of the kernel where something may have changed, and in rotation elsewhere
        (GuestRam.look); exact: of all of it, by smaps, which takes 6 ms a GiB. cells: add a map of the RAM in at most
        so many cells.
        """
        self._check()
        with self._guest.kernel_lock:
            return take_snapshot(
                self._guest,
                self._host,
                t=self.clock.now(),
                clock=self.clock.name,
                mechanism=self.mechanism.name,
                panel=self.mechanism.panel(self._guest, self._host),
                chain=self.mechanism.chain,
                arrows=self._arrows,
                exact=exact,
                cells=cells,
            )

    @property
    def _arrows(self) -> tuple[Arrow, ...]:
        # a policy that keeps what comes back has ways of its own
        own = self.mechanism.arrows
        if self._host.discard.policy in ("now", "lazy") or ASIDE_ARROWS[0] in own:
            return own
        return (*own, *RETURN_ARROWS)

    def chain(self) -> dict[str, int]:
        """Return the bytes of guest RAM by stage (emu.observe.pagemap.Stage); they add up to the RAM."""
        self._check()
        with self._guest.kernel_lock:
            totals = take_page_map(self._guest, self._ram).totals
        return {stage.name.lower(): n * FRAME_SIZE for stage, n in zip(Stage, totals, strict=True)}

    def stats(self) -> dict[str, int]:
        """Return all counters, of guest, host and core."""
        self._check()
        return read_vmstat(self._guest, self._host, take_usage_view(self._host.ram))

    def describe(self) -> dict[str, Any]:
        """Return what a measurement must say of itself: service, placement, rung, clock, policy."""
        self._check()
        ram = self._ram
        return {
            "clock": self.clock.name,
            "service": ram.service,
            "service_cpu": ram.service_cpu,
            "fault_around": ram.fault_around,
            "uffd": ram.rung.name.lower(),
            "process_madvise": ram.vectored,
            "on_return": self._host.discard.policy,
            "aside": ram.aside_how,
            "store": ram.store_text if ram.has_store else None,
            "disks": [repr(disk) for disk in self._host.disks],
        }
