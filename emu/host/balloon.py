"""The device side of virtio-balloon, as QEMU has it (hw/virtio/virtio-balloon.c, 10.x).

Inflated pages are discarded, by the host's page: with pages of 4 KiB each PFN by itself. A guest RAM on pages of 2 MiB
can't lose 4 KiB: a bitmap of the one huge page that was met last fills up PFN by PFN, is thrown away when a PFN of
another one comes and at the end of each request, and only a full one is discarded. A request is 1 MiB at most, so that
never happens: ballooning a guest on huge pages gives nothing back (host_page=2MiB shows it). Deflated ones need
nothing: a touch faults a zero page in.

A report is acknowledged in any case; what it costs the guest is decided here:

 - with a device assigned (VFIO pins the guest's memory), or with a poison value other than 0 (the guest expects to find
   it, and a discarded frame reads as 0), nothing is discarded;
 - an entry that isn't aligned to the host's page size, or reaches out of the RAM, is ignored.

A hint may be out of date before it is read: a write takes it back. That is what MADV_FREE means, so hinted blocks are
lazily freed, and what the guest hasn't written until the run is over is dropped then.

PFNs and entries are the guest's word: wrong ones are counted and ignored, never trusted.
"""

from array import array
from collections.abc import Sequence

from emu.errors import BadValue, GuestError
from emu.host.discard import Discard
from emu.ranges import Ranges
from emu.units import FRAME_SIZE, format_size, parse_size
from emu.virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    Config,
    Driver,
    Entry,
    Feature,
    Queue,
    StatTag,
    decode_stats,
    queue_indices,
)

__all__ = ["Balloon"]

HUGE_PAGE = 2 << 20


