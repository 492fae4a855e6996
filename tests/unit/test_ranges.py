"""emu.ranges: batches of frame ranges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import BadValue, RangeError
from emu.ranges import Ranges


def test_pairs_are_keyed_by_their_frame_and_triples_by_their_key():
    """The key is what fill seeds content by."""
    assert list(Ranges.of([(5, 2), (9, 1, 77)])) == [(5, 2, 5), (9, 1, 77)]


@pytest.mark.parametrize("bad", [[(1,)], [(1, -1)], [(-1, 1)], [("a", 1)], [3], [(1.5, 1)]])
def test_what_is_not_a_range_is_refused(bad):
    """Negative numbers never reach C as huge ones."""
    with pytest.raises(BadValue):
        Ranges.of(bad)


@given(st.lists(st.integers(0, 30), unique=True), st.integers(0, 1000))
def test_single_frames_join_into_runs_without_changing_order_or_keys(frames, key):
    """of_frames() is a run-length code of the sequence."""
    expanded = [(gfn + i, k + i) for gfn, count, k in Ranges.of_frames(frames, key) for i in range(count)]
    assert expanded == [(gfn, key + i) for i, gfn in enumerate(frames)]


def test_ranges_outside_or_overlapping_are_refused():
    """With the numbers in the message."""
    with pytest.raises(RangeError, match=r"\[8, 11\).*has 10") as caught:
        Ranges.of([(0, 10), (8, 3)]).check(10, disjoint=False)
    assert (caught.value.gfn, caught.value.count, caught.value.frames) == (8, 3, 10)
    with pytest.raises(RangeError, match="frame 4 is named twice"):
        Ranges.of([(4, 2), (0, 5)]).check(10, disjoint=True)
    Ranges.of([(4, 2), (0, 4), (4, 0)]).check(10, disjoint=True)


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40), st.integers(0, 100)), max_size=8), st.integers(1, 30)
)
def test_chunks_hold_the_same_frames_in_order_and_no_more_than_asked(triples, most):
    """Cutting a batch changes nothing but the number of calls."""
    whole = Ranges.of(triples)
    parts = list(whole.chunks(most))
    expand = lambda ranges: [(g + i, k + i) for g, n, k in ranges for i in range(n)]  # noqa: E731
    assert [pair for part in parts for pair in expand(part)] == expand(whole)
    assert all(part.frames <= most for part in parts)
