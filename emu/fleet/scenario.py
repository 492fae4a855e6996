"""A fleet as TOML: the budget, and the guests.

[fleet]
max = "3GiB"                                   # footprint of all guests; low and high: 80 and 90 % of it
order = "steal@low > epoch@low > purge@high > swap@max"
speed = "real"                                 # guest seconds a second
store = "/var/tmp"                             # where swapped pages go when the pool is full

    [[guest]]
    name = "vm"                    # with count, -1, -2 ... are added
    count = 4
    ram = "2GiB"
    mechanism = "reporting"
    workload = "memhog"
    args = { size = "1536MiB", rounds = 1, hold = "0s" }
    start = "0s"                   # after the fleet's start, or "in turn": when the one before is done
    stagger = "0s"                 # added for each further one of the count
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from emu.clock import make_clock
from emu.errors import BadValue, HostError
from emu.host.budget import DEFAULT_ORDER, Limits, parse_order
from emu.host.cgroup import memory_limits
from emu.host.discard import parse_return
from emu.host.mounts import IN_MEMORY, filesystem
from emu.host.pressure import stall_percent
from emu.mechanisms import make_mechanism
from emu.mechanisms.cmm2 import Cmm2Mechanism
from emu.mechanisms.swap import SwapMechanism
from emu.units import parse_duration, parse_ram_size, parse_size
from emu.workloads.registry import make_workload

__all__ = ["Fleet", "Guest", "read_fleet"]

MOST_GUESTS = 64


def _size(value: Any) -> int:
    return parse_size(value)


def _seconds(value: Any) -> float:
    return parse_duration(value)


Size = Annotated[int, BeforeValidator(_size)]
Seconds = Annotated[float, BeforeValidator(_seconds)]


class _Table(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class Guest(_Table):
    """One guest. start: seconds after the fleet's start; None: when the guest before it is done."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]
    ram: Annotated[int, BeforeValidator(parse_ram_size)]
    mechanism: str = "reporting"
    on_return: str = "now"
    workload: str = "memhog"
    args: dict[str, Any] = {}
    start: float | None = 0.0
    seed: int = 1
    disk: str | None = None
    service: Literal["auto", "inline", "thread"] = "auto"
    cpus: Annotated[int, Field(ge=1, le=1024)] = 1


