"""Frame ranges as the core takes them: (gfn, count, key) triples in one flat array.

The key seeds the content of a range's first frame in fill and verify; the frames after it count on. One array goes to
the core in one call, whatever the number of ranges.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

from emu.errors import BadValue, RangeError

__all__ = ["Ranges", "runs_of"]


def runs_of(frames: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (frame, count) of neighbours, in the order given."""
    for gfn, count, _ in Ranges.of_frames(frames):
        yield gfn, count


class Ranges:
    """A batch of frame ranges. `flat` holds gfn, count, key of each, one after another."""

    __slots__ = ("flat",)

    def __init__(self, flat: "array[int] | None" = None) -> None:
        self.flat: array[int] = array("Q") if flat is None else flat

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> "Ranges":
        """Build from (gfn, count) pairs or (gfn, count, key) triples; without a key, a frame's key is its gfn."""
        result = cls()
        append = result.flat.append
        for item in ranges:
            try:
                gfn, count, *key = item
                append(gfn)
                append(count)
                append(key[0] if key else gfn)
            except (TypeError, ValueError, OverflowError):
                raise BadValue(f"range {item!r} isn't (gfn, count) with two integers of 0 or more") from None
        return result

    @classmethod
    def of_frames(cls, gfns: Iterable[int], key: int = 0) -> "Ranges":
        """Build from single frames in order, joining neighbours; keys count up from `key` along the sequence."""
        result = cls()
        extend = result.flat.extend
        start = -1
        following = -1
        for gfn in gfns:
            if gfn != following:
                if start >= 0:
                    extend((start, following - start, key))
                    key += following - start
                start = gfn
            following = gfn + 1
        if start >= 0:
            extend((start, following - start, key))
        return result

    def add(self, gfn: int, count: int, key: int) -> None:
        """Append one range."""
        self.flat.extend((gfn, count, key))

    def __len__(self) -> int:
        return len(self.flat) // 3

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        flat = iter(self.flat)
        return zip(flat, flat, flat, strict=True)

    @property
    def frames(self) -> int:
        """Frames in all ranges together."""
        return sum(self.flat[1::3])

    def check(self, frames: int, *, disjoint: bool) -> None:
        """Raise RangeError if a range leaves [0, frames), or, with disjoint, if two of them share a frame."""
        for gfn, count, _ in self:
            if gfn + count > frames:
                raise RangeError(
                    f"frames [{gfn}, {gfn + count}) are outside the RAM, which has {frames}",
                    gfn=gfn,
                    count=count,
                    frames=frames,
                )
        if disjoint and len(self) > 1:
            end = 0
            for gfn, count in sorted(zip(self.flat[0::3], self.flat[1::3], strict=True)):
                if gfn < end and count:
                    raise RangeError(f"frame {gfn} is named twice in one call", gfn=gfn, count=count, frames=frames)
                end = max(end, gfn + count)

    def chunks(self, frames: int) -> Iterator["Ranges"]:
        """Cut into batches of at most `frames` each, in order: between two calls Python may handle a signal."""
        flat = self.flat
        if sum(flat[1::3]) <= frames:
            yield self
            return
        batch = Ranges()
        room = frames
        for gfn, count, key in self:
            done = 0
            while done < count:
                part = min(count - done, room)
                batch.add(gfn + done, part, key + done)
                done += part
                room -= part
                if not room:
                    yield batch
                    batch = Ranges()
                    room = frames
        if len(batch):
            yield batch
