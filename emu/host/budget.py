"""Budget: who is asked for memory, and when, so that all guests together stay within limits.

The lines of defence, and the footprint above which each is manned, are a setting:

    steal@low > epoch@low > purge@high > swap@max
                                        the default: voluntary return goes on all the time; above low what guests
                                        call unused or volatile is taken (CMM2), and of the others the epoch moves
                                        forward; above high guests are asked to drop all that they can, by a deadline;
                                        at max memory is taken without asking
    epoch@low > purge+swap@high         as the linux-mm thread on free page reporting has it (January 2020): the
                                        purge request is level with swapping, as a last resort

A line is over when the footprint is a 64th below its level: at the level itself one frame more or less would end it and
begin it again.

Below max a footprint can be above low or high; max itself is held by the charge gate (emu.gate), where guests wait. So
a fleet is at max when less than 1/64 of it is left.

A line comes into play only when the lines before it have been tried since the pressure began: every guest that could be
asked has answered, or its deadline has passed. So no purge before the epoch was tried, and nothing is swapped while a
purge may still help.

Stealing costs its guest nothing at the time, so it goes first, and the next line waits while it helps: as long as the
footprint of all falls by a step in each deadline. (What a guest answers is its own word, and one that reads again what
was taken is no help either.) All guests' stealable memory is one list: unused first, then by how long it has been idle,
and what is oldest goes, whoever's it is. Each guest's host side takes its own oldest; so it is told how much of what
goes is its own.

An epoch is a point in time: cache last used before it goes. It moves forward while guests have less to give than they
were asked for, by halving the age, and back to the oldest when the pressure is over. A guest is asked once a period for
at most a step. Spread, the guests' turns lie evenly in the period, and purges go one guest after another: their disks,
and the host, see one flush at a time. Not spread, all are asked at once.

Pure: time and footprints come in, requests go out. Real pressure can drive it as the limits do: a stall
(emu.host.pressure) above `stall_low` counts as being above low, and so on.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from emu.errors import BadValue
from emu.units import format_size, parse_size

__all__ = ["DEFAULT_ORDER", "THREAD_ORDER", "Ask", "Budget", "GuestView", "Limits", "Request", "parse_order"]


_CALM = 64


class Request(enum.StrEnum):
    """What a guest, or its host side, is asked for."""

    STEAL = "steal"
    EPOCH = "epoch"
    PURGE = "purge"
    SWAP = "swap"


class Level(enum.StrEnum):
    LOW = "low"
    HIGH = "high"
    MAX = "max"


DEFAULT_ORDER = "steal@low > epoch@low > purge@high > swap@max"
THREAD_ORDER = "epoch@low > purge+swap@high"


@dataclass(frozen=True, slots=True)
class Line:
    """Requests that are made together, above a level."""

    requests: tuple[Request, ...]
    level: Level


def parse_order(text: str) -> tuple[Line, ...]:
    """Read an order of lines of defence. Raises BadValue."""
    lines: list[Line] = []
    for part in text.replace(" ", "").split(">"):
        names, _, level = part.partition("@")
        try:
            lines.append(Line(tuple(Request(name) for name in names.split("+")), Level(level)))
        except ValueError:
            raise BadValue(
                f"line of defence {part!r} isn't REQUEST[+REQUEST]@LEVEL: requests are {', '.join(Request)}, levels "
                f"{', '.join(Level)}"
            ) from None
    asked = [request for line in lines for request in line.requests]
    if len(set(asked)) < len(asked):
        raise BadValue(f"order {text!r} names a request twice")
    levels = list(Level)
    if any(levels.index(a.level) > levels.index(b.level) for a, b in itertools.pairwise(lines)):
        raise BadValue(f"order {text!r} has a later line at a lower level than the one before it")
    return tuple(lines)


@dataclass(frozen=True, slots=True)
class Limits:
    """Footprints of all guests together, in bytes."""

    low: int
    high: int
    max: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= self.max:
            raise BadValue(
                f"limits low {format_size(self.low)}, high {format_size(self.high)}, max {format_size(self.max)} must "
                "ascend, and be above 0"
            )

    def within(self, most: int) -> "Limits":
        """Return these, or, where max is above `most` bytes, the same shares of that."""
        if most >= self.max:
            return self
        return Limits(low=max(self.low * most // self.max, 1), high=max(self.high * most // self.max, 1), max=most)

    @classmethod
    def of(cls, limit: int | str, low: int | str | None = None, high: int | str | None = None) -> "Limits":
        """Make limits from max, and 80 and 90 % of it where low and high aren't given."""
        most = parse_size(limit, "budget max")
        return cls(
            most * 8 // 10 if low is None else parse_size(low, "budget low"),
            most * 9 // 10 if high is None else parse_size(high, "budget high"),
            most,
        )


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest as the host sees it: its footprint in bytes, and what it can be asked for.

    stealable: bytes that could be stolen, by class: unused, then what is idle, the longest first.
    """

    name: str
    footprint: int
    can: frozenset[Request]
    stealable: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to one guest.

    Size: bytes, at most; age: of an epoch, seconds; deadline: when it is no longer waited for.
    """

    guest: str
    request: Request
    size: int
    age: float
    deadline: float


