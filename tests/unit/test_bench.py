"""emu.bench: medians and their intervals, rounds by turns, and what counts as a change."""

import contextlib
import math
import random

import pytest

from emu.bench.compare import compare, machines_differ
from emu.bench.row import Row, Sides
from emu.bench.rows import ROWS
from emu.bench.runner import SCHEMA, RowResult, run_row
from emu.bench.spread import estimate
from emu.errors import BadValue, EmuError


def test_the_interval_of_ten_samples_leaves_one_out_on_each_side():
    """1 - 2 * (1 + 10) / 1024 = 97.9 %."""
    result = estimate([5, 1, 9, 3, 7, 2, 8, 4, 6, 100])
    assert (result.median, result.low, result.high) == (5.5, 2, 9)
    assert math.isclose(result.confidence, 1 - 22 / 1024)
    assert math.isclose(result.spread, 3.5 / 5.5)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_the_interval_is_the_narrowest_that_is_sure_enough(n, k):
    """k by the tables of the sign test at 5 %; with five samples and less it is all there is."""
    result = estimate(range(n))
    assert (result.low, result.high) == (k - 1, n - k)
    assert result.confidence >= 0.95 or n <= 5


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    """Of a skewed distribution, whose median is known."""
    chance = random.Random(1)
    held = 0
    for _ in range(4000):
        e = estimate([chance.expovariate(1) for _ in range(10)])
        held += e.low <= math.log(2) <= e.high
    assert abs(held / 4000 - e.confidence) < 0.01


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        estimate([])


class NoStage:
    """What run_row() needs of one."""

    @contextlib.contextmanager
    def placed(self, *, second_thread, both):
        yield


def row(name="a", *, target=None, better="lower", reference=True, error=None):
    calls = []

    @contextlib.contextmanager
    def open_(stage):
        if error:
            raise EmuError(error)

        def ours():
            calls.append("o")
            return 2.0

        def ref():
            calls.append("r")
            return 4.0

        yield Sides(ours, ref if reference else None)
        calls.append("closed")

    return Row(name, "what", "ns", better, open_, target=target), calls


def test_rounds_go_by_turns_after_a_warm_up_that_does_not_count():
    """Ours first in one, the reference first in the next."""
    it, calls = row(target=0.5)
    result = run_row(it, NoStage(), 6)
    assert "".join(calls[:-1]) == "or" + "roor" * 3
    assert calls[-1] == "closed"
    assert result.samples == [(2.0, 4.0)] * 6
    assert (result.ratio.median, result.difference.median, result.met) == (0.5, -2.0, True)


@pytest.mark.parametrize(
    ("target", "better", "reference", "met"),
    [
        (0.49, "lower", True, False),
        (0.6, "higher", True, False),
        (0.5, "higher", True, True),
        (2.0, "lower", False, True),
        (3.0, "higher", False, False),
        (None, "lower", True, None),
    ],
)
def test_a_target_is_about_the_ratio_or_about_ours(target, better, reference, met):
    it, _ = row(target=target, better=better, reference=reference)
    assert run_row(it, NoStage(), 6).met is met
    assert run_row(it, NoStage(), 5).met is None


def test_what_can_not_be_measured_says_why():
    it, _ = row(target=1.0, error="no second core")
    result = run_row(it, NoStage(), 2)
    assert result.met is None
    assert result.as_json()["error"] == "no second core"


def bench(**rows):
    results = []
    for name, (better, samples) in rows.items():
        it, _ = row(name, better=better)
        results.append(RowResult(it, samples).as_json())
    return {"schema": SCHEMA, "environment": {"kernel": "1", "cpus": 2}, "rows": results}


def around(ratio, spread=0.01):
    return [(100 * ratio * (1 + spread * (i - 4.5) / 4.5), 100.0) for i in range(10)]


def test_a_change_is_one_that_neither_interval_explains():
    """By the row's own sense of better; new and gone rows are named."""
    old = bench(
        a=("lower", around(1.0)), b=("lower", around(1.0)), c=("higher", around(1.0)), d=("lower", around(1.0, 0.3)),
        e=("lower", around(1.0)), only_old=("lower", around(1.0)),
    )  # fmt: skip
    new = bench(
        a=("lower", around(1.005)), b=("lower", around(1.1)), c=("higher", around(1.1)), d=("lower", around(1.1)),
        e=("lower", around(0.9)), only_new=("lower", around(1.0)),
    )  # fmt: skip
    assert {change.verdict for change in compare(old, old)} == {"same"}
    verdicts = {change.name: change.verdict for change in compare(old, new)}
    assert verdicts == {
        "a": "same", "b": "worse", "c": "better", "d": "same", "e": "better", "only_new": "new", "only_old": "gone",
    }  # fmt: skip
    assert machines_differ(old, new | {"environment": {"kernel": "2", "cpus": 2}}) == ["kernel: 1 then, 2 now"]


def test_what_is_not_a_bench_is_refused():
    with pytest.raises(BadValue, match="schema"):
        compare({"schema": "emu.run/1", "rows": []}, bench())


def test_rows_have_names_of_their_own_and_say_what_they_are():
    """And those with a target are all that the bench was asked for."""
    assert len({it.name for it in ROWS}) == len(ROWS)
    assert all(it.what and it.unit and it.better in ("lower", "higher") for it in ROWS)
    targets = {it.name: it.target for it in ROWS if it.target is not None}
    assert targets == {
        "fault-write-inline": 1.10,
        "fault-write-thread": 1.10,
        "fault-scaling": 0.95,
        "discard-large": 1.05,
        "discard-large+thread": 1.05,
        "discard-scattered": 0.5,
        "discard-scattered+thread": 0.5,
        "install-512": 1.1,
        "set-aside": 150,
        "set-aside-huge": 5.0,
        "set-aside-huge+thread": 20.0,
        "cmm2-batched": 4.0,
        "cmm2-transition": 20.0,
        "cmm2-range": 4.0,
        "cmm2-python": 2.0,
        "cmm2-steal": 1.0,
        "cmm2-page_fault1": 0.01,
        "cmm2-grep": 0.02,
        "swap-out-25": 1 / 1.5,
        "swap-out-50": 1 / 1.5,
        "swap-out-75": 1 / 1.5,
        "swap-in-random": 1.2,
        "swap-in-sequential": 1 / 1.8,
        "budget-64": 5.0,
        "touch-write": 0.9,
        "touch-write-ahead": 0.9,
        "touch-read": 0.9,
        "report-pass": 1.5,
        "report-pass+thread": 1.5,
        "cache-read-1MiB": 0.5,
        "cache-read-4KiB": 5.0,
        "cache-reclaim": 2.0,
        "cache-grep": 0.5,
        "buddy-pair": 400,
        "buddy-pair-held": 400,
        "buddy-batch": 400,
        "buddy-bulk": 200,
        "snapshot-64GiB": 2.0,
    }
