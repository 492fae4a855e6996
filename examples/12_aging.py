"""Aging: cache that nobody has used for a minute goes back to the host, what is in use stays, without any pressure.

Eight files are read once; one of them is read again every 10 s. drop_caches every 30 s is the other way to do it.
Prints (MiB; a generation is 15 s):

                             aging                reporting+dropcaches
                         RSS  from disk           RSS  from disk
    read              128.0      128.0        128.0      128.0
    after   30 s      128.0      128.0        128.0      128.0
    after   60 s      128.0      128.0         18.0      144.0
    after   90 s       16.0      128.0         18.0      160.0
    after  600 s       16.0      128.0         18.0      432.0
"""

import tempfile
from pathlib import Path

import emu

MIB = 1 << 20
SIZE = 16 * MIB


def read(m: emu.Machine, name: str) -> None:
    with m.guest.open(name) as file:
        for at in range(0, SIZE, MIB):
            file.read(at, MIB)


def rows(folder: str, mechanism: str) -> list[str]:
    def row() -> str:
        return f"{m.rss_bytes / MIB:5.1f} {m.stats()['disk_read_bytes'] / MIB:10.1f}"

    with emu.Machine("512MiB", mechanism, disk=folder, clock=emu.StepClock()) as m:
        for n in range(8):
            read(m, f"f{n}")
        result = [row()]
        for t in range(10, 601, 10):
            m.run_for(10)
            if t in (30, 60, 90, 600):
                result.append(row())
            read(m, "f0")
        return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n in range(8):
            Path(folder, f"f{n}").write_bytes(bytes([n]) * SIZE)
        names = ("aging:seconds=60", "reporting+dropcaches:every=30")
        columns = [rows(folder, name) for name in names]
    print(f"{'aging':>30} {'reporting+dropcaches':>35}")
    print(f"{'RSS  from disk':>35} {'RSS  from disk':>24}")
    for what, a, b in zip(("read", *(f"after {t:4} s" for t in (30, 60, 90, 600))), *columns, strict=True):
        print(f"{what:<17} {a}        {b}")


if __name__ == "__main__":
    main()