@dataclass(slots=True)
class _Guest:
    age: float
    turn: float = float("-inf")  # when it may be asked for an epoch step
    purged: float = float("-inf")  # when it was asked for a purge last
    #: what it has been asked for, and hasn't answered: request -> (deadline, size)
    pending: dict[Request, tuple[float, int]] = field(default_factory=dict)
    #: what has been tried with it since the pressure of that request's line began
    tried: set[Request] = field(default_factory=set)
    #: less could be stolen of it, the last time, than it had said
    short: bool = False


def _oldest(views: Sequence[GuestView], wanted: int) -> dict[str, int]:
    # how many of the oldest `wanted` bytes that could be stolen are whose
    sizes = dict.fromkeys((view.name for view in views), 0)
    for classes in itertools.zip_longest(*(view.stealable for view in views), fillvalue=0):
        if wanted <= 0:
            break
        here = [min(size, v.footprint - sizes[v.name]) for size, v in zip(classes, views, strict=True)]
        total = sum(here)
        for view, size in zip(views, here, strict=True):
            sizes[view.name] += size if total <= wanted else -(-size * wanted // total)
        wanted -= total
    return sizes


class Budget:
    """The policy. step: bytes a request; period, deadline: seconds; oldest, youngest: ages of an epoch, seconds.

    limits may be changed between two decisions. stall_low, stall_high: shares of time that tasks stall for memory, as
    PSI has them (0 to 100); None: not looked at.
    again: seconds after which a guest that was purged, and is still above, is asked once more; None: ten deadlines.
    """

    def __init__(
        self,
        limits: Limits,
        order: str = DEFAULT_ORDER,
        *,
        step: int = 64 << 20,
        period: float = 1.0,
        deadline: float = 2.0,
        spread: bool = True,
        oldest: float = 60.0,
        youngest: float = 1.0,
        stall_low: float | None = None,
        stall_high: float | None = None,
        again: float | None = None,
    ) -> None:
        if step < 4096 or not 0.01 <= period <= 3600 or not 0.01 <= deadline <= 3600:
            raise BadValue("a budget's step must be at least 4 KiB, its period and deadline from 0.01 to 3600 s")
        if not 0 < youngest <= oldest:
            raise BadValue(f"epoch ages youngest {youngest!r} s and oldest {oldest!r} s must ascend, and be above 0")
        self.limits = limits
        self.lines = parse_order(order)
        self.step = step
        self.period = period
        self.deadline = deadline
        self.spread = spread
        self.oldest = oldest
        self.youngest = youngest
        self._stall = {Level.LOW: stall_low, Level.HIGH: stall_high, Level.MAX: None}
        self._again = 10 * deadline if again is None else again
        self._guests: dict[str, _Guest] = {}
        #: requests made, answered, and given up, by request; bytes freed by them
        self.asked = dict.fromkeys(Request, 0)
        self.answers = dict.fromkeys(Request, 0)
        self.late = dict.fromkeys(Request, 0)
        self.freed = dict.fromkeys(Request, 0)
        self._began: dict[Request, float] = {}
        #: the least footprint of all since stealing began, by steps, and when it was reached
        self._least: tuple[int, float] | None = None

    def forget(self, name: str) -> None:
        """A guest is gone."""
        self._guests.pop(name, None)

    def answered(self, ask: Ask, freed: int) -> None:
        """A guest has done what it was asked for, or its host side; a late answer changes nothing but the counts."""
        self.answers[ask.request] += 1
        self.freed[ask.request] += freed
        guest = self._guests.get(ask.guest)
        if guest is None or guest.pending.get(ask.request, (None, 0))[0] != ask.deadline:
            return
        _, size = guest.pending.pop(ask.request)
        self._settled(guest, ask.request, freed, size)

    def _settled(self, guest: _Guest, request: Request, freed: int, size: int) -> None:
        if request is Request.STEAL:
            guest.short = freed < size // 2
            if not guest.short:  # there may be more: the next line waits for it
                guest.tried.discard(request)
                return
        guest.tried.add(request)
        if request is Request.EPOCH and freed < size // 2:
            guest.age = max(guest.age / 2, self.youngest)

    def decide(self, now: float, guests: Sequence[GuestView], stall: float = 0.0) -> list[Ask]:
        """Return what is to be asked for now (now: any clock's seconds). stall: see stall_low."""
        total = sum(guest.footprint for guest in guests)
        for view in guests:
            known = self._guests.setdefault(view.name, _Guest(self.oldest))
            for request, (deadline, size) in list(known.pending.items()):
                if now >= deadline:
                    del known.pending[request]
                    self.late[request] += 1
                    self._settled(known, request, 0, size)
        asks: list[Ask] = []
        for line in self.lines:
            if not self._above(line.level, total, stall):
                if not self._above(line.level, total + self._limit(line.level) // _CALM, stall):
                    self._calm(now, line)
                continue
            for request in line.requests:
                asks += self._ask(now, request, line.level, total, guests)
            if not all(self._tried(request, guests) for request in line.requests) and not (
                Request.STEAL in line.requests and self._in_vain(now, total)
            ):
                break  # the next line waits for this one
        return asks

    def _limit(self, level: Level) -> int:
        most = self.limits.max - self.limits.max // 64
        return {Level.LOW: self.limits.low, Level.HIGH: self.limits.high, Level.MAX: most}[level]

    def _above(self, level: Level, total: int, stall: float) -> bool:
        threshold = self._stall[level]
        return total > self._limit(level) or (threshold is not None and stall >= threshold)

    def _in_vain(self, now: float, total: int) -> bool:
        # whether stealing goes on, and all guests together hold as much as before
        if self._least is None or total <= self._least[0] - self.step:
            self._least = (total, now)
        return now - self._least[1] >= self.deadline

    def _calm(self, now: float, line: Line) -> None:
        if Request.STEAL in line.requests:
            self._least = None
        for request in line.requests:
            self._began.pop(request, None)
            for guest in self._guests.values():
                # a purge not long ago counts when the pressure is back: nothing much has grown again
                if request is not Request.PURGE or now - guest.purged >= self._again:
                    guest.tried.discard(request)
                if request is Request.EPOCH:
                    guest.age = self.oldest

    def _tried(self, request: Request, guests: Sequence[GuestView]) -> bool:
        able = [self._guests[view.name] for view in guests if request in view.can]
        return all(request in guest.tried for guest in able)

    def _ask(self, now: float, request: Request, level: Level, total: int, guests: Sequence[GuestView]) -> list[Ask]:
        able = [view for view in guests if request in view.can]
        if request is Request.EPOCH:
            return self._epochs(now, able, total)
        if request is Request.PURGE:
            return self._purges(now, able)
        # down to the level below, or to where this one is over, so that the next frame doesn't ask again
        over = self.limits.low - self.limits.low // _CALM
        target = {Level.LOW: over, Level.HIGH: min(self.limits.low, over), Level.MAX: self.limits.high}[level]
        if request is Request.STEAL:
            # where a stall calls, and no footprint, a step
            return self._steals(now, able, total - target if total > target else self.step)
        return self._swaps(now, able, total - target)

    def _make(self, now: float, name: str, request: Request, size: int, deadline: float) -> Ask:
        guest = self._guests[name]
        guest.pending[request] = (now + deadline, size)
        self.asked[request] += 1
        return Ask(name, request, size, guest.age, now + deadline)

    def _epochs(self, now: float, able: list[GuestView], total: int) -> list[Ask]:
        if Request.EPOCH not in self._began:
            self._began[Request.EPOCH] = now
            for i, view in enumerate(able):
                guest = self._guests[view.name]
                # turns that it still has stay: pressure that comes and goes would always meet the same one first
                if guest.turn <= now - self.period or not self.spread:
                    guest.turn = max(guest.turn, now + (self.period * i / len(able) if self.spread else 0.0))
        excess = max(total - self.limits.low, self.step)
        share = min(self.step, -(-excess // max(len(able), 1)))
        asks = []
        for view in able:
            guest = self._guests[view.name]
            if now < guest.turn or Request.EPOCH in guest.pending:
                continue
            guest.turn = max(guest.turn + self.period, now + self.period / 2)
            asks.append(self._make(now, view.name, Request.EPOCH, share, max(self.deadline, self.period)))
        return asks

    def _purges(self, now: float, able: list[GuestView]) -> list[Ask]:
        waiting = [view for view in able if Request.PURGE in self._guests[view.name].pending]
        left = [
            view
            for view in able
            if Request.PURGE not in self._guests[view.name].pending
            and now - self._guests[view.name].purged >= self._again
        ]
        if self.spread:
            # who hasn't been for longest, of those the largest
            left.sort(key=lambda view: (self._guests[view.name].purged, -view.footprint))
            del left[0 if waiting else 1 :]
        for view in left:
            self._guests[view.name].purged = now
        return [self._make(now, view.name, Request.PURGE, view.footprint, self.deadline) for view in left]

    def _steals(self, now: float, able: list[GuestView], wanted: int) -> list[Ask]:
        # Of each guest what it has of the oldest `wanted` bytes of all. What a guest says it has is its own word: never
        # more than its footprint counts, and who had less the last time comes after all others.
        asks = []
        pending = [self._guests[view.name].pending.get(Request.STEAL) for view in able]
        left = wanted - sum(under_way[1] for under_way in pending if under_way)
        for short in (False, True):
            those = [view for view in able if self._guests[view.name].short is short]
            for name, size in _oldest(those, left).items():
                left -= size
                if size >= 4096 and Request.STEAL not in self._guests[name].pending:
                    step = min(size, self.step)
                    asks.append(self._make(now, name, Request.STEAL, step, self.deadline))
        for view in able:
            guest = self._guests[view.name]
            if Request.STEAL not in guest.pending:  # it has nothing that is wanted
                guest.tried.add(Request.STEAL)
        return asks

    def _swaps(self, now: float, able: list[GuestView], wanted: int) -> list[Ask]:
        # the largest first, each by a step
        asks = []
        for view in sorted(able, key=lambda view: -view.footprint):
            under_way = self._guests[view.name].pending.get(Request.SWAP)
            size = under_way[1] if under_way else max(min(self.step, wanted, view.footprint), 0)
            if size > 0 and not under_way:
                asks.append(self._make(now, view.name, Request.SWAP, size, max(self.deadline, 10.0)))
            wanted -= size
            if wanted <= 0:
                break
        return asks
