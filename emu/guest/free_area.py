"""The free lists of an area: which blocks are free, by order and migratetype, in which order (struct free_area).

Lists are circular and doubly linked through arrays indexed by block number, as the kernel's run through struct page, so
that taking a block out of the middle and rotating a list cost what they cost there. The arrays are lazily populated
memory: a 1 TiB guest has 2 GiB of them and pays for the pages it uses.

A block's flag byte says that it is free, and whether it was reported. Both end with its place on the list: taking a
block off, for whatever reason, is what makes the Reported flag die (del_page_from_free_list).

The open block. Taking one frame out of a block of order n splits it n times and puts n remainders on n lists
(expand()); giving the frame back merges them all again. In C that is some 20 cache lines; in Python it would be most of
what the allocator does. So the remainders are written down only when somebody looks. Until then the block is *open*:
its frames from `_open` to `_open_end` are free, and stand for the blocks that they would make. That is exact, not
nearly so, by two facts that hold while a block is open. A block is split only when its type's lists of all lower orders
are empty, so each remainder would be alone on its list; and whatever else touches the lists settles the open block
first, so they stay empty. Frames taken from the front, or given back in the reverse order, only move `_open`.
"""

import enum
import mmap
from array import array
from collections.abc import Iterator

__all__ = ["MAX_ORDER", "PAGEBLOCK_ORDER", "FreeArea", "MigrateType", "lazy_bytes"]

MAX_ORDER = 10  # the largest order (the kernel's MAX_ORDER was one more until 6.4)
PAGEBLOCK_ORDER = 9
_ORDERS = MAX_ORDER + 1
_MAP_NORESERVE = 0x4000

# a block's flag byte: 0 = no free block of this order starts here
_FREE = 1
_REPORTED = 2


class MigrateType(enum.IntEnum):
    """include/linux/mmzone.h, enum migratetype."""

    UNMOVABLE = 0
    MOVABLE = 1
    RECLAIMABLE = 2


_TYPES = len(MigrateType)


