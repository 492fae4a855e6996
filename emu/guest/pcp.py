"""Per-CPU lists: the frames that a CPU keeps for itself between the users and the buddy (mm/page_alloc.c, Linux 6.1).

A freed page of order 0 to 3, or a huge page, doesn't go to the buddy but to the head of a list of its order and
migratetype, and the next allocation takes it from there, hot. Only when all lists together reach `high` does a batch go
back, from the cold end; the batch doubles with each time that this happens with no allocation in between. An empty list
is refilled with a batch.

`high` is the zone's low watermark shared among the CPUs (zone_highsize), 54 MiB in a guest of 2 GiB with one CPU. These
frames are neither in MemFree nor on any free list, so free page reporting can't see them, for as long as nobody drains
the lists; and one of them keeps its neighbours from merging. Both were seen in a recorded guest.

A list is kept as runs of neighbouring blocks, so that freeing a gigabyte frame by frame costs a few runs and the order
of every frame is still what single frees would have left. Not here: pcp->free_high (draining the lists at once for a
flood of frees of order 1 to 3), the batch scaling of 6.7.
"""

from collections import deque
from collections.abc import Iterable

from emu.guest.buddy import PAGEBLOCK_ORDER, Buddy, MigrateType

__all__ = ["COSTLY_ORDER", "PerCpuPages", "spans", "zone_batchsize"]

COSTLY_ORDER = 3  # PAGE_ALLOC_COSTLY_ORDER
_ORDERS = (0, 1, 2, 3)
_TYPES = len(MigrateType)  # asked of an enum, this takes as long as the list access
_LISTS = len(_ORDERS) * _TYPES + 1  # NR_PCP_LISTS: by order and type, and one for huge pages
_HUGE = _LISTS - 1

Run = tuple[int, int, int]  # first block, blocks, +1 or -1: from the run's hot end, the next block is first +- 1


