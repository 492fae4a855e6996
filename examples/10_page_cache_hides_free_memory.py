"""Free page reporting and the page cache: what a guest has read once stays resident, though it needs none of it.

Prints (sizes in MiB; "available" is what the guest could use at once, MemAvailable):

    boot                           used    0.0   cached    0.0   available  471.7   RSS    0.0
    used and freed 200 MiB         used    0.0   cached    0.0   available  456.9   RSS   16.0
    read 96 MiB of files           used    0.0   cached   96.0   available  439.6   RSS   96.0
    ten minutes later              used    0.0   cached   96.0   available  439.6   RSS   96.0
"""

import tempfile
from pathlib import Path

import emu

MIB = 1 << 20


def show(m: emu.Machine, what: str) -> None:
    s = m.snapshot(exact=True)
    sizes = (s.guest_used_bytes, s.guest_cached_bytes, s.guest_available_bytes, s.rss_bytes)
    used, cached, available, rss = (f"{size / MIB:6.1f}" for size in sizes)
    print(f"{what:<28}   used {used}   cached {cached}   available {available}   RSS {rss}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n in range(24):
            Path(folder, f"f{n}").write_bytes(bytes([n]) * (4 * MIB))
        with emu.Machine("512MiB", "reporting", disk=folder, clock=emu.StepClock()) as m:
            m.settle()
            show(m, "boot")
            process = m.guest.spawn("app")
            process.mmap("200MiB").touch()
            process.exit()
            m.run_for(60)
            show(m, "used and freed 200 MiB")  # what is left is on per-CPU lists
            for path, size in m.guest.walk():
                with m.guest.open(path) as file:
                    assert file.read(0, size) == bytes([int(path[1:])]) * size
            show(m, "read 96 MiB of files")
            m.run_for(600)
            show(m, "ten minutes later")


if __name__ == "__main__":
    main()
