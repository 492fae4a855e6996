"""MADV_DONTNEED against MADV_FREE: what the kernel shows, and when the memory is really gone.

Prints:

                          RSS    LazyFree
    discard: filled    16 MiB     0 MiB
    discard: given      0 MiB     0 MiB
    discard: again     16 MiB     0 MiB   16 MiB faulted back, as zeros
    lazy:    filled    16 MiB     0 MiB
    lazy:    given     16 MiB    16 MiB   RSS doesn't tell
    lazy:    pressed    4 MiB     0 MiB   4 MiB were written meanwhile and stayed
    lazy:    again     16 MiB     0 MiB   12 MiB faulted back, 4 MiB kept their content
"""

import os

import emu

FRAMES = 4096


def mib(frames: int) -> str:
    return f"{round(frames / 256)} MiB"


def show(what: str, ram: emu.GuestRam, comment: str = "") -> None:
    rss, lazy = mib(ram.rss_bytes // 4096), mib(ram.lazyfree_bytes // 4096)
    print(f"{what:<17} {rss:>7}   {lazy:>7}" + (f"   {comment}" if comment else ""))


def faults(ram: emu.GuestRam) -> int:
    return ram.stats()["pgfault"]


def main() -> None:
    # MADV_FREE parks up to 31 pages in a batch of its CPU, where pressure from another one can't see them: stay on one
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{'':<17}     RSS    LazyFree")
    with emu.GuestRam("64MiB") as ram:
        ram.fill(0, FRAMES, seed=1)
        show("discard: filled", ram)
        ram.discard([(0, FRAMES)])
        show("discard: given", ram)
        before = faults(ram)
        ram.touch(0, FRAMES)
        assert ram.read(0, FRAMES * 4096) == bytes(FRAMES * 4096)
        show("discard: again", ram, f"{mib(faults(ram) - before)} faulted back, as zeros")

    with emu.GuestRam("64MiB") as ram:
        ram.fill(0, FRAMES, seed=1)
        show("lazy:    filled", ram)
        ram.lazy_free([(0, FRAMES)])
        show("lazy:    given", ram, "RSS doesn't tell")
        ram.fill(0, 1024, seed=2)
        gone = ram.lazy_drop()
        show("lazy:    pressed", ram, f"{mib(FRAMES - gone)} were written meanwhile and stayed")
        before = faults(ram)
        ram.touch(0, FRAMES)
        kept = FRAMES - len(ram.verify(0, FRAMES, seed=2))
        show("lazy:    again", ram, f"{mib(faults(ram) - before)} faulted back, {mib(kept)} kept their content")


if __name__ == "__main__":
    main()
