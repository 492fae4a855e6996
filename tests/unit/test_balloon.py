"""virtio.balloon, guest.balloon, host.balloon."""

from array import array

import pytest

from emu.clock import StepClock
from emu.errors import BadValue, GuestError, OomKilled
from emu.guest.balloon import BalloonDriver
from emu.guest.kernel import GuestKernel
from emu.guest.page import Owner
from emu.host.aside import Aside
from emu.host.autoballoon import AutoBalloon
from emu.host.balloon import Balloon
from emu.host.discard import Discard
from emu.ram import GuestRam
from emu.testing import BytesMemory
from emu.timers import Timers
from emu.virtio.balloon import Config, Entry, Feature, Queue, StatTag, decode_stats, encode_stats, queue_indices


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


# ---- inflating, statistics, hinting


class Watched(Balloon):
    """A device that writes down what comes through its queues."""

    def __init__(self, ram, log):
        super().__init__(ram.frames, Discard(ram, Aside(ram, Timers(), lambda: 0.0)))
        self.log = log

    def inflate(self, pfns):
        self.log.append(("inflate", len(pfns)))
        super().inflate(pfns)

    def deflate(self, pfns):
        self.log.append(("deflate", len(pfns)))
        super().deflate(pfns)

    def hint_command(self, command):
        self.log.append(("command", command))
        super().hint_command(command)

    def hint(self, entry):
        self.log.append(("hint", entry.length))
        super().hint(entry)


ALL = (
    Feature.MUST_TELL_HOST | Feature.STATS_VQ | Feature.DEFLATE_ON_OOM | Feature.FREE_PAGE_HINT | Feature.PAGE_REPORTING
)


@pytest.fixture
def rig():
    """(kernel, device, ram, log) of a guest of 64 MiB without a driver."""
    with GuestRam("64MiB", uffd="off") as ram:
        log = []
        device = Watched(ram, log)
        device.offered = ALL
        yield GuestKernel(ram, StepClock(), thp="never"), device, ram, log


def settle(kernel, seconds=1.0):
    end = kernel.clock.now() + seconds
    while kernel.next_timer is not None and kernel.next_timer <= end:
        kernel.clock.sleep_until(kernel.next_timer)
        kernel.run_timers()
    kernel.clock.sleep_until(end)


def test_a_request_is_256_pages_and_the_target_is_reached(rig):
    """10 MiB and a page: ten full requests and a short one; actual follows; deflation last in, first out."""
    kernel, device, _, log = rig
    kernel.probe_balloon(device)
    device.guest_target = (54 << 20) - 4096
    assert device.config.num_pages == 2561
    settle(kernel)
    assert log == [("inflate", 256)] * 10 + [("inflate", 1)]
    assert device.size_bytes == kernel.ballooned_bytes == device.config.actual * 4096 == 2561 * 4096
    assert kernel.vmstat["balloon_inflate"] == 2561
    assert kernel.memmap.count(Owner.BALLOON) == 2561
    log.clear()
    last = list(kernel.balloon.pages[-300:])
    device.guest_target = "60MiB"
    settle(kernel)
    assert log == [("deflate", 256)] * 6 + [("deflate", 1)]
    assert not set(last) & set(kernel.balloon.pages)
    assert kernel.ballooned_bytes == 4 << 20
    assert kernel.vmstat["balloon_deflate"] == 1537


def test_inflation_takes_resident_memory_and_deflation_gives_none():
    """RSS falls by what was resident; after deflation it rises with touches only."""
    with GuestRam("64MiB", uffd="off") as ram:
        kernel = GuestKernel(ram, StepClock(), thp="never")
        device = Watched(ram, [])
        kernel.probe_balloon(device)
        process = kernel.spawn("a")
        process.mmap("40MiB").touch()
        process.exit()
        assert ram.rss_bytes == 40 << 20
        device.guest_target = "8MiB"
        settle(kernel)
        assert ram.rss_bytes <= 8 << 20
        before = ram.rss_bytes
        device.guest_target = "64MiB"
        settle(kernel)
        assert kernel.ballooned_bytes == 0
        assert ram.rss_bytes == before
        kernel.spawn("b").mmap("50MiB").touch()
        assert ram.rss_bytes >= 50 << 20


