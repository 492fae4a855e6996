"""virtio-balloon's vocabulary (virtio 1.3, section 5.5; include/uapi/linux/virtio_balloon.h).

Free page *hinting* (the host starts a run, for migration) and free page *reporting* (the guest reports by itself) are
two things with two queues.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "DEVICE_ID",
    "PFN_SHIFT",
    "Config",
    "Entry",
    "Feature",
    "Queue",
    "ReportingQueue",
    "StatTag",
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


class ReportingQueue(Protocol):
    """The reporting virtqueue as the driver sees it: returns when the device has acknowledged."""

    def __call__(self, entries: Sequence[Entry]) -> None: ...
