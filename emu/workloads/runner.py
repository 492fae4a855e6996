"""Running a workload on a machine: rows at its steps, samples in between, one result at the end.

Samples are taken every second of guest time that is waited for, and around guest work, whose guest time is what the
clock says it took (none, on a stepped clock). Between two samples the integrals take the mean.
"""

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from emu.errors import GuestError, GuestMemoryError, OutOfMemory
from emu.guest.reporting import CAPACITY
from emu.machine import Machine
from emu.mechanisms import settings_of
from emu.observe.environment import environment
from emu.observe.result import Phase, RunResult
from emu.observe.snapshot import Snapshot
from emu.units import FRAME_SIZE, format_size
from emu.workloads import Step, Workload

__all__ = ["Stopped", "run"]

_SAMPLE = 1.0  # guest seconds
_MOST_SAMPLES = 200  # of one wait


class Stopped(Exception):
    """Raised by whoever watches a run: end it here. Its rows so far are its result, and `snapshot` is the last of them.

    The guest's own work unwinds on the way out and gives memory back: so the picture is taken before.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__("stopped")
        self.snapshot = snapshot


def _notes(machine: Machine) -> list[str]:
    # why memory may still be there that one would expect to be gone
    notes = []
    if machine.host.balloon.counters["balloon_report_inhibited"]:
        notes.append("the host acknowledged the reports and discarded nothing: page poison or an assigned device")
    if machine.ram.stats()["gate_failed"]:
        store = machine.ram.store
        full = "; the store is full: give it more memory, or a file" if store.error == errno.ENOSPC else ""
        notes.append(
            f"an access waited for memory in vain: of {store.pages:,} stored pages {store.raw:,} don't compress{full}"
        )
    if machine.guest.pressure is not None and machine.host.squeeze is None:
        notes.append(f"{machine.mechanism.name} had no limit, so nothing was asked for: it does what reporting does")
    taken = {"cmm2": "stolen", "cmm2-light": "stolen", "swap": "swapped"}.get(machine.mechanism.name)
    if taken is not None and settings_of(machine.mechanism)["max"] is None:
        name = machine.mechanism.name
        notes.append(f"{name} had no limit (max=...): nothing was {taken} but when it was told to")
    most = settings_of(machine.mechanism)["max"] if taken == "stolen" else None
    if most is not None and machine.ram.footprint_bytes > most:
        notes.append(
            f"the footprint is {format_size(machine.ram.footprint_bytes)}, above max {format_size(most)}: the host "
            "takes only what its guest doesn't need, and looks four times a guest second, between the guest's calls"
        )
    reporting = machine.guest.reporting
    for zone in machine.guest.zones if reporting is not None else ():
        if zone.name != "DMA" and reporting is not None and reporting.gated(zone):
            notes.append(
                f"reporting skips zone {zone.name}: its {format_size(zone.free_frames * FRAME_SIZE)} free aren't above "
                f"its low watermark + {format_size(CAPACITY * FRAME_SIZE << reporting.order)} (mm/page_reporting.c)"
            )
    return notes


def run(
    machine: Machine,
    workload: Workload,
    *,
    seed: int,
    command: str = "",
    on_step: Callable[[str], None] = lambda name: None,
    on_sample: Callable[[Snapshot], None] = lambda snapshot: None,
) -> RunResult:
    """Run a workload to its end. on_step hears the name of each row, on_sample each snapshot."""
    started = time.monotonic()
    result = RunResult(
        workload=workload.name,
        parameters=workload.parameters(),
        mechanism=machine.mechanism.name,
        settings=settings_of(machine.mechanism),
        machine=machine.describe(),
        seed=seed,
        ram_bytes=machine.guest.ram_bytes,
        environment=environment(),
        command=command,
    )
    last = machine.snapshot(exact=True)
    first_mechanism = machine.mechanism

    def take(now: Snapshot) -> None:
        nonlocal last
        passed = now.t - last.t
        result.footprint_byte_seconds += passed * (now.footprint_bytes + last.footprint_bytes) / 2
        result.used_byte_seconds += passed * (now.guest_used_bytes + last.guest_used_bytes) / 2
        last = now
        on_sample(now)

    def sample(*, exact: bool = False) -> None:
        take(machine.snapshot(exact=exact))

    def steps() -> Iterator[Step]:
        yield from workload.steps(machine)
        if machine.host.discard.keeps:
            # what was kept goes only when somebody wants memory
            machine.host.pressure()
            yield Step("under pressure")

    try:
        for step in steps():
            sample(exact=step.row and not step.wait)
            end = last.t + step.wait
            every = max(_SAMPLE, step.wait / _MOST_SAMPLES)
            while (left := end - machine.clock.now()) > 0:
                machine.run_for(min(left, every))
                sample()
            if not step.row:
                continue
            if step.wait:
                sample(exact=True)
            result.phases.append(Phase.of(step.name, last))
            on_step(step.name)
    except Stopped as stopped:
        with contextlib.suppress(Stopped):  # who raises it at each picture has said so
            take(stopped.snapshot)
        result.phases.append(Phase.of("stopped", last))
        result.notes.append("stopped before its end")
    except (GuestError, GuestMemoryError) as error:  # the guest failed, not the run: its rows so far are worth having
        sample(exact=True)
        result.phases.append(Phase.of("failed", last))
        result.error = str(error) + ("; give the guest more: --ram" if isinstance(error, OutOfMemory) else "")
    result.counters = last.counters
    result.faults = [view for view in (last.write_faults, last.read_faults, *last.returns) if view.samples]
    result.measures = workload.measures()
    if machine.host.working_set is not None:
        result.working_set = [asdict(estimate) for estimate in machine.host.working_set.estimates]
    result.machine["disks"] = machine.describe()["disks"]
    result.notes += workload.notes()
    result.notes += _notes(machine)
    if machine.mechanism is not first_mechanism:
        settings = ",".join(f"{key}={value}" for key, value in settings_of(machine.mechanism).items())
        result.notes.append(
            f"the mechanism was switched during the run, at last to {machine.mechanism.name}"
            + (f" ({settings})" if settings else "")
        )
    if machine.clock.name != result.machine["clock"]:
        result.notes.append(f"guest time was made to run at another speed, at last {machine.clock.name}")
    result.books_difference = last.books_difference
    result.verified_frames = workload.verified_frames
    result.corrupt_frames = workload.corrupt_frames
    result.seconds = time.monotonic() - started
    return result