def lazy_bytes(n: int) -> memoryview:
    """Return n zero bytes whose pages come into being when they are written."""
    return memoryview(mmap.mmap(-1, max(n, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE))


class FreeArea:
    """The lists of frames [base, base + frames): all free at first, in the largest blocks, ascending.

    Blocks are numbered within their order: block b of order o starts at frame b << o, relative to base.
    """

    def __init__(self, frames: int, *, base: int = 0) -> None:
        self.base = base
        self.frames = frames
        #: frames on the free lists
        self.free_frames = 0
        #: free blocks by order (nr_free), and of those the reported ones
        self._nr_free = [0] * _ORDERS
        self.nr_reported = [0] * _ORDERS
        #: the open block: its first frame, the first that is free, its end; relative to base. None is open: 0, 0, 0
        self._open_start = self._open = self._open_end = 0
        self._open_order = self._open_type = 0
        blocks = [frames >> order for order in range(_ORDERS)]
        # one mapping, cut into next, prev and flags of each order
        words = sum(n + _TYPES for n in blocks)
        slab = lazy_bytes(8 * words + sum(blocks))
        links = slab[: 8 * words].cast("I")
        self._next: list[memoryview] = []
        self._prev: list[memoryview] = []
        self._flags: list[memoryview] = []
        at, byte = 0, 8 * words
        for n in blocks:
            self._next.append(links[at : at + n + _TYPES])
            self._prev.append(links[at + n + _TYPES : at + 2 * (n + _TYPES)])
            at += 2 * (n + _TYPES)
            self._flags.append(slab[byte : byte + n])
            byte += n
        self._head = blocks  # list of type t has its head at index blocks[order] + t
        for order, n in enumerate(blocks):
            for t in range(_TYPES):
                self._next[order][n + t] = self._prev[order][n + t] = n + t
        self._boot()

    def _boot(self) -> None:
        # memblock_free_all: largest blocks, ascending, each to the tail
        whole = self.frames >> MAX_ORDER
        if whole:
            head = self._head[MAX_ORDER] + MigrateType.MOVABLE
            nxt, prv = self._next[MAX_ORDER], self._prev[MAX_ORDER]
            step = 1 << 16
            for start in range(0, whole, step):
                end = min(start + step, whole)
                nxt[start:end] = _words(range(start + 1, end + 1))
                prv[start:end] = _words(range(start - 1, end - 1)) if start else _words([0, *range(end - 1)])
            nxt[whole - 1], prv[0] = head, head
            nxt[head], prv[head] = 0, whole - 1
            self._flags[MAX_ORDER][:] = bytes([_FREE]) * whole
            self._nr_free[MAX_ORDER] = whole
            self.free_frames = whole << MAX_ORDER
        for pfn, order in self._blocks(whole << MAX_ORDER, self.frames - (whole << MAX_ORDER)):
            self._add(order, pfn >> order, MigrateType.MOVABLE, tail=True)

    def release(self) -> None:
        """Let go of the arrays. The allocator is dead afterwards."""
        self._next, self._prev, self._flags = [], [], []
        self._allocated = memoryview(b"")

    def _add(self, order: int, block: int, migratetype: int, *, tail: bool) -> None:
        nxt, prv = self._next[order], self._prev[order]
        head = self._head[order] + migratetype
        if tail:
            last = prv[head]
            nxt[block], prv[block] = head, last
            nxt[last] = prv[head] = block
        else:
            first = nxt[head]
            nxt[block], prv[block] = first, head
            prv[first] = nxt[head] = block
        self._flags[order][block] = _FREE
        self._nr_free[order] += 1
        self.free_frames += 1 << order

    def _del(self, order: int, block: int) -> None:
        nxt, prv, flags = self._next[order], self._prev[order], self._flags[order]
        after, before = nxt[block], prv[block]
        nxt[before] = after
        prv[after] = before
        if flags[block] & _REPORTED:
            self.nr_reported[order] -= 1
        flags[block] = 0
        self._nr_free[order] -= 1
        self.free_frames -= 1 << order

    # ---- the open block

    def _open_block(self, frame: int, order: int, migratetype: int) -> None:
        # A block just taken off its list gives its first frame away; the lists of lower orders of its type are empty.
        self._open_start, self._open, self._open_end = frame, frame + 1, frame + (1 << order)
        self._open_order, self._open_type = order, migratetype
        self.free_frames += (1 << order) - 1

    def _settle(self) -> None:
        # Write the remainders down, as the splits would have left them. To be called before anything reads the lists.
        start, end = self._open, self._open_end
        self._open_start = self._open = self._open_end = 0
        self.free_frames -= end - start
        for frame, order in self._blocks(start, end - start):
            self._add(order, frame >> order, self._open_type, tail=False)

    @property
    def nr_free(self) -> list[int]:
        """Free blocks by order."""
        if self._open != self._open_end:
            self._settle()
        return self._nr_free

    @staticmethod
    def _blocks(start: int, count: int) -> Iterator[tuple[int, int]]:
        # the aligned blocks that [start, start + count) is made of, ascending: (first frame, order)
        while count:
            order = min(MAX_ORDER, count.bit_length() - 1)
            if start:
                order = min(order, (start & -start).bit_length() - 1)
            yield start, order
            start += 1 << order
            count -= 1 << order

    def _move(self, order: int, block: int, migratetype: int) -> None:
        # move_to_free_list(): to the tail, flags and counts unchanged
        nxt, prv = self._next[order], self._prev[order]
        nxt[prv[block]], prv[nxt[block]] = nxt[block], prv[block]
        head = self._head[order] + migratetype
        last = prv[head]
        nxt[block], prv[block] = head, last
        nxt[last] = prv[head] = block

    def first(self, order: int, migratetype: int) -> int:
        """Return the block at the head of a list, or -1."""
        if self._open != self._open_end:
            self._settle()
        block = self._next[order][self._head[order] + migratetype]
        return block if block < self._head[order] else -1

    def after(self, order: int, block: int) -> int:
        """Return the block that follows, or -1 at the end of the list."""
        if self._open != self._open_end:
            self._settle()
        block = self._next[order][block]
        return block if block < self._head[order] else -1

    def reported(self, order: int, block: int) -> bool:
        """Whether a free block carries the Reported flag."""
        return bool(self._flags[order][block] & _REPORTED)

    def flag_reported(self, order: int, block: int) -> None:
        """Give a free block the Reported flag."""
        self._flags[order][block] |= _REPORTED
        self.nr_reported[order] += 1

    def rotate_to_front(self, order: int, migratetype: int, block: int) -> None:
        """Make a block the first of its list, keeping the circle (list_rotate_to_front)."""
        if self._open != self._open_end:
            self._settle()
        nxt, prv = self._next[order], self._prev[order]
        head = self._head[order] + migratetype
        if nxt[head] == block:
            return
        nxt[prv[head]], prv[nxt[head]] = nxt[head], prv[head]
        last = prv[block]
        nxt[last] = head
        prv[head], nxt[head], prv[block] = last, block, head

    def free_blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (pfn, order, migratetype, reported) of every free block: by order, type, and place on the list."""
        for order in range(_ORDERS):
            for migratetype in range(_TYPES):
                block = self.first(order, migratetype)
                while block >= 0:
                    yield self.base + (block << order), order, migratetype, self.reported(order, block)
                    block = self.after(order, block)

    def reported_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (pfn, order) of every block with the Reported flag; they gather at the lists' tails."""
        for order in range(_ORDERS):
            left = self.nr_reported[order]
            for migratetype in range(_TYPES):
                block = self._prev[order][self._head[order] + migratetype]
                while left and block < self._head[order]:
                    if self.reported(order, block):
                        yield self.base + (block << order), order
                        left -= 1
                    block = self._prev[order][block]


def _words(values: "range | list[int]") -> memoryview:
    return memoryview(array("I", values))
