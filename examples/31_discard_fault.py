"""Discard faults: what the host took while its guest said "volatile" is never read as zeros, and never as it was.

The same at the level of frames: a page is unused, volatile, or needed, and the host takes accordingly. A raw access to
what is gone is refused, and says which frame; who asks before, by making it stable, is told. A guest that lies, and
calls volatile what it needs, harms itself alone. Prints:

    taken: 30 unused, 20 volatile, 0 of the 50 that are needed
    frame 30 is read: guest frame 0x1e: the host has taken it while its owner could make it anew: make it anew
    frames 31 to 49, made stable: 19 of 19 were gone, and are told at each use until they are given up
    given up, they read as zeros: 19 of 19
    the neighbour's 100 frames: 0 wrong
"""

import emu
from emu import DiscardFault, Usage

PAGE = 4096


def main() -> None:
    with emu.GuestRam("1MiB") as ram, emu.GuestRam("1MiB") as neighbour:
        for each in (ram, neighbour):
            each.track_usages()
            each.fill(0, 100, seed=1)
        ram.say([(0, 30)], Usage.UNUSED)
        ram.say([(30, 20)], Usage.VOLATILE)
        ram.steal(ram.frames)
        stats = ram.stats()
        needed = 50 - len([gfn for gfn in ram.verify(50, 50, seed=1)])
        print(
            f"taken: {stats['steal_unused']} unused, {stats['steal_volatile']} volatile, {50 - needed} of the 50 that "
            "are needed"
        )
        try:
            ram.read(30 * PAGE, 1)
        except DiscardFault as fault:
            print(f"frame {fault.gfn} is read: {fault}")
        _, gone = ram.say([(31, 19)], Usage.STABLE)
        told = 0
        for gfn in gone:
            try:
                ram.read(gfn * PAGE, 1)
            except DiscardFault:
                told += 1
        says = "and are told at each use until they are given up" if told == 19 else "?"
        print(f"frames 31 to 49, made stable: {len(gone)} of 19 were gone, {says}")
        ram.say([(31, 19)], Usage.UNUSED)
        zeros = sum(ram.read(gfn * PAGE, PAGE) == bytes(PAGE) for gfn in gone)
        print(f"given up, they read as zeros: {zeros} of 19")
        ram.say([(50, 50)], Usage.VOLATILE)  # a lie
        ram.steal(ram.frames)
        print(f"the neighbour's 100 frames: {len(neighbour.verify(0, 100, seed=1))} wrong")


if __name__ == "__main__":
    main()
