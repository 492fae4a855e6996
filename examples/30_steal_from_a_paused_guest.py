"""CMM2: the host takes a guest's page cache while the guest stands still, and the guest doesn't lose a byte.

A guest has read 64 MiB of files. Each clean page of its cache is called volatile, so the host takes them without a
word; the guest's own view of its memory doesn't change. Afterwards everything is read again, compared with the disk.
Prints (MiB; read: from the guest's disk):

                                   RSS   cached   free   read
    64 files read                 64.0     64.0  192.0   64.0
    paused, and stolen from       16.0     64.0  192.0   64.0
    all read once more            64.0     64.0  192.0  112.0
    12,288 frames stolen; meanwhile 0 vCPU calls, and 0 calls of a function of the guest's kernel
    0 of 64 files differ
"""

import sys
import tempfile
from pathlib import Path

import emu
from emu.testing import StepClock

MIB = 1 << 20


def main() -> None:
    print(f"{'RSS':>34} {'cached':>8} {'free':>6} {'read':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            Path(folder, str(i)).write_bytes(bytes([i]) * MIB)
        with emu.Machine("256MiB", "cmm2", disk=folder, disk_read_only=True, clock=StepClock()) as m:

            def row(what: str) -> None:
                guest, read = m.guest, m.guest.vmstat["pgpgin"] / 1024
                free = (guest.free_bytes + guest.pcp_bytes) / MIB
                print(f"{what:<24} {m.rss_bytes / MIB:9.1f} {guest.cached_bytes / MIB:8.1f} {free:6.1f} {read:6.1f}")

            def wrong() -> int:
                bad = 0
                for i in range(64):
                    with m.guest.open(str(i)) as file:
                        bad += file.read(0, MIB) != bytes([i]) * MIB
                return bad

            wrong()
            row("64 files read")
            vcpu_calls, called = m.ram.stats()["vcpu_calls"], []
            with m.guest.paused():
                # every Python function that is called from now on, by its file
                sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename))
                stolen = m.host.steal("48MiB")
                sys.setprofile(None)
            vcpu_calls = m.ram.stats()["vcpu_calls"] - vcpu_calls
            ran = sum("/emu/guest/" in file for file in called)
            row("paused, and stolen from")
            differ = wrong()
            row("all read once more")
    print(
        f"{stolen // 4096:,} frames stolen; meanwhile {vcpu_calls} vCPU calls, and {ran} calls of a function of the "
        f"guest's kernel\n{differ} of 64 files differ"
    )


if __name__ == "__main__":
    main()
