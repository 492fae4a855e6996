"""Swap: the host takes frames of a guest that goes on running, keeps them compressed, and hands no wrong byte out.

Four vCPU threads fill and verify 64 MiB, round after round, while the host swaps random parts of it. Then one stored
page is damaged on purpose. Prints:

    while it ran:   frames went to the store yes, came back yes, wrong frames 0
    at rest:        16,384 frames stored, RSS 0.0 MiB, pool smaller than the RAM yes
    a damaged page: guest frame 0x2a is lost, and says so; its neighbours right: yes
"""

import random
import threading

import emu
from emu.errors import GuestMemoryError

PAGE = 4096


def main() -> None:
    rng = random.Random(1)
    with emu.GuestRam("64MiB") as ram:
        ram.open_store()
        stop = threading.Event()

        def host() -> None:
            while not stop.is_set():
                first = rng.randrange(ram.frames)
                ram.swap_out([(first, min(rng.randrange(1, 2000), ram.frames - first))])

        thread = threading.Thread(target=host)
        thread.start()
        wrong = 0
        for seed in range(6):
            ram.fill(0, ram.frames, seed=seed, threads=4)
            for _ in range(3):
                wrong += len(ram.verify(0, ram.frames, seed=seed, threads=4))
        stop.set()
        thread.join()
        stats = ram.stats()
        out, back = (stats[f"swap_{way}_frames"] > 0 for way in ("out", "in"))
        print(f"while it ran:   frames went to the store {yes(out)}, came back {yes(back)}, wrong frames {wrong}")

        text = b"".join(b"line %d of a log that compresses\n" % n for n in range(400))
        for gfn in range(ram.frames):
            ram.write(gfn * PAGE, text[gfn % 64 : gfn % 64 + PAGE])
        stored = ram.swap_out([(0, ram.frames)])
        small = ram.store.pool_bytes < ram.size // 2
        print(f"at rest:        {stored:,} frames stored, RSS {ram.rss_bytes / 2**20:.1f} MiB, "
              f"pool smaller than the RAM {yes(small)}")  # fmt: skip

        ram.corrupt_stored(42)
        try:
            ram.read(42 * PAGE, 8)
        except GuestMemoryError as error:
            right = all(ram.read(gfn * PAGE, 40) == text[gfn % 64 : gfn % 64 + 40] for gfn in (41, 43))
            print(
                f"a damaged page: guest frame {error.gfn:#x} is lost, and says so; its neighbours right: {yes(right)}"
            )


def yes(it: bool) -> str:
    return "yes" if it else "no"


if __name__ == "__main__":
    main()
