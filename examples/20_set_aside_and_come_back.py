"""Set aside: memory that left the guest, is kept for a while, and comes back at a touch, read or write.

A guest frees 64 MiB, and the host keeps what is reported for a minute. Half of it is taken again in time; the rest
goes. Prints (MiB; footprint = RSS + aside + the host's tables):

                                  RSS   aside   footprint
    touched                      64.0     0.0        64.0
    freed and reported            0.0    64.0        64.1
    a plain read of one page      0.0    64.0        64.1
    half of it used again        32.0    32.0        64.1
    a minute later               32.0     0.0        32.1
    8,193 frames came back, 8,191 were dropped, 0 of 8,192 hold wrong bytes
"""

import emu

MIB = 1 << 20
PAGE = 4096


def main() -> None:
    print(f"{'RSS':>33} {'aside':>7} {'footprint':>11}")
    with emu.GuestRam("64MiB") as ram:

        def row(what: str) -> None:
            ram.sweep()  # copies that frames left behind when they came back: dropped a few at a time otherwise
            sizes = ram.rss_bytes / MIB, ram.side_bytes / MIB, ram.footprint_bytes / MIB
            print(f"{what:<24} {sizes[0]:8.1f} {sizes[1]:7.1f} {sizes[2]:11.1f}")

        ram.fill(0, ram.frames, seed=7)
        row("touched")
        ram.set_aside([(0, ram.frames)], stamp=1)  # the batch of this minute
        row("freed and reported")
        assert ram.read(5 * PAGE, PAGE) != bytes(PAGE)  # MADV_FREE would not have noticed
        row("a plain read of one page")
        ram.touch(0, ram.frames // 2)
        ram.touch(ram.frames - 1)
        row("half of it used again")
        ram.drop_aside(stamp=1)  # its minute is over: those that nobody has touched
        row("a minute later")
        wrong = ram.verify(0, ram.frames // 2, seed=7)
        stats = ram.stats()
    print(
        f"{stats['aside_return']:,} frames came back, {stats['aside_dropped']:,} were dropped, "
        f"{len(wrong)} of {8192:,} hold wrong bytes"
    )


if __name__ == "__main__":
    main()