class Balloon:
    """One guest's balloon device. assigned_device: a passthrough device inhibits discarding."""

    def __init__(self, frames: int, discard: Discard, *, offered: Feature | None = None) -> None:
        self.default_offer = Feature.PAGE_REPORTING | Feature.PAGE_POISON | Feature.STATS_VQ
        self.offered = self.default_offer if offered is None else offered
        self.negotiated = Feature(0)
        #: index of each queue that exists, as negotiated
        self.queues: dict[Queue, int] = queue_indices(Feature(0))
        self.config = Config()
        self.assigned_device = False
        #: bytes of the pages that the guest's RAM is on, for inflation: 4 KiB or 2 MiB
        self.host_page = FRAME_SIZE
        self._frames = frames
        self._size = frames * FRAME_SIZE
        self._discard = discard
        self._driver: Driver | None = None
        self._next_command = 2
        #: the hinting run that the guest is in, and what it has hinted
        self.hinting = CMD_ID_STOP
        self._hinted = Ranges()
        self.counters = dict.fromkeys(
            (
                "balloon_reports",
                "balloon_report_entries",
                "balloon_report_ignored",
                "balloon_report_inhibited",
                "balloon_inflate_requests",
                "balloon_inflate_pfns",
                "balloon_inflate_ignored",
                "balloon_inflate_taken",
                "balloon_inflate_partial",
                "balloon_deflate_requests",
                "balloon_hints",
                "balloon_hint_dropped_frames",
            ),
            0,
        )

    # ---- the driver calls

    def negotiate(self, accepted: Feature, driver: Driver | None = None) -> "Balloon":
        """Fix the features; return the queues. Raises BadValue for a feature that wasn't offered."""
        if extra := accepted & ~self.offered:
            raise BadValue(f"the device doesn't offer {extra!r}")
        self.negotiated = accepted
        self.queues = queue_indices(accepted)
        self._driver = driver
        return self

    def reset(self) -> None:
        """Forget the negotiation, the target and the poison value."""
        self.negotiated = Feature(0)
        self.queues = queue_indices(Feature(0))
        self.config = Config()
        self.offered = self.default_offer
        self.host_page = FRAME_SIZE
        self._driver = None
        self.hinting = CMD_ID_STOP
        self._hinted = Ranges()

    @property
    def inhibited(self) -> bool:
        """Whether reports are acknowledged and nothing else."""
        return self.assigned_device or self.config.poison_val != 0

    def inflate(self, pfns: "array[int]") -> None:
        """Take frames (virtio_balloon_handle_output). PFNs of one request go in one call, and not one by one as QEMU
        does."""
        self.counters["balloon_inflate_requests"] += 1
        self.counters["balloon_inflate_pfns"] += len(pfns)
        valid = [pfn for pfn in pfns if pfn < self._frames]
        self.counters["balloon_inflate_ignored"] += len(pfns) - len(valid)
        if self.assigned_device:
            return
        ranges = Ranges.of_frames(sorted(set(valid))) if self.host_page == FRAME_SIZE else self._whole_pages(valid)
        if len(ranges):
            self.counters["balloon_inflate_taken"] += self._discard.frames(ranges)

    def _whole_pages(self, pfns: Sequence[int]) -> Ranges:
        # balloon_inflate_page() with a PartiallyBalloonedPage
        per_page = self.host_page // FRAME_SIZE
        ranges = Ranges()
        current, seen = -1, set[int]()
        for pfn in pfns:
            if pfn // per_page != current:
                self.counters["balloon_inflate_partial"] += bool(seen)
                current, seen = pfn // per_page, set()
            seen.add(pfn)
            if len(seen) == per_page:
                ranges.add(current * per_page, per_page, 0)
                current, seen = -1, set()
        self.counters["balloon_inflate_partial"] += bool(seen)
        return ranges

    def deflate(self, pfns: "array[int]") -> None:
        """The guest uses frames again: nothing has to be done for it."""
        self.counters["balloon_deflate_requests"] += 1

    def report(self, entries: Sequence[Entry]) -> None:
        """Discard what is reported (virtio_balloon_handle_report). Returning is the acknowledgement."""
        self.counters["balloon_reports"] += 1
        self.counters["balloon_report_entries"] += len(entries)
        if self.inhibited:
            self.counters["balloon_report_inhibited"] += len(entries)
            return
        ranges = Ranges()
        for entry in entries:
            if not self._valid(entry):
                self.counters["balloon_report_ignored"] += 1
                continue
            ranges.add(entry.gpa // FRAME_SIZE, entry.length // FRAME_SIZE, 0)
        if len(ranges):
            self._discard.frames(ranges)

    def _valid(self, entry: Entry) -> bool:
        aligned = entry.gpa % FRAME_SIZE == 0 and entry.length % FRAME_SIZE == 0
        return aligned and entry.gpa >= 0 and entry.gpa + entry.length <= self._size

    # ---- hinting

    def start_hinting(self) -> int:
        """Ask the guest to hint its free memory; return the run's command id."""
        self._need(Feature.FREE_PAGE_HINT)
        command, self._next_command = self._next_command, self._next_command + 1
        self._hinted = Ranges()
        self._set_command(command)
        return command

    def stop_hinting(self) -> None:
        """End the run where it is: hints that come later belong to nothing."""
        self._set_command(CMD_ID_STOP)

    def finish_hinting(self) -> int:
        """Drop what was hinted and not written since; let the guest have its blocks back. Returns the frames
        dropped."""
        dropped = self._discard.drop(self._hinted) if len(self._hinted) else 0
        self.counters["balloon_hint_dropped_frames"] += dropped
        self._hinted = Ranges()
        self._set_command(CMD_ID_DONE)
        return dropped

    def _set_command(self, command: int) -> None:
        self.config.free_page_hint_cmd_id = command
        if self._driver is not None:
            self._driver.config_changed()

    def hint_command(self, command: int) -> None:
        """The guest begins a run, or ends it."""
        self.hinting = command

    def hint(self, entry: Entry) -> None:
        """Free a block lazily, if it belongs to the run that was asked for last."""
        if self.hinting != self.config.free_page_hint_cmd_id or not self._valid(entry) or self.inhibited:
            return
        self.counters["balloon_hints"] += 1
        part = Ranges.of([(entry.gpa // FRAME_SIZE, entry.length // FRAME_SIZE)])
        self._discard.lazily(part)
        self._hinted.flat.extend(part.flat)

    # ---- the host's side

    def _need(self, feature: Feature) -> None:
        if feature not in self.negotiated:
            raise GuestError(f"the guest's balloon driver hasn't negotiated {feature.name}: -m balloon does")

    @property
    def size_bytes(self) -> int:
        """Bytes in the balloon, by the guest's word (actual)."""
        return self.config.actual * FRAME_SIZE

    @property
    def guest_target(self) -> int:
        """Bytes that the guest is to keep. Setting it takes bytes or text; the guest works towards it."""
        return self._size - self.config.num_pages * FRAME_SIZE

    @guest_target.setter
    def guest_target(self, size: int | str) -> None:
        keep = parse_size(size, "guest target")
        if keep > self._size:
            raise BadValue(f"guest target {size!r} is more than the RAM, {format_size(self._size)}")
        self.config.num_pages = (self._size - keep) // FRAME_SIZE
        if self._driver is not None:
            self._driver.config_changed()

    def request_stats(self) -> dict[StatTag, int]:
        """Ask the guest for its statistics (the polling of guest-stats-polling-interval)."""
        self._need(Feature.STATS_VQ)
        assert self._driver is not None
        return decode_stats(self._driver.stats())