def test_out_of_puff_tries_again_after_200_ms(rig):
    """With nothing left above min, and what is freed meanwhile is taken then."""
    kernel, device, _, _ = rig
    kernel.probe_balloon(device)
    process = kernel.spawn("a")
    process.mmap("40MiB").touch()
    device.guest_target = "4MiB"
    kernel.run_timers()
    assert kernel.vmstat["balloon_out_of_puff"] == 1
    assert kernel.vmstat["oom_kill"] == 0
    assert process.rss_bytes == 40 << 20
    assert kernel.next_timer == pytest.approx(0.2)
    size = kernel.ballooned_bytes
    process.exit()
    settle(kernel, 0.19)
    assert kernel.ballooned_bytes == size
    settle(kernel, 0.1)
    assert kernel.ballooned_bytes == 60 << 20


def test_deflate_on_oom_gives_256_pages_before_anybody_dies(rig):
    """And MemTotal keeps them; without the feature they are taken off it, and the killer chooses."""
    kernel, device, _, log = rig
    kernel.probe_balloon(device)
    device.guest_target = "24MiB"
    settle(kernel)
    assert kernel.total_bytes == kernel.ram_bytes
    log.clear()
    memory = kernel.spawn("a").mmap("50MiB")
    memory.fill(seed=1)
    assert memory.verify(seed=1) == []
    assert kernel.vmstat["oom_kill"] == 0
    assert set(log) == {("deflate", 256)}
    assert device.size_bytes == kernel.ballooned_bytes < 14 << 20
    settle(kernel, 10)
    assert device.size_bytes < 14 << 20  # it grows again when the host says something


def test_without_deflate_on_oom_the_guest_is_smaller(rig):
    kernel, device, _, _ = rig
    device.offered &= ~Feature.DEFLATE_ON_OOM
    kernel.probe_balloon(device)
    device.guest_target = "24MiB"
    settle(kernel)
    assert kernel.total_bytes == 24 << 20
    with pytest.raises(OomKilled):
        kernel.spawn("a").mmap("50MiB").fill(seed=1)
    assert kernel.ballooned_bytes == 40 << 20


def test_all_16_statistics(rig):
    """Memory, scans and reclaim in bytes, by the driver's formulas; ten bytes an entry."""
    kernel, device, _, _ = rig
    kernel.probe_balloon(device)
    process = kernel.spawn("a")
    process.mmap("8MiB").touch()
    kernel.create_file("1MiB").fill(seed=1)
    stats = device.request_stats()
    assert list(stats) == list(StatTag)
    assert len(stats) == 16
    assert stats[StatTag.MEMFREE] == kernel.free_bytes
    assert stats[StatTag.MEMTOT] == 64 << 20
    assert stats[StatTag.AVAIL] == kernel.free_bytes - kernel.totalreserve_pages * 4096
    assert stats[StatTag.CACHES] == 1 << 20
    assert stats[StatTag.MINFLT] == 2048
    assert stats[StatTag.OOM_KILL] == stats[StatTag.ASYNC_RECLAIM] == stats[StatTag.SWAP_IN] == 0
    kernel.vmstat["pgscan_kswapd"] = 7
    assert device.request_stats()[StatTag.ASYNC_SCAN] == 7 * 4096
    assert len(kernel.balloon.stats()) == 160
    assert decode_stats(encode_stats({StatTag.AVAIL: 5}) + b"\xff\xff" + bytes(8) + b"half") == {StatTag.AVAIL: 5}
    assert encode_stats({StatTag.AVAIL: 5}) == b"\x06\x00\x05\x00\x00\x00\x00\x00\x00\x00"


def test_a_hinting_run_is_named_held_and_given_back(rig):
    """Ids from 2; blocks of order 10 until there are none; 0 is the guest's stop, 1 the host's done."""
    kernel, device, ram, log = rig
    process = kernel.spawn("a")
    process.mmap("48MiB").touch()
    process.exit()
    kernel.probe_balloon(device)
    kernel.drain_pages()
    resident = ram.rss_bytes
    assert device.start_hinting() == 2
    settle(kernel)
    assert log[0] == ("command", 2)
    assert log[-1] == ("command", 0)
    blocks = log[1:-1]
    assert set(blocks) == {("hint", 4 << 20)}
    assert kernel.balloon.hinted_bytes == len(blocks) * (4 << 20) == kernel.memmap.count(Owner.HINTED) * 4096 > 40 << 20
    assert ram.rss_bytes == resident  # lazily freed: the kernel takes it when it wants it
    assert device.finish_hinting() > 0
    settle(kernel)
    assert ram.rss_bytes < resident - (30 << 20)
    assert kernel.balloon.hinted_bytes == 0
    assert kernel.ballooned_bytes == 0
    assert device.start_hinting() == 3


