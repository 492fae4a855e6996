"""Counters of guest, host and core in one flat table, spelled as /proc/vmstat spells its own."""

from emu.guest.kernel import GuestKernel
from emu.guest.page import Lru, Owner
from emu.host.hypervisor import Hypervisor
from emu.observe.usages import UsageView

__all__ = ["read_vmstat"]

_DISK = (
    "disk_reads",
    "disk_read_bytes",
    "disk_writes",
    "disk_written_bytes",
    "disk_syncs",
    "disk_direct_bytes",
    "disk_buffered_bytes",
)


def read_vmstat(guest: GuestKernel, host: Hypervisor, usages: UsageView | None = None) -> dict[str, int]:
    """Return all counters. The guest's start with guest_ where the core has one of the same name.

    nr_* are frames by state, guest_nr_* pages by list; the others count up. report_pages are frames reported,
    discard_frames frames that held memory when they were discarded; moved_a_b are frames that went from one owner to
    another; usage_a_b frames of which the guest has said something else (CMM2; with `usages`); disk_*_bytes are bytes
    that went to or from the disks.
    """
    counters = {f"guest_{name}": value for name, value in guest.vmstat.items()}
    memmap = guest.memmap
    stats = memmap.stats
    counters |= {f"guest_nr_{lru.name.lower()}": memmap.nr(lru) for lru in Lru}
    counters["guest_nr_dirty"] = memmap.count(Owner.DIRTY)
    counters["guest_nr_writeback"] = memmap.count(Owner.WRITEBACK)
    counters["guest_nr_mapped"] = int(stats.nr_mapped)
    for name in ("pgaccess", "pgactivate", "pgdeactivate", "pgrefill", "pgrotated"):
        counters[f"guest_{name}"] = int(getattr(stats, name))
    counters |= {f"moved_{a.name}_{b.name}".lower(): n for (a, b), n in memmap.moved().items()}
    for name in ("refault", "activate", "restore"):
        counters[f"guest_workingset_{name}_file"] = int(getattr(stats, f"workingset_{name}"))
    # workers that were there before have left theirs with the guest
    counters |= guest.ended
    workers = [w for w in (guest.reporting, guest.aging, guest.inactive, guest.pressure) if w is not None]
    for worker in workers:
        counters |= {name: value + guest.ended.get(name, 0) for name, value in worker.counters.items()}
    counters |= host.balloon.counters
    counters |= host.inactive.counters
    counters["aside_evicted"] = host.aside.evicted
    counters["return_offered"] = host.discard.offered
    counters["return_taken"] = host.discard.taken
    counters |= dict.fromkeys(_DISK, 0)
    for disk in guest.vfs.disks:
        for name, value in disk.counters.items():
            counters[name] = counters.get(name, 0) + value
    counters |= host.ram.stats()
    if usages is not None:
        counters |= usages.counters
    return counters
