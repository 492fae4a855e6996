"""balloon: the host sets the guest's size; the guest gives up pages until it is that small.

Decided by the host, by hand or by rule; guest code runs for every page. It takes free memory first, then makes the
guest evict its cache, and can't tell what will be wanted: over-inflated, the guest thrashes, and a burst between two
polls meets the OOM killer unless the guest may deflate.

Settings: target (bytes that the guest keeps; nothing is polled then), keep (the share of the RAM that the host leaves
available, 0.2; polled), period (seconds or text between two polls, 5s), deflate_on_oom (yes), host_page (4KiB; 2MiB:
the guest's RAM is on huge pages for QEMU's device, which then gives nothing back).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emu.errors import BadValue
from emu.guest.kernel import GuestKernel
from emu.host.autoballoon import AutoBalloon
from emu.host.balloon import HUGE_PAGE
from emu.host.hypervisor import Hypervisor
from emu.mechanisms.reporting import parse_yes
from emu.observe.chain import GUEST_ARROWS, GUEST_CHAIN, Arrow
from emu.observe.pagemap import Stage
from emu.units import FRAME_SIZE, format_size, parse_duration, parse_size
from emu.virtio.balloon import Feature

__all__ = ["BalloonMechanism"]


@dataclass(frozen=True, slots=True)
class BalloonMechanism:
    """The balloon. target and host_page are bytes, period is in seconds, keep a share of the RAM."""

    target: int | None = None
    keep: float = 0.2
    period: float = 5.0
    deflate_on_oom: bool = True
    host_page: int = FRAME_SIZE

    name: ClassVar[str] = "balloon"
    parsers: ClassVar[dict[str, Callable[[str], Any]]] = {
        "target": lambda text: parse_size(text, "balloon target"),
        "keep": float,
        "period": lambda text: parse_duration(text, "balloon period"),
        "deflate_on_oom": parse_yes,
        "host_page": lambda text: parse_size(text, "host_page"),
    }
    chain: ClassVar[tuple[Stage, ...]] = (*GUEST_CHAIN, Stage.BALLOONED, Stage.INFLATED, Stage.HOST_OWNED)
    arrows: ClassVar[tuple[Arrow, ...]] = (
        *GUEST_ARROWS,
        Arrow(Stage.FREE, Stage.BALLOONED, ("moved_free_balloon",)),
        Arrow(Stage.BALLOONED, Stage.FREE, ("moved_balloon_free",)),
        Arrow(Stage.FREE, Stage.HINTED, ("moved_free_hinted",)),
        Arrow(Stage.HINTED, Stage.FREE, ("moved_hinted_free",)),
    )

    def attach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Offer the device's features, bind the driver, and set the target or start polling."""
        if self.host_page not in (FRAME_SIZE, HUGE_PAGE):
            raise BadValue(f"host_page {self.host_page!r} must be 4KiB or 2MiB")
        if not 0.01 <= self.period <= 3600:
            raise BadValue(f"balloon period {self.period!r} s must be from 0.01 to 3600")
        if self.target is not None and self.target > guest.ram_bytes:
            raise BadValue(f"balloon target {format_size(self.target)} is more than the RAM")
        rule = AutoBalloon(host.balloon, guest.ram_bytes, keep=self.keep)
        device = host.balloon
        device.offered = Feature.MUST_TELL_HOST | Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.PAGE_POISON
        if self.deflate_on_oom:
            device.offered |= Feature.DEFLATE_ON_OOM
        device.host_page = self.host_page
        guest.probe_balloon(device)
        if self.target is not None:
            device.guest_target = self.target
            return

        def poll() -> None:
            rule.poll()
            guest.timers.at(guest.clock.now() + self.period, poll, self)

        guest.timers.at(guest.clock.now() + self.period, poll, self)

    def detach(self, guest: GuestKernel, host: Hypervisor) -> None:
        """Deflate, unbind, reset."""
        guest.timers.cancel(self)
        guest.remove_balloon()
        host.balloon.reset()

    def panel(self, guest: GuestKernel, host: Hypervisor) -> list[tuple[str, str]]:
        """Target, size, and what the guest has left."""
        device = host.balloon
        return [
            ("guest keeps", format_size(device.guest_target)),
            ("in balloon", format_size(device.size_bytes)),
            ("available", format_size(guest.available_bytes)),
            ("requests", f"{device.counters['balloon_inflate_requests']:,}"),
            ("OOM kills", f"{guest.vmstat['oom_kill']:,}"),
        ]

    def pending(self, guest: GuestKernel) -> bool:
        """Whether the balloon is on its way to the target."""
        return guest.balloon is not None and guest.balloon.pending
