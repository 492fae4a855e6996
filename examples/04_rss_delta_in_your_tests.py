"""rss_delta: let your own tests say what your code does to memory. `pytest` on this file works, too.

Prints:

    a cache of 64 pages, filled: +64 pages
    cleared by assignment:        +0 pages   (what looks like freeing isn't)
    released by MADV_DONTNEED:   -64 pages
"""

import mmap
from collections.abc import Callable
from typing import Any

from emu.testing import rss_delta as measure


class PageCache:
    """The code under test: a cache that should give its memory back."""

    def __init__(self, pages: int) -> None:
        self.memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)  # so that the count is exact

    def fill(self) -> None:
        self.memory[:] = b"x" * len(self.memory)

    def clear(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    def release(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED)


def test_release_gives_everything_back(rss_delta: Callable[[Any], Any]) -> None:
    """The fixture comes with emu; nothing to import."""
    cache = PageCache(64)
    cache.fill()
    with rss_delta(cache.memory) as d:
        cache.release()
    assert d.pages == -64


def main() -> None:
    cache = PageCache(64)
    with measure(cache.memory) as d:
        cache.fill()
    print(f"a cache of 64 pages, filled: {d.pages:+} pages")
    with measure(cache.memory) as d:
        cache.clear()
    print(f"cleared by assignment:        {d.pages:+} pages   (what looks like freeing isn't)")
    with measure(cache.memory) as d:
        cache.release()
    print(f"released by MADV_DONTNEED:   {d.pages:+} pages")


if __name__ == "__main__":
    main()