def test_a_write_takes_a_hint_back(rig):
    """Pressure makes the driver give a block back in the middle of the run; what is written there survives."""
    kernel, device, ram, _ = rig
    process = kernel.spawn("a")
    process.mmap("48MiB").touch()
    process.exit()
    kernel.probe_balloon(device)
    kernel.drain_pages()
    device.start_hinting()
    settle(kernel)
    memory = kernel.spawn("b").mmap("24MiB")
    memory.fill(seed=9)
    assert 0 < kernel.balloon.hinted_bytes < 40 << 20
    device.finish_hinting()
    settle(kernel)
    assert memory.verify(seed=9) == []
    assert ram.stats()["nr_lazy"] > 1000  # hinted, written, still there


def test_a_stopped_run_ends_at_the_next_block(rig):
    """And hints of another run than the last one asked for are ignored."""
    kernel, device, _, log = rig
    kernel.probe_balloon(device)
    real = device.hint

    def hint(entry):
        real(entry)
        if len([what for what, _ in log if what == "hint"]) == 3:
            device.stop_hinting()

    device.hint = hint
    device.start_hinting()
    settle(kernel)
    assert [what for what, _ in log].count("hint") == 3
    assert device.counters["balloon_hints"] == 3
    device.hint = real
    device.hint_command(77)
    device.hint(Entry(0, 4096))
    assert device.counters["balloon_hints"] == 3


def test_on_huge_host_pages_inflation_gives_nothing_back(rig):
    """QEMU's bitmap of one huge page dies at the end of each request of 1 MiB."""
    kernel, device, ram, _ = rig
    process = kernel.spawn("a")
    process.mmap("48MiB").touch()
    process.exit()
    kernel.drain_pages()
    device.host_page = 2 << 20
    kernel.probe_balloon(device)
    device.guest_target = "24MiB"
    settle(kernel)
    assert device.size_bytes == 40 << 20
    assert ram.rss_bytes == 48 << 20
    assert device.counters["balloon_inflate_partial"] >= 40
    # a whole one in one request goes
    device.inflate(array("I", range(512)))
    assert ram.states(0, 512).count(0) == 512


def test_what_a_guest_says_isnt_trusted(rig):
    """PFNs outside, or twice; entries outside."""
    _, device, ram, _ = rig
    ram.touch(0, 16)
    device.inflate(array("I", [3, 3, 5, 1 << 20, 0xFFFFFFFF, 5]))
    assert device.counters["balloon_inflate_ignored"] == 2
    assert ram.rss_bytes == 14 * 4096
    device.negotiate(Feature.FREE_PAGE_HINT)
    device.start_hinting()
    device.hint_command(device.config.free_page_hint_cmd_id)
    device.hint(Entry(63 << 20, 4 << 20))
    assert device.counters["balloon_hints"] == 0


def test_the_rule_keeps_a_share_available(rig):
    """By 5 % of the RAM a poll, not for less than 0.25 %, and it gives back when less is left."""
    kernel, device, _, _ = rig
    kernel.probe_balloon(device)
    rule = AutoBalloon(device, kernel.ram_bytes, keep=0.5)
    sizes = []
    for _ in range(15):
        rule.poll()
        settle(kernel, 0.1)
        sizes.append(device.size_bytes)
    step = (64 << 20) // 20 // 4096 * 4096
    assert sizes[0] in (step, step + 4096)
    assert sizes[-1] == sizes[-2]
    assert abs(kernel.available_bytes - (32 << 20)) <= 0.0025 * (64 << 20) + 4096
    process = kernel.spawn("a")
    process.mmap("20MiB").touch()
    for _ in range(15):
        rule.poll()
        settle(kernel, 0.1)
    assert device.size_bytes < sizes[-1] - (15 << 20)
    for keep in (-0.1, 1.0):
        with pytest.raises(BadValue, match="keep"):
            AutoBalloon(device, kernel.ram_bytes, keep=keep)


def test_removing_the_driver_deflates(rig):
    kernel, device, _, _ = rig
    kernel.probe_balloon(device)
    with pytest.raises(GuestError, match="bound already"):
        kernel.probe_balloon(device)
    device.guest_target = "32MiB"
    device.start_hinting()
    settle(kernel)
    kernel.remove_balloon()
    assert kernel.memmap.count(Owner.BALLOON) == kernel.memmap.count(Owner.HINTED) == 0
    assert kernel.oom.notifiers == []
    assert kernel.free_bytes + kernel.pcp_bytes == 64 << 20