def zone_batchsize(managed: int) -> int:
    """Frames moved at a time between a list and the buddy (zone_batchsize())."""
    batch = max(min(managed >> 10, (1 << 20) // 4096) // 4, 1)
    batch += batch // 2
    return max((1 << (batch.bit_length() - 1)) - 1, 1)


class _List:
    """Blocks from hot (head) to cold (tail), as runs."""

    __slots__ = ("count", "runs")

    def __init__(self) -> None:
        self.runs: deque[Run] = deque()
        self.count = 0

    def push_hot(self, first: int, count: int) -> None:
        """The blocks first, first + 1 ... were freed in this order: the last of them is the hottest."""
        self.count += count
        if self.runs:
            start, n, step = self.runs[0]
            if step < 0 and start == first - 1:
                self.runs[0] = (first + count - 1, n + count, -1)
                return
        self.runs.appendleft((first + count - 1, count, -1))

    def push_cold(self, first: int, count: int) -> None:
        """Refill with first, first + 1 ... in the order in which they will be taken."""
        self.count += count
        if self.runs:
            start, n, step = self.runs[-1]
            if step > 0 and start + n == first:
                self.runs[-1] = (start, n + count, 1)
                return
        self.runs.append((first, count, 1))

    def pop_hot(self, most: int) -> Run:
        start, n, step = self.runs.popleft()
        take = min(n, most)
        self.count -= take
        if take < n:
            self.runs.appendleft((start + step * take, n - take, step))
        return start, take, step

    def pop_cold(self, most: int) -> Run:
        """The coldest blocks, coldest first."""
        start, n, step = self.runs.pop()
        take = min(n, most)
        self.count -= take
        if take < n:
            self.runs.append((start, n - take, step))
        return start + step * (n - 1), take, -step


def _span(run: Run) -> tuple[int, int]:
    start, n, step = run
    return (start, n) if step > 0 else (start - n + 1, n)


def spans(runs: Iterable[Run]) -> list[tuple[int, int]]:
    """Return runs, of blocks or frames, as (lowest, count)."""
    return [_span(run) for run in runs]


class PerCpuPages:
    """One CPU's lists over one zone's buddy. high and batch are in frames; count is what the lists hold."""

    def __init__(self, buddy: Buddy, *, batch: int, high: int) -> None:
        self.buddy = buddy
        self.batch = batch
        self.high = max(high, batch << 2)
        #: kswapd or direct reclaim is running: what it frees mustn't pile up here (ZONE_RECLAIM_ACTIVE)
        self.reclaim_active = False
        self.count = 0
        self.free_factor = 0
        self._lists = [_List() for _ in range(_LISTS)]

    @staticmethod
    def allows(order: int) -> bool:
        """Whether blocks of this order go through the lists (pcp_allowed_order)."""
        return order <= COSTLY_ORDER or order == PAGEBLOCK_ORDER

    @staticmethod
    def _index(order: int, migratetype: int) -> int:
        return _HUGE if order > COSTLY_ORDER else _TYPES * order + migratetype

    @staticmethod
    def _order(index: int) -> int:
        return PAGEBLOCK_ORDER if index == _HUGE else index // _TYPES

    def spans(self) -> list[tuple[int, int]]:
        """Return the frames on the lists as (pfn, count), in no order."""
        return [
            (self.buddy.base + (low << self._order(index)), n << self._order(index))
            for index, blocks in enumerate(self._lists)
            for low, n in map(_span, blocks.runs)
        ]

    # ---- allocating

    def available(self, order: int, migratetype: int) -> int:
        """Blocks that can be had without a refill."""
        return self._lists[self._index(order, migratetype)].count

    def refill(self, order: int, migratetype: int, batches: int = 1) -> bool:
        """Fetch batches from the buddy for an empty list (rmqueue_bulk); False when the buddy had nothing.

        A batch is scaled down for higher orders, to 2 blocks at least.
        """
        blocks = self._lists[self._index(order, migratetype)]
        left = batches * (max(self.batch >> order, 2) if self.batch > 1 else self.batch)
        while left:
            frame, n = self.buddy.take_for_pcp(order, migratetype, left)
            if not n:
                break
            blocks.push_cold(frame >> order, n)
            self.count += n << order
            left -= n
        return blocks.count > 0

    def alloc(self, order: int, migratetype: int, most: int = 1) -> tuple[int, int, int]:
        """Take up to `most` blocks in a row from the hot end of a list that has some.

        Returns (pfn, blocks, step): block k of them starts at pfn + step * k * 2^order.
        """
        blocks = self._lists[self._index(order, migratetype)]
        start, n, step = blocks.pop_hot(most)
        self.free_factor >>= min(n, 64)
        self.count -= n << order
        low, _ = _span((start, n, step))
        self.buddy.mark(low << order, n, order, order + 1)
        return self.buddy.base + (start << order), n, step

    # ---- freeing

    def free(self, pfn: int, order: int, count: int = 1) -> None:
        """Take back count allocated blocks of an order that start at pfn and lie in a row, freed in ascending order.

        Raises AllocatorError, and changes nothing, unless they are allocated with that order.
        """
        frame = pfn - self.buddy.base
        self.buddy.check_blocks(frame, count, order)
        if not self.buddy.one_migratetype(frame, count << order):
            # pageblocks of different types: each to its own list
            while count:
                part = min(count, ((frame | ((1 << PAGEBLOCK_ORDER) - 1)) + 1 - frame) >> order)
                self.free(self.buddy.base + frame, order, part)
                frame += part << order
                count -= part
            return
        index = self._index(order, self.buddy.migratetype(frame))
        blocks = self._lists[index]
        high = min(self.batch << 2, self.high) if self.reclaim_active else self.high  # nr_pcp_high()
        while count:
            # free_unref_page_commit(): one more, and at `high` a batch leaves
            part = min(count, max(-((self.count - high) >> order), 1))
            self.buddy.mark(frame, part, order, 0x80 | (order + 1))
            blocks.push_hot(frame >> order, part)
            self.count += part << order
            frame += part << order
            count -= part
            if self.count >= high:
                self._free_bulk(self._nr_free(high), index)

    def _nr_free(self, high: int) -> int:
        # nr_pcp_free(): the batch, doubled for every time in a row, kept between batch and high - batch
        if high < self.batch:
            return 1
        most = high - self.batch
        batch = self.batch << self.free_factor
        if batch < most:
            self.free_factor += 1
        return max(self.batch, min(batch, most))

    def _free_bulk(self, count: int, index: int) -> None:
        # free_pcppages_bulk(): from the list that overflowed on, round robin, each list's cold end first
        count = min(count, self.count)
        while count > 0:
            blocks = self._lists[index]
            order = self._order(index)
            while blocks.count and count > 0:
                run = blocks.pop_cold(max(-(-count >> order), 1))
                self._to_buddy(run, order)
                count -= run[1] << order
                self.count -= run[1] << order
            index = (index + 1) % _LISTS

    def _to_buddy(self, run: Run, order: int) -> None:
        low, n = _span(run)
        frame = low << order
        self.buddy.mark(frame, n, order, 0)
        self.buddy.free_run(frame, n << order, descending=run[2] < 0)

    def drain(self) -> None:
        """Give everything back to the buddy (drain_pages)."""
        self._free_bulk(self.count, 0)
