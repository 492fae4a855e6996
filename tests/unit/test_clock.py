"""emu.clock and emu.timers."""

import time

import pytest

from emu.clock import ScaledClock, StepClock, make_clock
from emu.errors import BadValue
from emu.timers import Timers


def test_a_step_clock_moves_only_when_waited_for_and_never_back():
    """An hour costs nothing."""
    clock = StepClock()
    clock.sleep_until(3600)
    clock.sleep_until(10)
    assert clock.now() == 3600


def test_a_scaled_clock_runs_faster_than_the_wall():
    """Waiting for 2 s of guest time at x100 is over well within one of ours."""
    clock = ScaledClock(100)
    began = time.monotonic()
    clock.sleep_until(2)
    assert clock.now() >= 2
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("speed", "name"), [("real", "real"), ("step", "step"), (10, "x10"), ("2.5", "x2.5")])
def test_clocks_by_name(speed, name):
    """As --speed takes them."""
    assert make_clock(speed).name == name


@pytest.mark.parametrize("speed", [0, -1, "fast", "", float("inf"), float("nan")])
def test_an_impossible_speed_is_refused(speed):
    """With the value in the message."""
    with pytest.raises(BadValue):
        make_clock(speed)


def test_timers_run_in_order_of_time_and_then_of_queueing():
    """And what a timer queues for now runs in the same go."""
    timers, seen = Timers(), []
    timers.at(2, lambda: seen.append("c"))
    timers.at(1, lambda: (seen.append("a"), timers.at(2, lambda: seen.append("d"))))
    timers.at(1, lambda: seen.append("b"))
    assert timers.next_due == 1
    assert timers.run_due(0.5) == 0
    assert timers.run_due(2) == 4
    assert seen == ["a", "b", "c", "d"]
    assert timers.next_due is None
