"""The buddy allocator, as mm/page_alloc.c has it (Linux 6.1).

Free memory is kept in blocks of 2^order frames, order 0 to 10, aligned to their size. Allocation takes the first block
of the smallest sufficient order and splits it, the upper halves going back to the lists (expand). Freeing merges a
block with its buddy, the block whose number differs in one bit, for as long as that buddy is free (__free_one_page).

Three things that a textbook buddy lacks decide what free page reporting sees:

- **Head or tail.** A freed block goes to the head of its list, unless its merge to the next order looks likely
  (buddy_merge_likely): then to the tail, where it is left alone for longer. Reported blocks gather at the tail.
- **Pageblocks and migratetypes.** Each 2 MiB pageblock is unmovable, movable or reclaimable, and has its free blocks on
  lists of that type, so that unmovable allocations don't sprinkle all of memory. When a type runs out it steals from
  another, the largest block it can find, and takes the pageblock over if enough of it is free or compatible.
- **The Reported flag** of a free block dies when the block leaves its list: by allocation, by split, by merge.

Bulk calls do what the same number of single calls would do, block by block: a run of frames freed in ascending order
leaves the same blocks in the same places as its aligned blocks freed one after another, since a block comes into being
when its last frame is freed. tests/stateful holds the two against each other.

Deviations: no watermark boost after a steal, no highatomic, isolated or CMA pageblocks, no shuffling, no
ALLOC_NOFRAGMENT; a pageblock's frames that aren't free count as movable when it is (Linux looks at each page, and not
at those on per-CPU lists); what comes back from a per-CPU list goes to its pageblock's type of now, not of its free.
"""

from collections.abc import Callable, Iterator, Sequence

from emu.errors import AllocatorError, BadValue, OutOfMemory
from emu.guest.free_area import MAX_ORDER, PAGEBLOCK_ORDER, FreeArea, MigrateType, lazy_bytes

__all__ = ["MAX_ORDER", "PAGEBLOCK_ORDER", "Buddy", "MigrateType"]

_PAGEBLOCK = 1 << PAGEBLOCK_ORDER
_ORDERS = MAX_ORDER + 1
# mm/page_alloc.c, fallbacks[]
_FALLBACKS = ((2, 1), (2, 0), (0, 1))


