"""What the guest tells its host of its memory: virtio-balloon's statistics (update_balloon_stats).

All 16 tags of a current kernel; Linux 6.1 had the first ten, and the last six came after it.
"""

from typing import TYPE_CHECKING

from emu.guest.page import Lru, Owner
from emu.units import FRAME_SIZE
from emu.virtio.balloon import StatTag

if TYPE_CHECKING:
    from emu.guest.kernel import GuestKernel

__all__ = ["balloon_stats"]


def balloon_stats(kernel: "GuestKernel") -> dict[StatTag, int]:
    """Return all 16 statistics: memory, scans and reclaim in bytes, faults and stalls as numbers."""
    vmstat, memmap = kernel.vmstat, kernel.memmap
    file_pages = memmap.nr(Lru.INACTIVE_FILE) + memmap.nr(Lru.ACTIVE_FILE) + memmap.count(Owner.SHMEM)
    return {
        StatTag.SWAP_IN: 0,  # a guest without swap
        StatTag.SWAP_OUT: 0,
        StatTag.MAJFLT: vmstat["pgmajfault"],
        StatTag.MINFLT: vmstat["pgfault"],
        StatTag.MEMFREE: kernel.free_bytes,
        StatTag.MEMTOT: kernel.total_bytes,
        StatTag.AVAIL: kernel.available_bytes,
        StatTag.CACHES: file_pages * FRAME_SIZE,
        StatTag.HTLB_PGALLOC: 0,  # and without hugetlb pages
        StatTag.HTLB_PGFAIL: 0,
        StatTag.OOM_KILL: vmstat["oom_kill"],
        StatTag.ALLOC_STALL: vmstat["allocstall"],
        StatTag.ASYNC_SCAN: vmstat["pgscan_kswapd"] * FRAME_SIZE,
        StatTag.DIRECT_SCAN: vmstat["pgscan_direct"] * FRAME_SIZE,
        StatTag.ASYNC_RECLAIM: vmstat["pgsteal_kswapd"] * FRAME_SIZE,
        StatTag.DIRECT_RECLAIM: vmstat["pgsteal_direct"] * FRAME_SIZE,
    }
