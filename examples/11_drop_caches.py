"""drop_caches: the guest's cache goes back to the host, all but dirty, mapped and locked pages; the next reads pay.

Prints (pages of 4 KiB):

    read                     cached 16384   dirty    0   mapped    0   RSS 16384
    10 written, 20 mapped    cached 16384   dirty   10   mapped   20   RSS 16384
    echo 3 > drop_caches     cached    30   dirty    0   mapped   20   RSS   512
    sync, munmap, again      cached     0   dirty    0   mapped    0   RSS     0
    read once more           cached 16384   dirty    0   mapped    0   RSS 16384
    from the disk: 128.0 MiB for 64.0 MiB of files
"""

import tempfile
from pathlib import Path

import emu

SIZE = 64 << 20


def show(m: emu.Machine, what: str) -> None:
    s = m.snapshot(exact=True)
    c = s.counters
    cached, rss = s.guest_cached_bytes // 4096, s.rss_bytes // 4096
    print(
        f"{what:<24} cached {cached:5}   dirty {c['guest_nr_dirty']:4}   mapped {c['guest_nr_mapped']:4}   RSS {rss:5}"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").write_bytes(bytes(range(256)) * (SIZE // 256))
        with emu.Machine("256MiB", "reporting", disk=folder, clock=emu.StepClock()) as m:
            m.settle()
            file = m.guest.open("data", "r+")
            for at in range(0, SIZE, 1 << 20):
                file.read(at, 1 << 20)
            show(m, "read")
            file.write(100 * 4096, b"w" * (10 * 4096))
            mapping = m.guest.spawn("app").mmap(20 * 4096, file=file)
            mapping.touch(write=False)
            show(m, "10 written, 20 mapped")
            m.guest.drop_caches(3)
            m.run_for(60)  # reporting's passes; of 2 MiB with a page in use all stays; the flusher writes
            show(m, "echo 3 > drop_caches")
            m.guest.sync()
            mapping.munmap()
            m.guest.drop_caches(3)
            m.run_for(60)
            show(m, "sync, munmap, again")
            for at in range(0, SIZE, 1 << 20):
                file.read(at, 1 << 20)
            show(m, "read once more")
            read = m.stats()["disk_read_bytes"] / (1 << 20)
            print(f"from the disk: {read:.1f} MiB for {SIZE / (1 << 20):.1f} MiB of files")


if __name__ == "__main__":
    main()
