"""The guest's virtio-balloon driver (drivers/virtio/virtio_balloon.c, Linux 6.1).

Four things over one device:

Inflating and deflating. The host sets num_pages; the driver allocates or frees its way there, at most 256 pages (1 MiB)
a request, and each request waits for the host. Allocation doesn't retry (__GFP_NORETRY): free memory goes first, then
reclaim makes the guest evict its cache, and when that ends, "Out of puff", it tries again 200 ms later. Pages come back
last in, first out, and the host is told before anybody uses them (MUST_TELL_HOST asks for what the driver does anyway).

Out of memory. With DEFLATE_ON_OOM the driver gives 256 pages back when the OOM killer is about to choose, and as often
as it takes. Without it, inflated pages are taken off MemTotal: they were never promised.

Statistics: 16 tags, when the host asks.

Hinting: the host names a run, the driver allocates blocks of order 10 until there are none and tells of each; it holds
them until the host says done, and gives them back one by one when memory gets short (a shrinker).

Reporting is a worker of its own (reporting.py), whose reports go through this driver. A guest that poisons free pages
writes the value to the configuration; if the device can't be told (no PAGE_POISON), the driver gives reporting up.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from emu.guest.free_area import MAX_ORDER
from emu.guest.meminfo import balloon_stats
from emu.guest.page import Owner
from emu.ranges import runs_of
from emu.units import FRAME_SIZE
from emu.virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    Config,
    DeviceQueues,
    Driver,
    Entry,
    Feature,
    encode_stats,
)

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["PFNS_PER_REQUEST", "BalloonDevice", "BalloonDriver"]

PFNS_PER_REQUEST = 256  # VIRTIO_BALLOON_ARRAY_PFNS_MAX
_OOM_NR_PAGES = 256  # VIRTIO_BALLOON_OOM_NR_PAGES
_PUFF = 0.2  # seconds until the next try

_SUPPORTED = (
    Feature.MUST_TELL_HOST
    | Feature.STATS_VQ
    | Feature.DEFLATE_ON_OOM
    | Feature.FREE_PAGE_HINT
    | Feature.PAGE_REPORTING
    | Feature.PAGE_POISON
)


class BalloonDevice(Protocol):
    """The device as the driver finds it before they have agreed."""

    config: Config

    @property
    def offered(self) -> Feature:
        """Features that the device offers."""

    def negotiate(self, accepted: Feature, driver: Driver) -> DeviceQueues:
        """Fix the features; return the queues."""


class BalloonDriver:
    """One guest's driver. poison: the byte that the guest fills free frames with, or None.

    With init_on_free the byte is 0, and so is poison_val: then discarding is right.
    """

    def __init__(self, kernel: "GuestKernel", device: BalloonDevice, *, poison: int | None = None) -> None:
        wanted = _SUPPORTED if poison is not None else _SUPPORTED & ~Feature.PAGE_POISON
        self.features = device.offered & wanted
        if poison is not None and Feature.PAGE_POISON not in self.features:
            self.features &= ~Feature.PAGE_REPORTING
        self._kernel = kernel
        self._config = device.config
        if Feature.PAGE_POISON in self.features and poison is not None:
            self._config.poison_val = poison * 0x01010101
        #: frames in the balloon, the last in at the end
        self.pages = array("I")
        self._hinted: list[int] = []
        #: the hinting run that the host has asked for
        self.cmd_id_received = CMD_ID_STOP
        self._queues = device.negotiate(self.features, self)
        if Feature.DEFLATE_ON_OOM in self.features:
            kernel.oom.notifiers.append(self._oom_notify)
        kernel.shrinkers.append(self._shrink_hinted)
        self.config_changed()

    # ---- the device calls

    def config_changed(self) -> None:
        """The host wants another size, or a hinting run: both are work for later (virtballoon_changed)."""
        kernel, config = self._kernel, self._config
        if config.num_pages != len(self.pages):
            kernel.timers.at(kernel.clock.now(), self._update_size, self)
        if Feature.FREE_PAGE_HINT not in self.features or config.free_page_hint_cmd_id == self.cmd_id_received:
            return
        self.cmd_id_received = config.free_page_hint_cmd_id
        if self.cmd_id_received == CMD_ID_DONE:
            kernel.timers.at(kernel.clock.now(), self._return_hinted, self)
        elif self.cmd_id_received != CMD_ID_STOP:
            kernel.timers.at(kernel.clock.now(), self._report_free_pages, self)

    def stats(self) -> bytes:
        """Return the statistics buffer."""
        return encode_stats(balloon_stats(self._kernel))

    # ---- size

    @property
    def ballooned_bytes(self) -> int:
        """Bytes in the balloon."""
        return len(self.pages) * FRAME_SIZE

    @property
    def taken_off_total_bytes(self) -> int:
        """Of MemTotal (adjust_managed_page_count): all of it, unless the guest may take it back on OOM."""
        return 0 if Feature.DEFLATE_ON_OOM in self.features else self.ballooned_bytes

    @property
    def pending(self) -> bool:
        """Whether the balloon isn't as large as the host wants it."""
        return self._config.num_pages != len(self.pages)

    def _update_size(self) -> None:
        # update_balloon_size_func(), which queues itself until it is there
        while diff := self._config.num_pages - len(self.pages):
            if diff < 0:
                self._leak(-diff)
            elif not self._fill(diff):
                kernel = self._kernel
                kernel.vmstat["balloon_out_of_puff"] += 1
                kernel.timers.at(kernel.clock.now() + _PUFF, self._update_size, self)
                break
        self._config.actual = len(self.pages)

    def _fill(self, most: int) -> bool:
        # fill_balloon(): one request; False = out of puff
        most = min(most, PFNS_PER_REQUEST)
        pfns, vmstat = array("I"), self._kernel.vmstat
        scanned = vmstat["pgscan_kswapd"] + vmstat["pgscan_direct"]
        runs = self._kernel.alloc_frames(most, owner=Owner.BALLOON, retry=False)
        vmstat["balloon_scanned"] += vmstat["pgscan_kswapd"] + vmstat["pgscan_direct"] - scanned
        for pfn, count, step in runs:
            pfns.extend(range(pfn, pfn + step * count, step))
        if pfns:
            self._queues.inflate(pfns)
            self.pages += pfns
            self._kernel.vmstat["balloon_inflate"] += len(pfns)
            self._config.actual = len(self.pages)
        return len(pfns) == most

    def _leak(self, most: int) -> int:
        # leak_balloon(): one request; tell the host, then free
        n = min(most, PFNS_PER_REQUEST, len(self.pages))
        if not n:
            return 0
        pfns = self.pages[-n:]
        pfns.reverse()
        self._queues.deflate(pfns)
        del self.pages[-n:]
        self._kernel.free_pages(runs_of(pfns))
        self._kernel.vmstat["balloon_deflate"] += n
        self._config.actual = len(self.pages)
        return n

    def _oom_notify(self) -> int:
        # virtballoon_oom_notify(). The host's target stays: the balloon grows again when the host says something.
        return self._leak(_OOM_NR_PAGES)

    # ---- hinting

    @property
    def hinted_bytes(self) -> int:
        """Bytes of blocks that the driver holds since a hinting run."""
        return len(self._hinted) * (FRAME_SIZE << MAX_ORDER)

    def _report_free_pages(self) -> None:
        # virtio_balloon_report_free_page()
        active = self.cmd_id_received
        if active in (CMD_ID_STOP, CMD_ID_DONE):
            return
        self._queues.hint_command(active)
        while self.cmd_id_received == active:  # the host may stop it at any block
            pfn = self._kernel.alloc_block(MAX_ORDER, Owner.HINTED)
            if pfn is None:
                break
            self._hinted.append(pfn)
            self._queues.hint(Entry(pfn * FRAME_SIZE, FRAME_SIZE << MAX_ORDER))
        self._queues.hint_command(CMD_ID_STOP)

    def _return_hinted(self) -> None:
        while self._hinted:
            self._kernel.free_pages([(self._hinted.pop(), 1)], MAX_ORDER)

    def _shrink_hinted(self) -> None:
        # virtio_balloon_shrinker_scan(): a block a scan
        if self._hinted:
            self._kernel.free_pages([(self._hinted.pop(), 1)], MAX_ORDER)

    # ---- reporting

    def report(self, blocks: Sequence[tuple[int, int]]) -> bool:
        """Report free blocks, (pfn, order) each; return when the host has acknowledged them."""
        self._queues.report([Entry(pfn * FRAME_SIZE, FRAME_SIZE << order) for pfn, order in blocks])
        return True

    def remove(self) -> None:
        """Unbind the driver: everything it holds is the guest's again (remove_common). The device is to be reset."""
        kernel = self._kernel
        kernel.timers.cancel(self)
        while self.pages:
            self._leak(len(self.pages))
        self._return_hinted()
        if self._oom_notify in kernel.oom.notifiers:
            kernel.oom.notifiers.remove(self._oom_notify)
        kernel.shrinkers.remove(self._shrink_hinted)
