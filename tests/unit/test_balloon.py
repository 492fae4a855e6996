"""virtio.balloon, guest.balloon, host.balloon."""

import pytest

from emu.clock import StepClock
from emu.errors import BadValue
from emu.guest.balloon import BalloonDriver
from emu.guest.kernel import GuestKernel
from emu.host.balloon import Balloon
from emu.testing import BytesMemory
from emu.virtio.balloon import Config, Entry, Feature, Queue, StatTag, queue_indices


class Taken:
    """A Discard that writes down."""

    def __init__(self):
        self.ranges = []

    def frames(self, ranges):
        self.ranges += [(gfn, count) for gfn, count, _ in ranges]
        return 0


def guest():
    return GuestKernel(BytesMemory("4MiB"), StepClock())


def device(**options):
    taken = Taken()
    return Balloon(1024, taken, **options), taken


def test_feature_bits_are_the_standards():
    """virtio 1.3, 5.5.3."""
    assert [int(feature) for feature in Feature] == [1, 2, 4, 8, 16, 32]
    assert (StatTag.SWAP_IN, StatTag.CACHES, StatTag.DIRECT_RECLAIM) == (0, 7, 15)
    assert Config() == Config(num_pages=0, actual=0, free_page_hint_cmd_id=0, poison_val=0)


def test_queues_are_numbered_by_what_was_negotiated():
    """With reporting alone its queue is index 2; with everything it is 4."""
    assert queue_indices(Feature.PAGE_REPORTING) == {Queue.INFLATE: 0, Queue.DEFLATE: 1, Queue.REPORTING: 2}
    everything = Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.PAGE_REPORTING
    assert queue_indices(everything)[Queue.REPORTING] == 4
    assert Queue.REPORTING not in queue_indices(Feature.STATS_VQ)


def test_bad_entries_are_ignored_and_the_good_ones_taken():
    """QEMU: misaligned or out of range is skipped silently, and acknowledged."""
    balloon, taken = device()
    driver = BalloonDriver(guest(), balloon)
    balloon.report(
        [
            Entry(4096, 8192),
            Entry(4097, 4096),
            Entry(0, 100),
            Entry(1023 * 4096, 8192),
            Entry(-4096, 4096),
            Entry(0, 4096),
        ]
    )
    assert taken.ranges == [(1, 2), (0, 1)]
    assert balloon.counters["balloon_report_ignored"] == 4
    assert driver.report([(512, 9)])
    assert taken.ranges[-1] == (512, 512)


def test_poison_or_an_assigned_device_inhibit_discarding():
    """Acknowledged, nothing taken."""
    balloon, taken = device()
    driver = BalloonDriver(guest(), balloon, poison=0xAA)
    assert balloon.config.poison_val == 0xAAAAAAAA
    assert driver.report([(0, 9)])
    assert taken.ranges == []
    assert balloon.counters["balloon_report_inhibited"] == 1
    balloon.reset()
    assert balloon.config.poison_val == 0
    balloon, taken = device()
    balloon.assigned_device = True
    assert BalloonDriver(guest(), balloon).report([(0, 9)])
    assert taken.ranges == []


def test_init_on_free_poisons_with_zero_and_may_be_discarded():
    """poison_val 0: a discarded frame reads as what the guest expects."""
    balloon, taken = device()
    driver = BalloonDriver(guest(), balloon, poison=0)
    driver.report([(0, 9)])
    assert taken.ranges == [(0, 512)]


def test_a_poisoning_guest_gives_reporting_up_without_the_feature():
    """Else the host would not know what the guest expects to find."""
    balloon, _ = device(offered=Feature.PAGE_REPORTING)
    assert Feature.PAGE_REPORTING not in BalloonDriver(guest(), balloon, poison=0xAA).features
    assert Feature.PAGE_REPORTING in BalloonDriver(guest(), balloon).features


def test_what_was_not_offered_cannot_be_negotiated():
    """FEATURES_OK would fail."""
    balloon, _ = device(offered=Feature.PAGE_REPORTING)
    with pytest.raises(BadValue):
        balloon.negotiate(Feature.STATS_VQ)
