"""Counters of guest, host and core in one flat table, spelled as /proc/vmstat spells its own."""

from emu.guest.kernel import GuestKernel
from emu.host.hypervisor import Hypervisor

__all__ = ["read_vmstat"]


def read_vmstat(guest: GuestKernel, host: Hypervisor) -> dict[str, int]:
    """Return all counters. The guest's start with guest_ where the core has one of the same name.

    nr_* are frames by state; the others count up. report_pages are frames reported, discard_frames frames that held
    memory when they were discarded.
    """
    counters = {f"guest_{name}": value for name, value in guest.vmstat.items()}
    if guest.reporting is not None:
        # workers that were there before it have left theirs with the guest
        counters |= {name: value + guest.ended.get(name, 0) for name, value in guest.reporting.counters.items()}
    else:
        counters |= guest.ended
    counters |= host.balloon.counters
    counters["return_offered"] = host.discard.offered
    counters["return_taken"] = host.discard.taken
    counters |= host.ram.stats()
    return counters
