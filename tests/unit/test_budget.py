"""The budget: who is asked, when, and in which order."""

import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from emu.errors import BadValue
from emu.host.budget import DEFAULT_ORDER, THREAD_ORDER, Budget, GuestView, Limits, Request, parse_order

MIB = 1 << 20
ALL = frozenset(Request)
LIMITS = Limits(800 * MIB, 900 * MIB, 1024 * MIB)


def views(*mib, can=ALL):
    return [GuestView(f"g{i}", size * MIB, can) for i, size in enumerate(mib)]


def kinds(asks):
    return [ask.request for ask in asks]


def test_below_low_nobody_is_asked():
    budget = Budget(LIMITS)
    assert budget.decide(0.0, views(300, 300, 200)) == []
    assert budget.decide(10.0, views(800)) == []


def test_pressure_that_comes_and_goes_meets_all_guests_in_turn():
    budget = Budget(LIMITS, step=16 * MIB, period=1.0)
    asked = {}
    for tick in range(40):
        for ask in budget.decide(tick * 0.05, views(210, 190, 190, 211 if tick % 3 else 180)):
            asked[ask.guest] = asked.get(ask.guest, 0) + 1
            budget.answered(ask, 0)
    assert sorted(asked) == ["g0", "g1", "g2", "g3"]
    assert all(count <= 3 for count in asked.values())


def test_a_line_is_over_a_64th_below_its_level():
    budget = Budget(LIMITS, oldest=64.0, period=1.0)
    (ask,) = budget.decide(0.0, views(801))
    budget.answered(ask, 0)
    assert budget.decide(2.0, views(799)) == []  # no longer above, but not over
    (ask,) = budget.decide(3.0, views(801))
    assert ask.age == 32.0
    budget.answered(ask, 0)
    assert budget.decide(5.0, views(780)) == []
    (ask,) = budget.decide(6.0, views(801))
    assert ask.age == 64.0


