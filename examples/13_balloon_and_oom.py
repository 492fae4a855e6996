"""The balloon: free memory first, then cache; a burst takes it back, or kills, and cache doesn't come back by itself.

Prints (MiB):

    64 MiB of files read         balloon    0   cached   64   RSS   64
    guest keeps 96 of 256        balloon  160   cached   64   RSS   64
    guest keeps 32               balloon  224   cached   15   RSS   18
    deflated                     balloon    0   cached   15   RSS   18
    deflate_on_oom=yes: a burst of 150 MiB in a guest that keeps 96: served, balloon 92, OOM kills 0
    deflate_on_oom=no : a burst of 150 MiB in a guest that keeps 96: killed, balloon 160, OOM kills 1
"""

import tempfile
from pathlib import Path

import emu

MIB = 1 << 20


def show(m: emu.Machine, what: str) -> None:
    s = m.snapshot(exact=True)
    sizes = (s.guest_ballooned_bytes, s.guest_cached_bytes, s.rss_bytes)
    balloon, cached, rss = (f"{size / MIB:4.0f}" for size in sizes)
    print(f"{what:<28} balloon {balloon}   cached {cached}   RSS {rss}")


def burst(deflate: str) -> None:
    mechanism = f"balloon:target=96MiB,deflate_on_oom={deflate}"
    with emu.Machine("256MiB", mechanism, clock=emu.StepClock()) as m:
        m.settle()
        try:
            m.guest.spawn("burst").mmap("150MiB").fill(seed=1)
            end = "served"
        except emu.OomKilled:
            end = "killed"
        balloon = m.guest.ballooned_bytes / MIB
        kills = m.stats()["guest_oom_kill"]
        print(f"deflate_on_oom={deflate:<3}: a burst of 150 MiB in a guest that keeps 96: ", end="")
        print(f"{end}, balloon {balloon:.0f}, OOM kills {kills}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").write_bytes(bytes(64 * MIB))
        with emu.Machine("256MiB", "balloon:target=256MiB", disk=folder, clock=emu.StepClock()) as m:
            with m.guest.open("data") as file:
                for at in range(0, file.size, MIB):
                    file.read(at, MIB)
            show(m, "64 MiB of files read")
            for keep, what in (("96MiB", "guest keeps 96 of 256"), ("32MiB", "guest keeps 32"), ("256MiB", "deflated")):
                m.host.balloon.guest_target = keep
                m.settle()
                show(m, what)
    burst("yes")
    burst("no")


if __name__ == "__main__":
    main()
