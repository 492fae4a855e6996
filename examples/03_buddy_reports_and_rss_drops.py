"""Free page reporting, second by second: the buddy merges, 2 s later the guest reports, the host discards, RSS drops.

Prints (the 16 MiB that are never reported are ZONE_DMA, too small for reporting at order 9; a real guest has them,
too):

    t=  4.0  touched                RSS 256 MiB   free, unreported  16 MiB
    t=  4.0  freed                  RSS 256 MiB   free, unreported 246 MiB
    t=  6.0  pass 3                 RSS  26 MiB   free, unreported  16 MiB
    t= 66.0  a minute later         RSS  26 MiB   free, unreported  16 MiB
             26 MiB are on per-CPU lists: freed, but out of reporting's sight
    t= 68.0  drained, pass 4        RSS   0 MiB   free, unreported  16 MiB
"""

import emu


def mib(size: int) -> str:
    return f"{round(size / (1 << 20)):3} MiB"


def show(m: emu.Machine, what: str) -> None:
    s = m.snapshot()
    assert s.reporting is not None
    print(f"t={s.t:5.1f}  {what:<21}  RSS {mib(s.rss_bytes)}   free, unreported {mib(s.reporting.unreported_bytes)}")


def main() -> None:
    with emu.Machine("512MiB", "reporting", clock=emu.StepClock()) as m:
        m.settle()  # at boot, all of memory is free and gets reported
        memory = m.guest.spawn("app").mmap("256MiB", thp=True)
        memory.touch()
        show(m, "touched")
        memory.munmap()
        show(m, "freed")
        m.run_for(2)
        show(m, f"pass {m.stats()['report_passes']}")
        m.run_for(60)
        show(m, "a minute later")
        on_lists = mib(m.snapshot().guest_pcp_bytes).strip()
        print(f"         {on_lists} are on per-CPU lists: freed, but out of reporting's sight")
        m.guest.drain_pages()  # as drop_caches does
        m.run_for(2)
        show(m, f"drained, pass {m.stats()['report_passes']}")


if __name__ == "__main__":
    main()