def test_the_epoch_moves_forward_while_guests_have_less_than_they_were_asked_for():
    budget = Budget(LIMITS, oldest=64.0, youngest=1.0, period=1.0)
    ages = []
    now = 0.0
    for _ in range(100):
        now += 0.25
        for ask in budget.decide(now, views(850)):
            assert ask.request is Request.EPOCH
            ages.append(ask.age)
            budget.answered(ask, 0)
    assert ages[:7] == [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    assert set(ages[7:]) == {1.0}
    # and back when it is over
    assert budget.decide(now + 1, views(700)) == []
    (again,) = budget.decide(now + 2, views(850))
    assert again.age == 64.0


def test_steps_are_bounded_and_one_a_period():
    budget = Budget(LIMITS, step=16 * MIB, period=1.0)
    sizes = []
    for tick in range(40):
        for ask in budget.decide(tick * 0.05, views(250, 250, 250, 100)):
            sizes.append(ask.size)
            budget.answered(ask, ask.size)
    assert all(size <= 16 * MIB for size in sizes)
    assert len(sizes) == 8  # four guests, two periods


@pytest.mark.parametrize("spread", [True, False])
def test_turns_are_spread_or_not(spread):
    budget = Budget(LIMITS, spread=spread, period=1.0)
    at = {}
    for tick in range(20):
        now = tick * 0.05
        for ask in budget.decide(now, views(220, 220, 220, 220)):
            at.setdefault(ask.guest, now)
    assert len(at) == 4
    times = sorted(at.values())
    assert times == [pytest.approx(x, abs=0.06) for x in ([0, 0.25, 0.5, 0.75] if spread else [0, 0, 0, 0])]


def test_no_purge_before_the_epoch_was_tried_and_no_steal_before_the_purges_deadline():
    budget = Budget(LIMITS, deadline=2.0, period=0.5, spread=False)
    first, now = {}, 0.0
    answered_epoch = None
    while now < 20:
        now += 0.05
        for ask in budget.decide(now, views(340, 340, 340)):  # at max from the start
            first.setdefault(ask.request, now)
            if ask.request is Request.EPOCH and now > 1.0:  # guests that take their time
                budget.answered(ask, 0)
                answered_epoch = answered_epoch or now
    assert first[Request.EPOCH] < first[Request.PURGE] < first[Request.SWAP]
    # the purge waited until each had answered the epoch, or its deadline was over; the steal until the purge's was
    assert first[Request.PURGE] >= min(answered_epoch, first[Request.EPOCH] + 2.0)
    assert first[Request.SWAP] >= first[Request.PURGE] + 2.0


def test_a_purge_that_is_answered_is_not_waited_for():
    budget = Budget(LIMITS, deadline=50.0, spread=True)
    order, now = [], 0.0
    for _ in range(100):
        now += 0.05
        for ask in budget.decide(now, views(500, 520)):
            order.append((ask.request, ask.guest))
            budget.answered(ask, 0)
    first_swap = next(i for i, (request, _) in enumerate(order) if request is Request.SWAP)
    assert [g for r, g in order[:first_swap] if r is Request.PURGE] == ["g1", "g0"]  # the largest first, one by one
    assert now < 50


def test_the_threads_order_has_purge_and_swap_on_one_level():
    budget = Budget(LIMITS, THREAD_ORDER, spread=False)
    asks = budget.decide(0.0, views(480, 480))
    assert set(kinds(asks)) == {Request.EPOCH}
    for ask in asks:
        budget.answered(ask, 0)
    assert set(kinds(budget.decide(0.1, views(480, 480)))) >= {Request.PURGE, Request.SWAP}


def test_guests_are_asked_for_what_they_can():
    budget = Budget(LIMITS)
    only_swap = views(600, 500, can=frozenset({Request.SWAP}))
    assert set(kinds(budget.decide(0.0, only_swap))) == {Request.SWAP}
    nothing = views(600, 500, can=frozenset())
    assert Budget(LIMITS).decide(0.0, nothing) == []


def test_swap_takes_the_largest_first_down_to_high():
    budget = Budget(LIMITS, step=4096 * MIB)
    asks = budget.decide(0.0, views(100, 500, 420, can=frozenset({Request.SWAP})))
    assert [(ask.guest, ask.size) for ask in asks] == [("g1", 120 * MIB)]
    assert budget.decide(0.1, views(100, 500, 420, can=frozenset({Request.SWAP}))) == []  # it is under way


@pytest.mark.parametrize(("level", "rests"), [("low", 787.5), ("high", 787.5), ("max", 900)])
def test_swap_goes_on_until_its_line_is_over(level, rests):
    budget = Budget(LIMITS, f"swap@{level}", step=4096 * MIB)
    (ask,) = budget.decide(0.0, views(1020))
    assert ask.size == (1020 - rests) * MIB


def test_real_pressure_drives_it_too():
    budget = Budget(LIMITS, stall_low=5.0, stall_high=20.0)
    assert budget.decide(0.0, views(100)) == []
    (ask,) = budget.decide(1.0, views(100), stall=6.0)
    budget.answered(ask, 0)
    assert Request.PURGE in kinds(budget.decide(2.0, views(100), stall=30.0))


def test_a_dead_guest_is_forgotten_and_a_late_answer_counts_only():
    budget = Budget(LIMITS, deadline=1.0, period=1.0)
    (ask,) = budget.decide(0.0, views(850))
    budget.decide(2.0, views(850))
    assert budget.late[Request.EPOCH] == 1
    budget.answered(ask, 5)
    budget.forget("g0")
    budget.answered(ask, 7)
    assert budget.freed[Request.EPOCH] == 12


def test_orders_and_limits_that_cant_be():
    for text in ("", "epoch", "epoch@top", "swap@high>swap@max", "purge@max > epoch@low", "x@low"):
        with pytest.raises(BadValue):
            parse_order(text)
    assert [line.level for line in parse_order(DEFAULT_ORDER)] == ["low", "low", "high", "max"]
    for low, high, most in ((0, 1, 1), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(BadValue):
            Limits(low, high, most)
    assert Limits.of("1GiB") == Limits((1 << 30) * 8 // 10, (1 << 30) * 9 // 10, 1 << 30)
    with pytest.raises(BadValue):
        Budget(LIMITS, step=1)
    with pytest.raises(BadValue):
        Budget(LIMITS, oldest=1.0, youngest=2.0)


@given(st.data())
def test_whatever_comes_requests_are_sane(data):
    """Never two of a kind under way with a guest, never a size that can't be, in order always."""
    step = 32 * MIB
    budget = Budget(LIMITS, step=step, deadline=1.0, period=0.5, spread=data.draw(st.booleans()))
    pending, now = {}, 0.0
    tried_epoch = purged = False
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.floats(0.01, 1.0))
        pending = {key: deadline for key, deadline in pending.items() if deadline > now}
        for ask in budget.decide(now, views(*data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=4)))):
            assert (ask.guest, ask.request) not in pending
            assert ask.deadline > now
            if ask.request is not Request.PURGE:
                assert 0 < ask.size <= step
            tried_epoch |= ask.request is Request.EPOCH
            assert tried_epoch
            purged |= ask.request is Request.PURGE
            assert purged or ask.request is not Request.SWAP
            pending[ask.guest, ask.request] = ask.deadline
            if data.draw(st.booleans()):
                budget.answered(ask, data.draw(st.integers(0, step)))
                del pending[ask.guest, ask.request]


def test_a_decision_for_64_guests_is_no_scan_of_anything():
    """It does a few hundred steps; the bench measures it."""
    budget = Budget(LIMITS)
    guests = views(*([20] * 64))
    started = time.perf_counter()
    for tick in range(20):
        budget.decide(tick * 0.05, guests)
    assert time.perf_counter() - started < 5


def test_many_slow_guests_dont_keep_swap_away():
    """Purges one after another take so long that the first is over for long when the last is: each has had its turn."""
    budget = Budget(LIMITS, deadline=2.0, spread=True)
    seen, now = [], 0.0
    while now < 120:
        now += 0.05
        seen += kinds(budget.decide(now, views(*([90] * 12))))
    assert Request.SWAP in seen


