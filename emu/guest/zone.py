"""A zone: a stretch of frames with its buddy, its per-CPU lists, and the watermarks that ration it.

Watermarks (mm/page_alloc.c, __setup_per_zone_wmarks, Linux 6.1). min_free_kbytes is sqrt(16 * memory in KiB), between
128 and 262,144; where transparent huge pages are on, khugepaged raises it so that a few pageblocks of each type stay
free (mm/khugepaged.c, set_recommended_min_free_kbytes), at most 5 % of memory. Each zone gets its share as min; low
and high lie above it by min/4 or 0.1 % of the zone, whichever is more. Ordinary allocations stop at low (and wake
kswapd), then at min. lowmem_reserve keeps allocations that could have used a higher zone from eating a lower one.

With these rules a recorded guest's /proc/zoneinfo comes out to the page.
"""

from dataclasses import dataclass
from math import isqrt

from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType
from emu.guest.pcp import PerCpuPages, zone_batchsize

__all__ = ["Watermarks", "Zone", "zone_spans", "zone_watermarks"]

_DMA_FRAMES = (16 << 20) >> 12
_DMA32_FRAMES = (4 << 30) >> 12
_LOWMEM_RESERVE_RATIO = 256  # sysctl_lowmem_reserve_ratio of DMA and DMA32


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Frames that must stay free: below min only the kernel itself allocates, below low kswapd works."""

    min: int
    low: int
    high: int


def zone_spans(frames: int) -> list[tuple[str, int, int]]:
    """Return (name, first frame, frames) of x86-64's zones over a flat guest RAM. No hole below 4 GiB is modelled."""
    spans = []
    for name, start, end in (
        ("DMA", 0, _DMA_FRAMES),
        ("DMA32", _DMA_FRAMES, _DMA32_FRAMES),
        ("Normal", _DMA32_FRAMES, frames),
    ):
        if frames > start:
            spans.append((name, start, min(end, frames) - start))
    return spans


def min_free_kbytes(managed: list[int], *, thp: bool) -> int:
    """Return vm.min_free_kbytes for zones of that many frames."""
    total = sum(managed)
    kbytes = min(max(isqrt(total * 4 * 16), 128), 262144)
    if thp:
        pageblock, nr_types, nr_zones = 1 << PAGEBLOCK_ORDER, len(MigrateType), len(managed)
        recommended = pageblock * nr_zones * 2 + pageblock * nr_zones * nr_types * nr_types
        kbytes = max(kbytes, min(recommended, total // 20) * 4)
    return kbytes


def zone_watermarks(managed: list[int], *, thp: bool) -> list[Watermarks]:
    """Return the watermarks of zones of that many frames each."""
    pages_min = min_free_kbytes(managed, thp=thp) >> 2
    total = sum(managed)
    result = []
    for frames in managed:
        low = pages_min * frames // total
        step = max(low >> 2, frames * 10 // 10000)
        result.append(Watermarks(low, low + step, low + 2 * step))
    return result


class Zone:
    """One zone of the guest. `above` is the frames of the zones above it, for lowmem_reserve."""

    def __init__(self, name: str, buddy: Buddy, watermarks: Watermarks, *, above: int, cpus: int) -> None:
        self.name = name
        self.buddy = buddy
        self.watermarks = watermarks
        #: what an allocation that may use a higher zone must leave here
        self.lowmem_reserve = above // _LOWMEM_RESERVE_RATIO
        # zone_highsize(): the low watermark, shared among the CPUs
        self.pcp = PerCpuPages(buddy, batch=zone_batchsize(buddy.frames), high=watermarks.low // cpus)

    @property
    def free_frames(self) -> int:
        """Frames in the buddy (NR_FREE_PAGES): what sits on per-CPU lists isn't among them."""
        return self.buddy.free_frames

    def headroom(self, mark: int, *, reserve: bool) -> int:
        """Return how many frames may be taken before free memory falls to a watermark (zone_watermark_ok)."""
        return self.buddy.free_frames - mark - (self.lowmem_reserve if reserve else 0)

    def watermark_ok(self, order: int, mark: int, *, reserve: bool = False) -> bool:
        """Whether a block of 2^order may be allocated above `mark` (__zone_watermark_ok)."""
        if self.buddy.free_frames - ((1 << order) - 1) <= mark + (self.lowmem_reserve if reserve else 0):
            return False
        return order == 0 or any(self.buddy.nr_free[order:])