class Fleet(_Table):
    """A fleet: limits are bytes, times are seconds; deadline, silence and period of the wall's clock.

    silence: a guest's process that says nothing for so long is killed. wait: how long a charge at the gate waits.
    spread: the guests' turns lie evenly in time. psi: a file such as /proc/pressure/memory whose some avg10 drives the
    budget, too. cgroup: max is lowered to what the limits of this process's cgroups leave room for.
    """

    max: Size
    low: Size | None = None
    high: Size | None = None
    order: str = DEFAULT_ORDER
    spread: StrictBool = True
    step: Size = 64 << 20
    period: Seconds = 0.5
    deadline: Seconds = 2.0
    oldest: Seconds = 60.0
    speed: str | float = "real"
    silence: Annotated[Seconds, Field(gt=0)] = 10.0
    wait: Seconds = 60.0
    store: str | None = None
    store_memory: Size | None = None
    psi: str | None = None
    psi_low: Annotated[float, Field(ge=0, le=100)] | None = None
    psi_high: Annotated[float, Field(ge=0, le=100)] | None = None
    cgroup: StrictBool = False
    timeout: Annotated[Seconds, Field(gt=0)] = 600.0
    guests: tuple[Guest, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a result should say of the settings."""
        notes = []
        if "swap" in self.order and self.store is None and self.store_memory is None:
            own = [guest.name for guest in self.guests if not _has_store(guest)]
            if own:
                notes.append(f"nothing can be swapped of {', '.join(own)}: no store or store_memory is given")
        steals = [guest.name for guest in self.guests if guest.mechanism.startswith("cmm2")]
        if steals and "steal" not in self.order:
            notes.append(f"nothing is stolen of {', '.join(steals)} before it is swapped: the order has no steal")
        return notes

    @property
    def limits(self) -> Limits:
        """The budget's limits."""
        return Limits.of(self.max, self.low, self.high)


def _has_store(guest: Guest) -> bool:
    mechanism = make_mechanism(guest.mechanism)
    if isinstance(mechanism, Cmm2Mechanism):
        return mechanism.memory is not None or mechanism.file is not None
    return isinstance(mechanism, SwapMechanism)


class _Group(_Table):
    # a [[guest]] table: one, or many alike
    name: str
    count: Annotated[int, Field(ge=1, le=MOST_GUESTS)] = 1
    start: Any = 0.0
    stagger: Seconds = 0.0


def _guests(tables: list[dict[str, Any]]) -> list[Guest]:
    guests: list[Guest] = []
    for number, table in enumerate(tables, 1):
        try:
            own = {key: table.pop(key) for key in ("name", "count", "start", "stagger") if key in table}
            group = _Group(**own)
            for i in range(group.count):
                start = None if group.start == "in turn" else parse_duration(group.start, "start") + i * group.stagger
                name = group.name if group.count == 1 else f"{group.name}-{i + 1}"
                guests.append(Guest(name=name, start=start, **table))
        except (ValidationError, BadValue) as error:
            says = _where(error, Guest, _Group) if isinstance(error, ValidationError) else str(error)
            raise BadValue(f"guest {own.get('name', number)!r}: {says}") from None
    return guests


def _where(error: ValidationError, *models: type[BaseModel]) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    says = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        keys = dict.fromkeys(key for model in models for key in model.model_fields if key != "guests")
        return f"{place!r} isn't known: {', '.join(keys)}"
    return f"{place} = {first['input']!r}: {says}" if place and first["type"] != "missing" else f"{place}: {says}"


def _read_toml(path: str | Path) -> dict[str, Any]:
    """Return what a TOML file holds. Raises BadValue."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise BadValue(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} isn't TOML: {error}") from None


def _check(fleet: Fleet) -> None:
    # what a guest's process would find out only when it starts
    if make_clock(fleet.speed).name == "step":
        raise BadValue("speed 'step' can't be had: guests share the wall's time")
    if fleet.wait > 3600:
        raise BadValue(f"wait {fleet.wait!r} s must be at most an hour")
    if fleet.store is not None and not (
        fleet.store and Path(fleet.store).is_dir()
    ):  # each guest makes a file of its own there
        raise BadValue(f"store {fleet.store!r} isn't a directory")
    if fleet.psi is None and (fleet.psi_low, fleet.psi_high) != (None, None):
        raise BadValue("psi_low and psi_high need psi, a file such as /proc/pressure/memory")
    if None not in (fleet.psi_low, fleet.psi_high) and fleet.psi_low > fleet.psi_high:  # type: ignore[operator]
        raise BadValue(f"psi_low {fleet.psi_low!r} is above psi_high {fleet.psi_high!r}")
    if fleet.psi is not None:
        if (fleet.psi_low, fleet.psi_high) == (None, None):
            raise BadValue("psi needs psi_low or psi_high: per cent of stall above which the budget acts")
        try:
            stall_percent(fleet.psi)
        except HostError as error:
            raise BadValue(str(error)) from None
    if fleet.cgroup:
        _check_cgroup(fleet)
    for guest in fleet.guests:
        try:
            _check_guest(guest)
        except BadValue as error:
            raise BadValue(f"guest {guest.name!r}: {error}") from None


def _check_guest(guest: Guest) -> None:
    mechanism = make_mechanism(guest.mechanism)
    if isinstance(mechanism, SwapMechanism) and mechanism.max is not None:
        raise BadValue("swap:max is for a guest alone; in a fleet the budget's max holds")
    parse_return(guest.on_return)
    if guest.disk is not None and not Path(guest.disk).exists():
        raise BadValue(f"disk {guest.disk!r} doesn't exist")
    make_workload(guest.workload, guest.args, guest.seed)


def _check_cgroup(fleet: Fleet) -> None:
    try:
        limits = memory_limits()
    except HostError as error:
        raise BadValue(f"cgroup: {error}") from None
    if not limits:
        raise BadValue(
            "cgroup: no memory limit is seen above this process (memory.max, memory.high, memory.limit_in_bytes)"
        )
    mechanisms = [make_mechanism(guest.mechanism) for guest in fleet.guests]
    stores = {fleet.store} | {one.file for one in mechanisms if isinstance(one, SwapMechanism)}
    for store in filter(None, stores):
        if Path(store).exists() and (kind := filesystem(store)) in IN_MEMORY:
            raise BadValue(f"store {store!r} is memory ({kind}), which the cgroup's limit counts: name one on a disk")


def read_fleet(
    source: str | Path | dict[str, Any], *, settings: dict[str, Any] | None = None, mechanism: str | None = None
) -> Fleet:
    """Read a fleet from a TOML file, or from what one would parse to.

    settings, mechanism: instead of the fleet's, and of every guest's. Raises BadValue with the place that is wrong.
    """
    raw = source if isinstance(source, dict) else _read_toml(source)
    name = "the fleet" if isinstance(source, dict) else str(source)
    if unknown := set(raw) - {"fleet", "guest"}:
        raise BadValue(f"{name}: {sorted(unknown)[0]!r} isn't known: [fleet] and [[guest]] are")
    tables = raw.get("guest", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadValue(f"{name}: it has no [[guest]]")
    table = raw.get("fleet", {})
    if not isinstance(table, dict):
        raise BadValue(f"{name}: fleet isn't a table: write [fleet]")
    more = {} if mechanism is None else {"mechanism": mechanism}
    try:
        guests = _guests([table | more for table in tables])
        fleet = Fleet(**(table | (settings or {}) | {"guests": tuple(guests)}))
    except ValidationError as error:
        raise BadValue(f"{name}: {_where(error, Fleet)}") from None
    except (BadValue, TypeError) as error:
        raise BadValue(f"{name}: {error}") from None
    if len(guests) > MOST_GUESTS:
        raise BadValue(f"{name}: {len(guests)} guests are more than {MOST_GUESTS}")
    if len({guest.name for guest in guests}) < len(guests):
        raise BadValue(f"{name}: two guests have one name")
    try:
        parse_order(fleet.order)
        _ = fleet.limits
        _check(fleet)
    except BadValue as error:
        raise BadValue(f"{name}: {error}") from None
    return fleet
