"""virtio-balloon's vocabulary (virtio 1.3, section 5.5; include/uapi/linux/virtio_balloon.h).

Free page *hinting* (the host starts a run, for migration) and free page *reporting* (the guest reports by itself) are
two things with two queues.
"""

import enum
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "CMD_ID_DONE",
    "CMD_ID_STOP",
    "DEVICE_ID",
    "PFN_SHIFT",
    "Config",
    "DeviceQueues",
    "Driver",
    "Entry",
    "Feature",
    "Queue",
    "StatTag",
    "decode_stats",
    "encode_stats",
    "queue_indices",
]

DEVICE_ID = 5
PFN_SHIFT = 12  # balloon frames are 4 KiB, whatever the guest's page size


class Feature(enum.IntFlag):
    """VIRTIO_BALLOON_F_*: by value, 1 << bit number."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    PAGE_REPORTING = 1 << 5


class Queue(enum.IntEnum):
    """Virtqueues in the order in which they are numbered."""

    INFLATE = 0
    DEFLATE = 1
    STATS = 2
    FREE_PAGE = 3
    REPORTING = 4


_QUEUE_FEATURE = {
    Queue.STATS: Feature.STATS_VQ,
    Queue.FREE_PAGE: Feature.FREE_PAGE_HINT,
    Queue.REPORTING: Feature.PAGE_REPORTING,
}


def queue_indices(negotiated: Feature) -> dict[Queue, int]:
    """Return the index of each queue that exists: only negotiated ones are numbered.

    So with reporting alone its queue is 2, not 4: what drivers and devices do, whatever the table in the standard says.
    """
    present = [q for q in Queue if q not in _QUEUE_FEATURE or _QUEUE_FEATURE[q] in negotiated]
    return {queue: index for index, queue in enumerate(present)}


class StatTag(enum.IntEnum):
    """VIRTIO_BALLOON_S_*: 0 to 9 are the standard's, 10 to 15 Linux's."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJFLT = 2
    MINFLT = 3
    MEMFREE = 4
    MEMTOT = 5
    AVAIL = 6
    CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9
    OOM_KILL = 10
    ALLOC_STALL = 11
    ASYNC_SCAN = 12
    DIRECT_SCAN = 13
    ASYNC_RECLAIM = 14
    DIRECT_RECLAIM = 15


@dataclass(slots=True)
class Config:
    """The device's configuration space: four le32. num_pages is the host's target, actual the guest's count."""

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = 0
    poison_val: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One scatter-gather entry: guest physical address and bytes."""

    gpa: int
    length: int


#: free_page_hint_cmd_id: what isn't a run's number (2 and up)
CMD_ID_STOP = 0
CMD_ID_DONE = 1

_STAT = struct.Struct("<HQ")  # le16 tag, le64 value


def encode_stats(stats: Mapping[StatTag, int]) -> bytes:
    """Return a statistics buffer: ten bytes an entry."""
    return b"".join(_STAT.pack(tag, value) for tag, value in stats.items())


def decode_stats(buffer: bytes) -> dict[StatTag, int]:
    """Return what a statistics buffer holds. Tags that aren't known are left out: a guest may send newer ones."""
    known = {int(tag): tag for tag in StatTag}
    whole = len(buffer) - len(buffer) % _STAT.size
    return {known[tag]: value for tag, value in _STAT.iter_unpack(buffer[:whole]) if tag in known}


class DeviceQueues(Protocol):
    """The device as the driver finds it behind its queues. Each call returns when the device has acknowledged."""

    def inflate(self, pfns: "array[int]") -> None:
        """The guest gives these frames up: le32 page numbers, 256 at most."""

    def deflate(self, pfns: "array[int]") -> None:
        """The guest wants these frames back."""

    def hint_command(self, command: int) -> None:
        """A hinting run's id: what follows belongs to it; or CMD_ID_STOP: that was all."""

    def hint(self, entry: Entry) -> None:
        """A free block. The guest may use it again before this returns, and a write to it takes the hint back."""

    def report(self, entries: Sequence[Entry]) -> None:
        """Free blocks, which the guest doesn't touch before this returns."""


class Driver(Protocol):
    """The driver as the device finds it."""

    def config_changed(self) -> None:
        """The configuration space has changed: an interrupt."""

    def stats(self) -> bytes:
        """The device has returned the statistics buffer: fill it anew."""