def test_the_answer_to_an_old_request_isnt_one_to_the_new():
    budget = Budget(LIMITS, deadline=1.0, period=1.0)
    (old,) = budget.decide(0.0, views(850))
    (new,) = budget.decide(2.0, views(850))
    budget.answered(old, 0)
    assert budget.decide(2.1, views(850)) == []  # the new one is still under way
    age = new.age
    budget.answered(new, new.size)
    (third,) = budget.decide(5.0, views(850))
    assert third.age == age


def stealers(*classes):
    return [GuestView(f"g{i}", 300 * MIB, ALL, tuple(n * MIB for n in mine)) for i, mine in enumerate(classes)]


def sizes(asks):
    return {ask.guest: ask.size // MIB for ask in asks if ask.request is Request.STEAL}


def test_what_is_oldest_of_all_guests_is_stolen():
    """Unused memory first, whoever's; then class by class; of the last one each gives its share."""
    budget = Budget(LIMITS, step=512 * MIB)
    # 900 of 800 - a 64th: 112.5 over
    asks = budget.decide(0.0, stealers((0, 60, 5, 90), (30, 0, 10, 60), (0, 0, 0, 0)))
    assert sizes(asks) == {"g0": 60 + 5 + 4, "g1": 30 + 10 + 3}
    assert set(kinds(asks)) == {Request.STEAL}  # nobody else is asked for anything while that goes on
    assert sum(sizes(asks).values()) == 112
    assert sizes(budget.decide(0.1, stealers((0, 60, 5, 90), (30, 0, 10, 60), (0, 0, 0, 0)))) == {}  # under way


def test_a_guest_is_stolen_from_by_steps_and_again_while_it_gives():
    budget = Budget(LIMITS, step=32 * MIB, period=1.0)
    now, stolen, first_epoch, seen = 0.0, 0, None, []
    while now < 3:
        now += 0.05
        over = 1000 * MIB - stolen
        view = GuestView("g", over, ALL, (0, max(100 * MIB - stolen, 0)))
        for ask in budget.decide(now, [view]):
            if ask.request is Request.STEAL:
                assert first_epoch is None
                assert ask.size <= 32 * MIB
                gives = min(ask.size, 100 * MIB - stolen)
                stolen += gives
                budget.answered(ask, gives)
            elif ask.request is Request.EPOCH:
                first_epoch = first_epoch or now
                seen.append(stolen)
    assert stolen == 100 * MIB
    assert seen[0] == 100 * MIB  # it was asked for cache only when nothing could be taken any more


def test_a_liar_that_says_it_gave_holds_nobody_up():
    """Nor does a guest that reads again what was taken: what counts is what all hold."""
    budget = Budget(LIMITS, step=64 * MIB, period=0.5, deadline=1.0)
    now, first = 0.0, {}
    while now < 20:
        now += 0.05
        guests = [GuestView("liar", 100 * MIB, ALL, (0, 90 * MIB)), GuestView("other", 924 * MIB, ALL)]
        for ask in budget.decide(now, guests):
            first.setdefault(ask.request, now)
            budget.answered(ask, ask.size if ask.request is Request.STEAL else 0)
    assert first[Request.STEAL] < first[Request.EPOCH] <= 1.2
    assert set(first) == set(Request)


def test_a_guest_that_doesnt_answer_a_steal_holds_nobody_up():
    budget = Budget(LIMITS, step=64 * MIB, period=0.5, deadline=1.0)
    now, first = 0.0, {}
    while now < 10:
        now += 0.05
        guests = [GuestView("hung", 100 * MIB, ALL, (0, 90 * MIB)), GuestView("other", 924 * MIB, ALL)]
        for ask in budget.decide(now, guests):
            first.setdefault(ask.request, now)
            if ask.guest != "hung":
                budget.answered(ask, 0)
    assert first[Request.EPOCH] <= 1.2


def test_a_stall_below_the_limits_is_met_by_stealing_and_then_by_the_rest():
    budget = Budget(LIMITS, step=16 * MIB, period=0.5, deadline=1.0, stall_low=10.0)
    view = GuestView("g", 750 * MIB, ALL, (0, 100 * MIB))
    (ask,) = budget.decide(0.0, [view], stall=50.0)
    assert (ask.request, ask.size) == (Request.STEAL, 16 * MIB)
    budget.answered(ask, ask.size)
    seen = {a.request for tick in range(1, 60) for a in budget.decide(tick * 0.05, [view], stall=50.0)}
    assert Request.EPOCH in seen


def test_who_gives_less_than_it_said_is_believed_no_longer():
    """One that lies about what could be stolen holds nobody up."""
    budget = Budget(LIMITS, step=64 * MIB, period=0.5, deadline=1.0)
    now, seen = 0.0, set()
    while now < 20:
        now += 0.05
        for ask in budget.decide(now, [GuestView("liar", 1024 * MIB, ALL, (1 << 40,))]):
            seen.add(ask.request)
            budget.answered(ask, 0)
    assert seen == set(Request)
    honest = GuestView("honest", 100 * MIB, ALL, (0, 50 * MIB))
    asks = budget.decide(now + 30, [GuestView("liar", 1024 * MIB, ALL, (1 << 40,)), honest])
    assert sizes(asks)["honest"] == 50
