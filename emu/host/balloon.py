"""The device side of virtio-balloon, as QEMU has it (hw/virtio/virtio-balloon.c, 10.x).

A report is acknowledged in any case; what it costs the guest is decided here:

 - with a device assigned (VFIO pins the guest's memory), or with a poison value other than 0 (the guest expects to find
   it, and a discarded frame reads as 0), nothing is discarded;
 - an entry that isn't aligned to the host's page size, or reaches out of the RAM, is ignored.
"""

from collections.abc import Sequence

from emu.errors import BadValue
from emu.host.discard import Discard
from emu.ranges import Ranges
from emu.units import FRAME_SIZE
from emu.virtio.balloon import Config, Entry, Feature, Queue, ReportingQueue, queue_indices

__all__ = ["Balloon"]


class Balloon:
    """One guest's balloon device. assigned_device: a passthrough device inhibits discarding."""

    def __init__(self, frames: int, discard: Discard, *, offered: Feature | None = None) -> None:
        self.offered = Feature.PAGE_REPORTING | Feature.PAGE_POISON if offered is None else offered
        self.negotiated = Feature(0)
        #: index of each queue that exists, as negotiated
        self.queues: dict[Queue, int] = queue_indices(Feature(0))
        self.config = Config()
        self.assigned_device = False
        self._size = frames * FRAME_SIZE
        self._discard = discard
        self.counters = dict.fromkeys(
            ("balloon_reports", "balloon_report_entries", "balloon_report_ignored", "balloon_report_inhibited"), 0
        )

    def negotiate(self, accepted: Feature) -> ReportingQueue:
        """Fix the features; return the reporting queue. Raises BadValue for one that wasn't offered."""
        if extra := accepted & ~self.offered:
            raise BadValue(f"the device doesn't offer {extra!r}")
        self.negotiated = accepted
        self.queues = queue_indices(accepted)
        return self._report

    def reset(self) -> None:
        """Forget the negotiation and the poison value."""
        self.negotiated = Feature(0)
        self.queues = queue_indices(Feature(0))
        self.config = Config()

    @property
    def inhibited(self) -> bool:
        """Whether reports are acknowledged and nothing else."""
        return self.assigned_device or self.config.poison_val != 0

    def _report(self, entries: Sequence[Entry]) -> None:
        # virtio_balloon_handle_report(). Returning is the acknowledgement.
        self.counters["balloon_reports"] += 1
        self.counters["balloon_report_entries"] += len(entries)
        if self.inhibited:
            self.counters["balloon_report_inhibited"] += len(entries)
            return
        ranges = Ranges()
        for entry in entries:
            end = entry.gpa + entry.length
            if entry.gpa % FRAME_SIZE or entry.length % FRAME_SIZE or entry.gpa < 0 or end > self._size:
                self.counters["balloon_report_ignored"] += 1
                continue
            ranges.add(entry.gpa // FRAME_SIZE, entry.length // FRAME_SIZE, 0)
        if len(ranges):
            self._discard.frames(ranges)