class Buddy(FreeArea):
    """An area of frames [base, base + frames) and its free blocks.

    base must be a multiple of the largest block. on_free(order) is called at the end of every free with the order that
    the block merged up to; free page reporting hooks in there. Numbers of frames are pfns, absolute.
    """

    def __init__(self, frames: int, *, base: int = 0, on_free: Callable[[int], None] | None = None) -> None:
        if not isinstance(frames, int) or not 1 <= frames < 1 << 32:
            raise BadValue(f"a buddy allocator of {frames!r} frames: give an integer from 1 to {(1 << 32) - 1}")
        if base % (1 << MAX_ORDER):
            raise BadValue(f"base {base} isn't a multiple of {1 << MAX_ORDER} frames")
        self.on_free = on_free
        super().__init__(frames, base=base)
        # order + 1 where an allocated block starts; PCP's mark on frames that sit on a per-CPU list
        self._allocated = lazy_bytes(frames)
        self._type = bytearray([MigrateType.MOVABLE]) * (-(-frames // _PAGEBLOCK))

    # ---- freeing

    def _free_one(self, frame: int, order: int, migratetype: int, *, to_tail: bool = False, notify: bool = True) -> int:
        # __free_one_page(); frame is relative to base. Returns the order merged up to.
        block = frame >> order
        while order < MAX_ORDER:
            buddy = block ^ 1
            if buddy >= self._head[order] or not self._flags[order][buddy]:
                break
            self._del(order, buddy)
            block >>= 1
            order += 1
        tail = to_tail
        if not tail and order < MAX_ORDER - 1:
            # buddy_merge_likely(): would the block that we'd merge into find *its* buddy free?
            higher = (block >> 1) ^ 1
            tail = higher < self._head[order + 1] and bool(self._flags[order + 1][higher])
        self._add(order, block, migratetype, tail=tail)
        if notify and self.on_free is not None:
            self.on_free(order)
        return order

    def _check_order(self, order: int) -> None:
        if not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
            raise BadValue(f"order {order!r} must be from 0 to {MAX_ORDER}")

    def _check_allocated(self, pfn: int, order: int) -> int:
        if not isinstance(pfn, int):
            raise BadValue(f"pfn {pfn!r} isn't an integer")
        frame = pfn - self.base
        if not 0 <= frame < self.frames or frame + (1 << order) > self.frames:
            raise AllocatorError(
                f"pfn {pfn:#x} order {order} is outside [{self.base:#x}, {self.base + self.frames:#x})",
                pfn=pfn,
                order=order,
            )
        mark = self._allocated[frame]
        if mark == order + 1:
            return frame
        if mark == 0 or mark & 0x80:
            raise AllocatorError(f"pfn {pfn:#x} isn't allocated (a double free?)", pfn=pfn, order=order)
        raise AllocatorError(f"pfn {pfn:#x} was allocated with order {mark - 1}, not {order}", pfn=pfn, order=order)

    def free(self, pfn: int, order: int = 0) -> None:
        """Free a block. Raises AllocatorError, and changes nothing, if it isn't allocated with that order."""
        if self._open != self._open_end:
            frame = self._open - 1
            if (
                pfn == self.base + frame
                and order == 0
                and self._allocated[frame] == 1
                and self._type[frame >> PAGEBLOCK_ORDER] == self._open_type
            ):
                self._free_last(frame)
                return
        self._check_order(order)
        frame = self._check_allocated(pfn, order)
        self._allocated[frame] = 0
        if self._open != self._open_end:
            self._settle()
        self._free_one(frame, order, self._type[frame >> PAGEBLOCK_ORDER])

    def _free_last(self, frame: int) -> None:
        # The frame that the open block gave away last: it merges with what comes after it, and with nothing before it,
        # since all of that is allocated. Only the whole block may find its own buddy free.
        self._allocated[frame] = 0
        if frame == self._open_start:
            self.free_frames -= self._open_end - self._open
            self._open_start = self._open = self._open_end = 0
            self._free_one(frame, self._open_order, self._open_type)
            return
        self._open = frame
        self.free_frames += 1
        if self.on_free is not None:
            self.on_free((frame & -frame).bit_length() - 1)

    def free_bulk(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free runs of frames, (pfn, count) each, that were allocated one by one (order 0).

        As if each frame were freed by itself, in order. Raises AllocatorError, and changes nothing, if one of them
        isn't allocated with order 0.
        """
        seen = 0
        for pfn, count in sorted(ranges):
            frame = pfn - self.base
            if count < 1 or frame < seen or frame + count > self.frames:
                raise AllocatorError(
                    f"frames [{pfn:#x}, {pfn + count:#x}) are empty, outside, or named twice", pfn=pfn, order=0
                )
            seen = frame + count
            marks = bytes(self._allocated[frame:seen])
            if marks.count(1) != count:
                wrong = next(i for i, mark in enumerate(marks) if mark != 1)
                self._check_allocated(pfn + wrong, 0)
        for pfn, count in ranges:
            frame = pfn - self.base
            self._allocated[frame : frame + count] = bytes(count)
            self.free_run(frame, count)

    def free_run(self, frame: int, count: int, *, descending: bool = False) -> None:
        """Put a run of frames, relative to base and already unmarked, back on the lists (for the per-CPU lists)."""
        if self._open != self._open_end:
            self._settle()
        blocks: Iterator[tuple[int, int]] | list[tuple[int, int]] = self._blocks(frame, count)
        if descending:
            blocks = list(blocks)[::-1]
        for start, order in blocks:
            self._free_one(start, order, self._type[start >> PAGEBLOCK_ORDER])

    # ---- allocating

    def alloc(self, order: int = 0, migratetype: MigrateType = MigrateType.MOVABLE) -> int:
        """Allocate a block of 2^order frames; return its first pfn. Raises OutOfMemory."""
        frame = self._open
        if frame != self._open_end:
            if order == 0 and migratetype == self._open_type and order.__class__ is int:
                self._open = frame + 1
                self.free_frames -= 1
                self._allocated[frame] = 1
                return self.base + frame
            self._settle()
        self._check_order(order)
        frame = self._take(order, _migratetype(migratetype))
        if frame < 0:
            raise OutOfMemory(
                f"no free block of order {order} ({self.free_frames} frames free)",
                order=order,
                wanted=1 << order,
                free=self.free_frames,
            )
        self._allocated[frame] = order + 1
        return self.base + frame

    def alloc_bulk(self, count: int, migratetype: MigrateType = MigrateType.MOVABLE) -> list[tuple[int, int]]:
        """Allocate up to count single frames; return (pfn, count) runs in the order of allocation.

        As if count frames were allocated one by one; fewer when the lists run dry.
        """
        if not isinstance(count, int) or count < 0:
            raise BadValue(f"{count!r} frames can't be allocated")
        migratetype = _migratetype(migratetype)
        if self._open != self._open_end:
            self._settle()
        runs: list[tuple[int, int]] = []
        while count:
            frame, n = self._take_run(count, migratetype)
            if not n:
                break
            self._allocated[frame : frame + n] = b"\x01" * n
            if runs and runs[-1][0] + runs[-1][1] == self.base + frame:
                runs[-1] = (runs[-1][0], runs[-1][1] + n)
            else:
                runs.append((self.base + frame, n))
            count -= n
        return runs

    def _take(self, order: int, migratetype: int) -> int:
        # __rmqueue(): a block of exactly `order`, relative to base, unmarked; -1 when there is none
        while True:
            for current in range(order, _ORDERS):
                head = self._head[current] + migratetype
                block = self._next[current][head]
                if block == head:
                    continue
                self._del(current, block)
                frame = block << current
                if order == 0 and current:
                    self._open_block(frame, current, migratetype)
                    return frame
                while current > order:  # expand(): keep the lower half
                    current -= 1  # noqa: PLW2901
                    self._add(current, (frame >> current) + 1, migratetype, tail=False)
                return frame
            if not self._fallback(order, migratetype):
                return -1

    def _take_run(self, count: int, migratetype: int) -> tuple[int, int]:
        # The next single frames that one-by-one allocation would take from one block: the first block of the lowest
        # order is used up from its start before anything else is looked at.
        while True:
            for order in range(_ORDERS):
                head = self._head[order] + migratetype
                block = self._next[order][head]
                if block == head:
                    continue
                self._del(order, block)
                frame, size = block << order, 1 << order
                if count >= size:
                    return frame, size
                # what is left over, as the last split of each order would leave it: highest orders first
                for start, rest in reversed(list(self._blocks(frame + count, size - count))):
                    self._add(rest, start >> rest, migratetype, tail=False)
                return frame, count
            if not self._fallback(0, migratetype):
                return 0, 0

    def _fallback(self, order: int, migratetype: int) -> bool:
        # __rmqueue_fallback(): bring a block of another type over to ours
        for current in range(MAX_ORDER, order - 1, -1):
            other = self._fallback_type(current, migratetype)
            if other < 0:
                continue
            # can_steal_fallback()
            steal = current >= PAGEBLOCK_ORDER // 2 or migratetype != MigrateType.MOVABLE
            if not steal and current > order:
                # not the whole pageblock: then rather the smallest block than the largest
                current = next(o for o in range(order, _ORDERS) if self._fallback_type(o, migratetype) >= 0)  # noqa: PLW2901
                other = self._fallback_type(current, migratetype)
            self._steal(current, self._next[current][self._head[current] + other], migratetype, whole_block=steal)
            return True
        return False

    def _fallback_type(self, order: int, migratetype: int) -> int:
        for other in _FALLBACKS[migratetype]:
            head = self._head[order] + other
            if self._next[order][head] != head:
                return other
        return -1

    def _steal(self, order: int, block: int, migratetype: int, *, whole_block: bool) -> None:
        # steal_suitable_fallback()
        frame = block << order
        first = frame >> PAGEBLOCK_ORDER
        old = self._type[first]
        if order >= PAGEBLOCK_ORDER:
            for pageblock in range(first, first + (1 << (order - PAGEBLOCK_ORDER))):
                self._type[pageblock] = migratetype
            self._move(order, block, migratetype)
            return
        if not whole_block:
            self._move(order, block, migratetype)
            return
        start = first << PAGEBLOCK_ORDER
        if start + _PAGEBLOCK > self.frames:  # move_freepages_block() leaves a pageblock that the zone's end cuts
            self._move(order, block, migratetype)
            return
        free = self._move_pageblock(start, migratetype)
        in_use = _PAGEBLOCK - free
        movable = in_use if old == MigrateType.MOVABLE else 0
        alike = movable
        if migratetype != MigrateType.MOVABLE:  # not movable, so of our kind; unless the whole pageblock wasn't
            alike = in_use - movable if old == MigrateType.MOVABLE else 0
        if free + alike >= _PAGEBLOCK // 2:
            self._type[first] = migratetype

    def _move_pageblock(self, start: int, migratetype: int) -> int:
        # move_freepages_block(): every free block of the pageblock to our lists; returns their frames
        frame, free = start, 0
        while frame < start + _PAGEBLOCK:
            for order in range(PAGEBLOCK_ORDER):
                block = frame >> order
                if block << order == frame and self._flags[order][block]:
                    self._move(order, block, migratetype)
                    free += 1 << order
                    frame += 1 << order
                    break
            else:
                frame += 1
        return free

    def split(self, pfn: int, order: int) -> None:
        """Turn an allocated block into 2^order frames, each allocated by itself (split_page)."""
        frame = self._check_allocated(pfn, order)
        self._allocated[frame : frame + (1 << order)] = b"\x01" * (1 << order)

    def check_blocks(self, frame: int, count: int, order: int) -> None:
        """Raise AllocatorError unless count blocks in a row, relative to base, are allocated with that order."""
        if not 0 <= frame < frame + (count << order) <= self.frames:
            raise AllocatorError(
                f"{count} blocks of order {order} from pfn {self.base + frame:#x} on are outside",
                pfn=self.base + frame,
                order=order,
            )
        if order == 0:
            marks = bytes(self._allocated[frame : frame + count])
            if marks.count(1) == count:
                return
            frame, count = frame + next(i for i, mark in enumerate(marks) if mark != 1), 1
        for block in range(count):
            self._check_allocated(self.base + frame + (block << order), order)

    # ---- for the per-CPU lists: frames that are neither allocated nor on a free list

    def take_for_pcp(self, order: int, migratetype: int, most: int) -> tuple[int, int]:
        """Take what rmqueue_bulk() would take next: (frame relative to base, blocks) in a row; (0, 0) when dry."""
        if self._open != self._open_end:
            self._settle()
        if order == 0:
            frame, n = self._take_run(most, migratetype)
            if n:
                self._allocated[frame : frame + n] = b"\x81" * n
            return frame, n
        frame = self._take(order, migratetype)
        if frame < 0:
            return 0, 0
        self._allocated[frame] = 0x80 | (order + 1)
        return frame, 1

    def mark(self, frame: int, count: int, order: int, value: int) -> None:
        """Write the allocation map for count blocks in a row, relative to base."""
        if order == 0:
            self._allocated[frame : frame + count] = bytes([value]) * count
        else:
            for block in range(count):
                self._allocated[frame + (block << order)] = value

    def migratetype(self, frame: int) -> int:
        """Return the type of the pageblock that holds a frame, relative to base."""
        return self._type[frame >> PAGEBLOCK_ORDER]

    def one_migratetype(self, frame: int, count: int) -> bool:
        """Whether a run of frames, relative to base, lies in pageblocks of one type."""
        types = self._type[frame >> PAGEBLOCK_ORDER : (frame + count - 1 >> PAGEBLOCK_ORDER) + 1]
        return types.count(types[0]) == len(types)

    # ---- for free page reporting

    def isolate(self, order: int, block: int) -> None:
        """Take a free block off its list, for reporting (__isolate_free_page without its watermark check).

        A block of half a pageblock or more makes its pageblocks movable.
        """
        if self._open != self._open_end:
            self._settle()
        self._del(order, block)
        frame = block << order
        if order >= PAGEBLOCK_ORDER - 1:
            for pageblock in range(frame >> PAGEBLOCK_ORDER, (frame + (1 << order) - 1 >> PAGEBLOCK_ORDER) + 1):
                self._type[pageblock] = MigrateType.MOVABLE

    def putback(self, order: int, block: int, *, reported: bool) -> None:
        """Put an isolated block back at the tail; flagged if reported and not merged (page_reporting_drain)."""
        if self._open != self._open_end:
            self._settle()
        frame = block << order
        merged = self._free_one(frame, order, self._type[frame >> PAGEBLOCK_ORDER], to_tail=True, notify=False)
        if reported and merged == order:
            self.flag_reported(order, block)


def _migratetype(value: int) -> MigrateType:
    if value.__class__ is MigrateType:  # an enum's constructor takes as long as a split
        return value
    try:
        return MigrateType(value)
    except ValueError:
        raise BadValue(f"migratetype {value!r} isn't one of {', '.join(t.name for t in MigrateType)}") from None
