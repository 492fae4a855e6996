"""Gate: a budget in bytes that several guest RAMs share, in one process or in many, held at the fault (csrc/gate.c).

A gate lives in a memfd: whoever has the descriptor can map it. Each RAM takes a slot; charges go there before a frame
is installed, and wait, up to a deadline, when the sum of the slots would go over `max`. A process that dies leaves its
slot charged: release() gives that back.

Charged are frames that hold memory of the host's (the zero page among them, since a write makes it a page without a
fault), copies left aside, and the store's pool. Up to 64 frames a RAM are stock: charged, and not yet used.
"""

import mmap
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from emu import _native
from emu._native import ffi, lib
from emu.errors import BadValue, HostError
from emu.ram import GuestRam
from emu.units import FRAME_SIZE, parse_size

__all__ = ["Gate", "GateSlot"]

_SIZE = ffi.sizeof("struct emu_gate")
SLOTS = lib.EMU_GATE_SLOTS


@dataclass(frozen=True, slots=True)
class GateSlot:
    """A slot: bytes charged, charges that had to wait and how long (s), and those that waited in vain."""

    charged: int
    throttled: int
    throttled_seconds: float
    failed: int


class Gate:
    """A gate, made by create() or mapped by open()."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._lease: Any = None
        try:
            if os.fstat(fd).st_size < _SIZE:
                raise HostError(f"descriptor {fd} isn't a gate: it is too short")
            self._map = mmap.mmap(fd, _SIZE)
        except OSError as error:
            raise HostError(f"mapping the gate: {error.strerror}") from error
        address, self._lease = _native.address_of(self._map)
        self._gate = ffi.cast("struct emu_gate *", address)

    @classmethod
    def create(cls, limit: int | str) -> Self:
        """Make one. limit: bytes or text, at least a frame."""
        frames = parse_size(limit, "gate max") // FRAME_SIZE
        if frames < 1:
            raise BadValue(f"gate max {limit!r} must be at least a frame, {FRAME_SIZE} bytes")
        fd = os.memfd_create("emu-gate", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        gate = cls(fd)
        lib.emu_gate_init(gate._native(), frames)
        return gate

    def _native(self) -> Any:
        if self._map is None:
            raise HostError("this gate is closed")
        return self._gate

    def fileno(self) -> int:
        """Return the descriptor, to be handed to another process."""
        return self._fd

    def attach(self, ram: GuestRam, slot: int, *, deadline: float = 10.0) -> None:
        """Charge a RAM's frames from now on, and those that it has. deadline: seconds that a charge waits.

        A charge that waits in vain makes the access fail: GuestMemoryError with ENOMEM. The gate must stay open for as
        long as the RAM. Raises BadValue, HostError.
        """
        self._check(slot)
        if not 0 <= deadline <= 3600:
            raise BadValue(f"gate deadline {deadline!r} s must be from 0 to 3600")
        ram.attach_gate(self._native(), slot, int(deadline * 1000), self)

    @staticmethod
    def _check(slot: int) -> None:
        if not 0 <= slot < SLOTS:
            raise BadValue(f"gate slot {slot!r} must be from 0 to {SLOTS - 1}")

    @property
    def max(self) -> int:
        """Bytes above which charges wait. May be set."""
        return int(self._native().max) * FRAME_SIZE

    @max.setter
    def max(self, size: int | str) -> None:
        frames = parse_size(size, "gate max") // FRAME_SIZE
        if frames < 1:
            raise BadValue(f"gate max {size!r} must be at least a frame, {FRAME_SIZE} bytes")
        lib.emu_gate_set_max(self._native(), frames)

    @property
    def charged(self) -> int:
        """Bytes charged, all slots."""
        return int(lib.emu_gate_charged(self._native())) * FRAME_SIZE

    @property
    def peak(self) -> int:
        """The most that was charged at once, in bytes."""
        return int(self._native().peak) * FRAME_SIZE

    def slot(self, slot: int) -> GateSlot:
        """Return what a slot says."""
        self._check(slot)
        seen = ffi.new("struct emu_gate_slot *")
        lib.emu_gate_slot_read(self._native(), slot, seen)
        return GateSlot(seen.charged * FRAME_SIZE, seen.throttled, seen.throttled_ns / 1e9, seen.failed)

    def release(self, slot: int) -> int:
        """Give back what a dead process had charged; return the bytes."""
        self._check(slot)
        return int(lib.emu_gate_release(self._native(), slot)) * FRAME_SIZE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it, and close its descriptor.

        Every RAM that it was attached to must be closed. A second call does nothing.
        """
        mapping, self._map = self._map, None
        if mapping is None:
            return
        ffi.release(self._lease)
        mapping.close()
        os.close(self._fd)
