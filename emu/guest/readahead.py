"""Readahead: how many pages to read at a miss, and when to read on (mm/readahead.c, ondemand_readahead, Linux 6.1).

A file that is open keeps a window, [start, start + size), of which the last async_size pages are ahead of the reader:
the first of those carries a marker (PG_readahead), and a read that reaches it asks for the next window while there is
still something to read. A window grows four- or twofold up to `ra_pages` (128 KiB). What begins at the file's start, or
goes on where the last read ended, is taken for a stream; a small read anywhere else is read as it is, and changes
nothing; and where pages before it are cached, a stream is guessed from those (try_context_readahead: many readers of
one file).
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["IO_PAGES", "RA_PAGES", "ReadaheadState", "Window", "next_window"]

RA_PAGES = 32  # VM_READAHEAD_PAGES: 128 KiB
IO_PAGES = 320  # bdi->io_pages of a virtio-blk disk: one request of BLK_DEF_MAX_SECTORS, 1,280 KiB


@dataclass(frozen=True, slots=True)
class Window:
    """Pages to read: `count` from `start` on; the marker goes to page start + count - marker, if marker isn't 0."""

    start: int
    count: int
    marker: int


@dataclass(slots=True)
class ReadaheadState:
    """struct file_ra_state: in pages; prev_pos is the byte after the last read, -1 before any."""

    start: int = 0
    size: int = 0
    async_size: int = 0
    ra_pages: int = RA_PAGES
    prev_pos: int = -1


def _init_size(wanted: int, most: int) -> int:
    # get_init_ra_size()
    size = 1 << max(wanted - 1, 0).bit_length()
    if size <= most // 32:
        return size * 4
    return size * 2 if size <= most // 4 else most


def _next_size(current: int, most: int) -> int:
    # get_next_ra_size()
    if current < most // 16:
        return 4 * current
    return 2 * current if current <= most // 2 else most


def next_window(
    ra: ReadaheadState,
    index: int,
    wanted: int,
    *,
    marked: bool,
    cached: Callable[[int, int], int],
    cached_before: Callable[[int, int], int],
) -> Window | None:
    """Return what to read when page `index` of a read of `wanted` pages is missing (or, marked, has the marker).

    cached(first, n), cached_before(last, n): how many pages in a row, up or down from there, are cached, at most n.
    None: nothing (a marker met with everything ahead cached).
    """
    most = ra.ra_pages if wanted <= ra.ra_pages else max(ra.ra_pages, min(wanted, IO_PAGES))
    expected = ra.start + ra.size - ra.async_size
    if index == 0:
        _initial(ra, index, wanted, most)
    elif index in (expected, ra.start + ra.size):
        # as foreseen: push the window on
        ra.start += ra.size
        ra.size = _next_size(ra.size, most)
        ra.async_size = ra.size
    elif marked:
        # somebody else's marker (interleaved streams): the next gap begins a window
        ahead = cached(index + 1, most)
        if ahead >= most:
            return None
        ra.start = index + 1 + ahead
        ra.size = _next_size(ra.start - index + wanted, most)
        ra.async_size = ra.size
    elif wanted > most or (0 <= index - (max(ra.prev_pos, 0) >> 12) <= 1 and ra.prev_pos >= 0):
        _initial(ra, index, wanted, most)
    else:
        history = cached_before(index - 1, most)
        if history <= wanted:
            return Window(index, wanted, 0)  # a random read: as it is
        if history >= index:  # cached from the file's start on
            history *= 2
        ra.start = index
        ra.size = min(history + wanted, most)
        ra.async_size = 1
    if index == ra.start and ra.size == ra.async_size:
        # the reader stands on what would be the marker: take the next window with this one
        more = _next_size(ra.size, most)
        if ra.size + more <= most:
            ra.async_size = more
            ra.size += more
        else:
            ra.size = most
            ra.async_size = most >> 1
    return Window(ra.start, ra.size, ra.async_size)


def _initial(ra: ReadaheadState, index: int, wanted: int, most: int) -> None:
    ra.start = index
    ra.size = _init_size(wanted, most)
    ra.async_size = ra.size - wanted if ra.size > wanted else ra.size
