"""Frames by name: what one holds, what a vCPU does to it, and what happened to some."""

import enum
from dataclasses import dataclass

from emu._native import lib

__all__ = ["EVENT_TYPES", "Cause", "Event", "FrameState", "Op", "Said", "StealPolicy", "Usage"]


class FrameState(enum.IntEnum):
    """What a frame holds, as the host knows it (csrc/state.c)."""

    ZERO = lib.EMU_ZERO
    ZEROMAP = lib.EMU_ZEROMAP
    RESIDENT = lib.EMU_RESIDENT
    LAZY = lib.EMU_LAZY
    BUSY = lib.EMU_BUSY
    LOST = lib.EMU_LOST
    ASIDE = lib.EMU_ASIDE
    PRESERVED = lib.EMU_PRESERVED
    DISCARDED = lib.EMU_DISCARDED


class Usage(enum.IntEnum):
    """What the guest says of a frame's content (CMM2; csrc/usage.c)."""

    STABLE = lib.EMU_STABLE
    UNUSED = lib.EMU_UNUSED
    VOLATILE = lib.EMU_VOLATILE
    POTENTIALLY_VOLATILE = lib.EMU_POTENTIAL


class Cause(enum.IntEnum):
    """Why it was said: the place in the guest's kernel."""

    FREE = lib.EMU_CAUSE_FREE
    ALLOC = lib.EMU_CAUSE_ALLOC
    READ = lib.EMU_CAUSE_READ
    WRITEBACK = lib.EMU_CAUSE_WRITEBACK
    LOOKUP = lib.EMU_CAUSE_LOOKUP
    PUT = lib.EMU_CAUSE_PUT
    SINK = lib.EMU_CAUSE_SINK
    MAP = lib.EMU_CAUSE_MAP
    MKWRITE = lib.EMU_CAUSE_MKWRITE
    UNMAP = lib.EMU_CAUSE_UNMAP
    PIN = lib.EMU_CAUSE_PIN
    COW = lib.EMU_CAUSE_COW
    DISCARDED = lib.EMU_CAUSE_DISCARDED
    OTHER = lib.EMU_CAUSE_OTHER


class Said(enum.IntEnum):
    """What came of saying it: changed; it was so; it may not be; it can't be stable, since it was discarded."""

    CHANGED = lib.EMU_SAID
    ALREADY = lib.EMU_SAID_ALREADY
    REFUSED = lib.EMU_SAID_REFUSED
    GONE = lib.EMU_SAID_GONE


class StealPolicy(enum.IntEnum):
    """Which frames of a kind the host takes first: the oldest, in turn, or any."""

    AGE = lib.EMU_STEAL_BY_AGE
    ROUND = lib.EMU_STEAL_ROUND
    RANDOM = lib.EMU_STEAL_AT_RANDOM


class Op(enum.IntEnum):
    """What a vCPU loop does to each frame (csrc/vcpu.c).

    SET takes a byte, FILL and VERIFY a seed; COPY copies from the frame that is the range's key.
    """

    TOUCH_READ = lib.EMU_TOUCH_READ
    TOUCH_WRITE = lib.EMU_TOUCH_WRITE
    SET = lib.EMU_SET
    FILL = lib.EMU_FILL
    VERIFY = lib.EMU_VERIFY
    COPY = lib.EMU_COPY


@dataclass(frozen=True, slots=True)
class Event:
    """A record of the event ring: ns of CLOCK_MONOTONIC, what, the first frame, frames, and an argument.

    Of a discard and its sisters: the first frame of the call's first range, and the frames taken in all its ranges.
    """

    ns: int
    type: str
    gfn: int
    count: int
    arg: int


#: the core's numbers -> Event.type
EVENT_TYPES = {
    getattr(lib, f"EMU_EV_{name.upper()}"): name
    for name in (
        "discard",
        "lazy_free",
        "lazy_drop",
        "poison",
        "lost_fault",
        "service_died",
        "aside",
        "aside_drop",
        "swap_out",
        "swap_failed",
        "swap_corrupt",
        "steal",
        "fault",
    )
}
