"""The guest's virtio-balloon driver, as far as reporting goes (drivers/virtio/virtio_balloon.c, Linux 6.1).

Features are what both sides have. A guest that poisons free pages writes the value to the configuration, so that the
host knows that discarding would change what the guest will find; if the device can't be told (no PAGE_POISON), the
driver gives reporting up. One report is one chain of up to 32 buffers on the reporting queue, and the driver sleeps
until it is acknowledged.
"""

from collections.abc import Sequence
from typing import Protocol

from emu.units import FRAME_SIZE
from emu.virtio.balloon import Config, Entry, Feature, ReportingQueue

__all__ = ["BalloonDevice", "BalloonDriver"]


class BalloonDevice(Protocol):
    """The device as the driver finds it."""

    config: Config

    @property
    def offered(self) -> Feature:
        """Features that the device offers."""

    def negotiate(self, accepted: Feature) -> ReportingQueue:
        """Fix the features; return the reporting queue."""


class BalloonDriver:
    """One guest's driver. poison: the byte that the guest fills free frames with, or None.

    With init_on_free the byte is 0, and so is poison_val: then discarding is right.
    """

    def __init__(self, device: BalloonDevice, *, poison: int | None = None) -> None:
        wanted = Feature.PAGE_REPORTING | (Feature.PAGE_POISON if poison is not None else Feature(0))
        self.features = device.offered & wanted
        if poison is not None and Feature.PAGE_POISON not in self.features:
            self.features &= ~Feature.PAGE_REPORTING
        if Feature.PAGE_POISON in self.features and poison is not None:
            device.config.poison_val = poison * 0x01010101
        self._queue = device.negotiate(self.features)

    def report(self, blocks: Sequence[tuple[int, int]]) -> bool:
        """Report free blocks, (pfn, order) each; return when the host has acknowledged them."""
        self._queue([Entry(pfn * FRAME_SIZE, FRAME_SIZE << order) for pfn, order in blocks])
        return True
