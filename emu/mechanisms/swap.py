"""swap: the host takes memory without asking, and keeps its content in a store. The reference: what one wants to avoid.

Decided by the host; no guest code runs. It doesn't know what the guest still needs: free memory and clean cache are
compressed and written like anything else, and read again before the guest overwrites them (N. Amit et al., VSwapper,
ASPLOS 2014).

Settings: max (bytes of pages, copies and pool that it is held to by the charge gate, the host's tables not among them;
without it the store is there and nothing takes), memory (of the pool for compressed pages; as large as the RAM by
default), file (a directory, or a file, of the host for what the pool has no room for), file_size (as large as the RAM),
readahead (pages, 8), scan (between two looks at accessed bits, 5s), deadline (that an access waits for memory, 30s).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.gate import Gate
from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, SWAP_ARROWS, Arrow
from emu.observe.pagemap import Stage
from emu.reclaim import DEFAULT_READAHEAD
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size

__all__ = ["SwapMechanism"]


def _size(name: str) -> Callable[[str], int]:
    return lambda text: parse_size(text, f"swap {name}")


@dataclass(frozen=True, slots=True)
class SwapMechanism:
    """The store, and who fills it.

    Sizes are bytes, times seconds: scan of the guest's clock, deadline of the wall's.
    """

    max: int | None = None
    memory: int | None = None
    file: str | None = None
    file_size: int | None = None
    readahead: int = DEFAULT_READAHEAD
    scan: float = 5.0
    deadline: float = 30.0

    name: ClassVar[str] = "swap"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "max": _size("max"),
        "memory": _size("memory"),
        "file": str,
        "file_size": _size("file_size"),
        "readahead": int,
        "scan": lambda text: parse_duration(text, "swap scan"),
        "deadline": lambda text: parse_duration(text, "swap deadline"),
    }
    chain: ClassVar[tuple[Stage, ...]] = (*GUEST_CHAIN, Stage.SWAPPED)
    arrows: ClassVar[tuple[Arrow, ...]] = (*GUEST_ARROWS, *SWAP_ARROWS)

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Open the store, start the worker, and hold the RAM to `max`. The guest doesn't learn of it."""
        if not 0.1 <= self.scan <= 3600:
            raise BadValue(f"swap scan {self.scan!r} s must be from 0.1 to 3600")
        if self.file_size is not None and self.file is None:
            raise BadValue("swap file_size needs a file")
        ram = host.ram
        if not ram.has_store:
            ram.open_store(self.memory, file=self.file, file_size=self.file_size, readahead=self.readahead)
        elif self._differs(ram.store_settings):
            raise BadValue("this guest's store is open with other settings, and can't be changed: start a new machine")
        ram.start_swapd()
        if self.max is not None:
            gate = host.gate or Gate.create(self.max)
            gate.max = self.max
            if host.gate is None:
                try:
                    gate.attach(ram, 0, deadline=self.deadline)
                except BaseException:
                    gate.close()
                    raise
                host.gate = gate
        host.track_idle(self.scan)

    def _differs(self, settings: tuple[Any, ...] | None) -> bool:
        mine = (self.memory, self.file, self.file_size, None if self.readahead == DEFAULT_READAHEAD else self.readahead)
        return settings is not None and any(a is not None and a != b for a, b in zip(mine, settings, strict=True))

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Take no more. What is in the store comes back as it is touched."""
        host.end_idle()
        if host.gate is not None:
            host.gate.max = 1 << 62

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """The limit, what is stored and in how much, and the traffic."""
        stats, store = host.ram.stats(), host.ram.store
        return [
            ("max", "-" if self.max is None else format_size(self.max)),
            ("stored", format_size(store.pages * FRAME_SIZE)),
            ("pool", f"{format_size(store.pool_bytes)}, file {format_size(store.file_bytes)}"),
            ("out, in", f"{stats['swap_out_frames']:,}, {stats['swap_in_frames']:,}"),
            ("throttled", f"{stats['gate_throttled']:,}"),
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Nothing is on its way by itself."""
        return False
