"""Workloads by name, for who has a name and parameters rather than a command line."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from emu.errors import BadValue
from emu.workloads import Workload
from emu.workloads.build import Build
from emu.workloads.cache import Cache
from emu.workloads.fio import Fio
from emu.workloads.grep import Grep
from emu.workloads.load import Load
from emu.workloads.memhog import Memhog
from emu.workloads.page_fault import PageFault1, PageFault2

__all__ = ["WORKLOADS", "make_workload"]

WORKLOADS: dict[str, Callable[..., Workload]] = {
    cls.name: cls for cls in (Memhog, Load, Cache, Grep, Build, Fio, PageFault1, PageFault2)
}


def make_workload(name: str, parameters: Mapping[str, Any], seed: int = 1) -> Workload:
    """Return a workload from its name and parameters. Raises BadValue."""
    if name not in WORKLOADS:
        raise BadValue(f"workload {name!r} isn't known: {', '.join(WORKLOADS)}")
    cls = WORKLOADS[name]
    known = [key for key in inspect.signature(cls).parameters if key != "self"]
    if unknown := set(parameters) - set(known):
        raise BadValue(f"workload {name} has no {sorted(unknown)[0]!r}: it has {', '.join(known)}")
    settings = dict(parameters)
    if "seed" in known:
        settings.setdefault("seed", seed)
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.name != "self"]
    if missing := [key for key in needed if key not in settings]:
        raise BadValue(f"workload {name} needs {missing[0]!r}")
    try:
        return cls(**settings)
    except TypeError as error:
        given = ", ".join(f"{key} {value!r}" for key, value in parameters.items())
        raise BadValue(f"workload {name}: one of {given} isn't of the right kind: {error}") from None
