"""THE importer of the compiled core: handles, errno -> exceptions, close order, fork guard.

Everything above calls the core through this file. A `Region` counts the calls under way, so that close() can refuse
new ones, wait for those, and only then let go of the memory; it remembers its process, since a forked child has neither
the memory (MADV_DONTFORK) nor the fault service.
"""

import errno
import functools
import mmap
import os
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable
from typing import Any

from emu._uffd import ffi, lib
from emu.errors import (
    BadValue,
    ClosedError,
    DiscardFault,
    EmuError,
    ForkedError,
    GuestMemoryError,
    HostError,
    RangeError,
    ServiceDeadError,
    UffdError,
)
from emu.ranges import Ranges

__all__ = ["DISABLE_NAMES", "Region", "address_of", "content", "disabled", "ffi", "lib"]

# EMU_DISABLE / --disable: what may be switched off, so that each rung is tested with the higher one off.
DISABLE_NAMES = {
    "uffd": 0,
    "full": lib.EMU_NO_FULL,
    "syscall": lib.EMU_NO_SYSCALL,
    "device": lib.EMU_NO_DEVICE,
    "sigbus": 0,
    "poison": lib.EMU_NO_POISON,
    "process_madvise": lib.EMU_NO_PROCESS_MADVISE,
    "pagemap": lib.EMU_NO_PAGEMAP,
    "pagemap_scan": 0,
    "move": lib.EMU_NO_MOVE,
    "wp": lib.EMU_NO_WP,
    "lz4": lib.EMU_NO_LZ4,
    "membarrier": lib.EMU_NO_MEMBARRIER,
}


_ANY_USAGE = (1 << lib.EMU_NR_USAGES) - 1
_STATS = [ffi.string(lib.emu_stats_name(i)).decode() for i in range(lib.emu_stats_count())]


def disabled(more: str | Iterable[str] = ()) -> frozenset[str]:
    """Return what EMU_DISABLE and `more` switch off. Raises BadValue for a name that isn't known."""
    names = set(os.environ.get("EMU_DISABLE", "").replace(" ", "").split(","))
    names.update(more.replace(" ", "").split(",") if isinstance(more, str) else more)
    names.discard("")
    if "pagemap" in names:
        names.add("pagemap_scan")
    if unknown := names - DISABLE_NAMES.keys():
        raise BadValue(f"can't disable {sorted(unknown)[0]!r}: known are {', '.join(DISABLE_NAMES)}")
    return frozenset(names)


def disable_mask(names: frozenset[str]) -> int:
    """Return the core's bits for those names that it knows."""
    mask = 0
    for name in names:
        mask |= DISABLE_NAMES[name]
    return mask


def address_of(mapping: mmap.mmap) -> tuple[int, Any]:
    """Return a mapping's address, and the lease that keeps it open until released with ffi.release()."""
    lease = ffi.from_buffer(mapping, require_writable=True)
    return int(ffi.cast("uintptr_t", lease)), lease


def content(seed: int, key: int) -> bytes:
    """Return the 4096 bytes that a fill with this seed leaves in the frame with this key."""
    words = ffi.new("uint64_t[512]")
    lib.emu_content_words(seed & (1 << 64) - 1, key, words)
    return bytes(ffi.buffer(words))


_RANGES = ffi.typeof("struct emu_range[]")
# room for an answer that is nearly always empty: clearing it would take as long as the question
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)
_SMALL = 64 << 10  # bytes


class _Scratch(threading.local):
    # What short calls need, one a thread: made anew, each of these takes as long as the call.
    def __init__(self) -> None:
        self.progress = ffi.new("struct emu_progress *")
        self.bytes = ffi.new("char[]", _SMALL)
        self.buffer = ffi.buffer(self.bytes)


_scratch = _Scratch()
_fork_generation = object()


_regions: "weakref.WeakSet[Region]" = weakref.WeakSet()


def _forked() -> None:
    global _fork_generation  # noqa: PLW0603
    _fork_generation = object()
    for region in list(_regions):  # for what calls the core without asking us: Region.sayer()
        region.end_in_child()


os.register_at_fork(after_in_child=_forked)


def _cell() -> Any:
    # Where the core puts a region's handle: owned before there is one, so that no interrupt can come in between.
    # Freed with
    # its Region object, not by close(): a late call must find the region closed, not gone. A forked child has the
    # struct,
    # but neither its thread nor its tables: there it is left alone.
    pid = os.getpid()

    def free(cell: Any) -> None:
        if cell[0] != ffi.NULL and os.getpid() == pid:
            lib.emu_region_free(cell[0])

    return ffi.gc(ffi.new("struct emu_region **"), free)


class Region:
    """One opened core region. Every method is one native call (GIL released).

    The core itself counts calls under way and refuses new ones once closed (region.c): nothing here needs a lock,
    which an interrupt or a signal handler could find held. Made first and opened then: whoever holds the object can
    close what open() did, whatever interrupted it.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._pid = os.getpid()
        self._generation = _fork_generation
        self._closed = False
        self._cell = _cell()
        _regions.add(self)

    def open(
        self,
        base: int,
        *,
        uffd: int,
        service: int,
        poison: bool,
        move: bool,
        wp: bool,
        wp_async: bool,
        service_cpu: int,
        fault_around: int,
        disable: frozenset[str],
    ) -> None:
        """Open it over [base, base + frames * 4096). Raises UffdError."""
        options = ffi.new("struct emu_region_options *")
        options.uffd = uffd
        options.service = service
        options.poison = poison
        options.move = move
        options.wp = wp
        options.wp_async = wp_async
        options.service_cpu = service_cpu
        options.fault_around = fault_around
        options.disable = disable_mask(disable)
        err = lib.emu_region_open(ffi.cast("void *", base), self.frames, options, self._cell)
        if err:
            hint = {
                errno.ENOSPC: "at most 1024 guest RAMs can be open at once; close some",
                errno.ENOMEM: "no address space for the tables (RLIMIT_AS, overcommit_memory=2?)",
            }.get(-err, "")
            raise UffdError(-err, "opening the region", hint=hint)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that opened the region."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise unless the region can be used by this process now."""
        if self.foreign:
            raise ForkedError(f"this guest RAM belongs to process {self._pid}; open another one in the child")
        if self._closed or self._cell[0] == ffi.NULL:
            raise ClosedError("this guest RAM is closed")

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.check()
        result = function(self._cell[0], *args)
        if result == -errno.ESHUTDOWN:
            raise ClosedError("this guest RAM is closed")
        return result

    def close(self) -> None:
        """Refuse new calls, wait for those under way, stop the service, unregister. Returns when all that is done.

        A second call, also from another thread meanwhile, waits for the same. In a forked child there is nothing to
        undo.
        """
        self._closed = True
        if not self.foreign and self._cell[0] != ffi.NULL:
            lib.emu_region_close(self._cell[0])

    def end_in_child(self) -> None:
        """What calls the core without asking us finds it closed there: its tables are the parent's alone."""
        if self._cell[0] != ffi.NULL:
            lib.emu_region_forked(self._cell[0])

    def _failed(self, err: int, progress: Any, *, unit: int = 1) -> EmuError:
        if err == -errno.ERANGE:
            return RangeError(f"outside the RAM, which has {self.frames} frames", frames=self.frames)
        if err == -errno.EOWNERDEAD:
            dead = os.strerror(self._call(lib.emu_region_dead))
            return ServiceDeadError(
                f"the fault service has died ({dead}); its missing frames are poisoned: close the RAM"
            )
        if err == -errno.EEXIST:
            return RangeError("a frame is named twice in one call", frames=self.frames)
        if progress is None and err == -errno.EOPNOTSUPP:
            return HostError("this can't be had on this RAM: see emu doctor")
        if progress is None:
            return HostError(
                f"the kernel refused to take memory back: {os.strerror(-err)} (is some of it locked, mlock?)"
            )
        if err == -errno.EINVAL:
            return BadValue("the core refused the arguments")
        kind = DiscardFault if err == -errno.ENODATA else GuestMemoryError
        return kind(-err, int(progress.bad_gfn), int(progress.done) // unit)

    # ---- guest access

    def vcpu(self, op: int, ranges: Ranges, arg: int, threads: int, histogram: Any | None) -> list[int]:
        """Run one vCPU operation; return the frames that verify found different."""
        frames = ranges.frames
        job = ffi.new("struct emu_vcpu_job *")
        job.op = op
        job.threads = threads
        job.arg = arg & (1 << 64) - 1
        job.hist = histogram if histogram is not None else ffi.NULL
        bad = None
        if op == lib.EMU_VERIFY:
            bad = array("Q", bytes(8 * frames))
            job.bad = ffi.from_buffer("uint64_t[]", bad)
            job.bad_cap = frames
        flat = ffi.from_buffer("struct emu_range[]", ranges.flat)
        err = self._call(lib.emu_vcpu_run, flat, len(ranges), job)
        if err:
            raise self._failed(err, job.progress)
        return list(bad[: job.bad_count]) if bad is not None else []

    def read(self, gpa: int, n: int) -> bytes:
        if self._generation is not _fork_generation or self._closed:
            self.check()
        scratch = _scratch
        if n <= _SMALL:
            err = lib.emu_guest_read(self._cell[0], gpa, scratch.bytes, n, scratch.progress)
            if not err:
                return scratch.buffer[:n]  # type: ignore[no-any-return]
        else:
            buffer = bytearray(n)
            err = lib.emu_guest_read(self._cell[0], gpa, ffi.from_buffer(buffer), n, scratch.progress)
            if not err:
                return bytes(buffer)
        if err == -errno.ESHUTDOWN:
            raise ClosedError("this guest RAM is closed")
        raise self._failed(err, scratch.progress)

    def write(self, gpa: int, data: Any) -> None:
        with memoryview(data).cast("B") as view, ffi.from_buffer(view) as buffer:
            progress = ffi.new("struct emu_progress *")
            err = self._call(lib.emu_guest_write, gpa, buffer, len(view), progress)
        if err:
            raise self._failed(err, progress)

    def copyv(self, ranges: Ranges, skip: int, buffer: Any, write: bool) -> None:
        """Copy between a buffer (bytes-like; writable for a read) and the ranges' frames from byte `skip` of them
        on."""
        progress = _scratch.progress
        with ffi.from_buffer(buffer, require_writable=not write) as data:
            flat = ffi.from_buffer(_RANGES, ranges.flat)
            err = self._call(lib.emu_guest_copyv, flat, len(ranges), skip, data, len(data), write, progress)
        if err:
            raise self._failed(err, progress)

    def install(self, gfns: "array[int]", data: Any) -> None:
        with memoryview(data).cast("B") as view, ffi.from_buffer(view) as buffer:
            progress = ffi.new("struct emu_progress *")
            err = self._call(lib.emu_guest_install, ffi.from_buffer("uint64_t[]", gfns), len(gfns), buffer, progress)
        if err:
            raise self._failed(err, progress)

    # ---- taking back

    def reclaim(self, function: Any, ranges: Ranges, *more: int) -> int:
        """Run lib.emu_discard or a sister of it; return the frames it took."""
        taken = self._call(function, ffi.from_buffer("struct emu_range[]", ranges.flat), len(ranges), *more)
        if taken < 0:
            raise self._failed(taken, None)
        return int(taken)

    def lend_side(self, base: int) -> None:
        """Lend the side region: where frames are that were set aside."""
        err = self._call(lib.emu_region_lend_side, ffi.cast("void *", base))
        if err:
            raise UffdError(-err, "lending the side region")

    @property
    def aside_how(self) -> int:
        return int(self._call(lib.emu_region_aside_how))

    def sweep(self) -> None:
        self._call(lib.emu_aside_sweep)

    def swap_on(self, *, memory: int, fd: int, file: int, readahead: int, disable: frozenset[str]) -> None:
        """Open the store. The file's descriptor stays the caller's, until the region is closed."""
        options = ffi.new("struct emu_store_options *")
        options.memory, options.fd, options.file, options.readahead = memory, fd, file, readahead
        options.disable = disable_mask(disable)
        err = self._call(lib.emu_swap_on, options)
        if err == -errno.EBUSY:
            raise HostError("this guest RAM has a store already")
        if err == -errno.EINVAL:
            raise BadValue("a store needs 64 KiB of memory or 4 KiB of a file, and a readahead of 1 to 32 pages")
        if err:
            raise HostError(f"opening the store: {os.strerror(-err)}")

    def store_info(self) -> Any:
        info = ffi.new("struct emu_store_info *")
        self._call(lib.emu_swap_info, info)
        return info

    def corrupt(self, gfn: int, byte: int) -> None:
        """Flip a bit of a stored page (for tests)."""
        err = self._call(lib.emu_swap_corrupt, gfn, byte)
        if err:
            raise HostError(f"frame {gfn:#x} has nothing in the store's memory: {os.strerror(-err)}")

    def swapd(self, function: Any, *args: int) -> None:
        """Run lib.emu_swapd_start or a sister of it."""
        err = self._call(function, *args)
        if err:
            raise HostError(f"the swap worker: {os.strerror(-err)} (a store must be there, and the worker be started)")

    def attach_gate(self, gate: Any, slot: int, deadline_ms: int) -> None:
        """Charge this RAM's frames at a gate."""
        err = self._call(lib.emu_gate_attach, gate, slot, deadline_ms)
        if err:
            raise HostError(f"the charge gate: {os.strerror(-err)} (without userfaultfd there is none; one a RAM)")

    # ---- use

    def track(self) -> None:
        """Have accesses leave their bits."""
        err = self._call(lib.emu_access_track, 1)
        if err:
            raise HostError(f"tracking accesses: {os.strerror(-err)}")

    def harvest(self, gfn: int, count: int, bits: int) -> bytes:
        buffer = bytearray(count)
        err = self._call(lib.emu_access_harvest, gfn, count, bits, ffi.from_buffer(buffer))
        if err:
            raise self._failed(err, None)
        return bytes(buffer)

    def scan(self) -> list[int]:
        return self._by_age(lib.emu_access_scan)

    def ages(self, usages: int) -> list[int]:
        return self._by_age(lib.emu_access_ages, usages)

    def _by_age(self, call: Any, *args: int) -> list[int]:
        ages = ffi.new("uint64_t[256]")
        err = self._call(call, *args, ages)
        if err:
            raise self._failed(err, None)
        return list(ages)

    def victims(self, min_age: int, want: int, most: int) -> Ranges:
        flat = array("Q", bytes(24 * most))
        n = ffi.new("size_t *")
        found = self._call(lib.emu_access_victims, min_age, want, _ANY_USAGE, ffi.from_buffer(_RANGES, flat), most, n)
        if found < 0:
            raise self._failed(found, None)
        return Ranges(flat[: 3 * n[0]])

    # ---- usages (CMM2)

    def track_usages(self) -> None:
        self._begun(self._call(lib.emu_usage_track))

    def _begun(self, err: int) -> None:
        if err == -errno.EOPNOTSUPP:
            raise HostError(
                "page states need userfaultfd, and for the thread service UFFDIO_POISON: a page that is gone must be "
                "told from one of zeros (emu doctor; EMU_DISABLE?)"
            )
        if err:
            raise self._failed(err, None)

    def _unsaid(self, err: int) -> EmuError:
        if err == -errno.EOPNOTSUPP:
            return HostError("nothing is said of this RAM's frames: track_usages() first, or mechanism cmm2")
        if err == -errno.EINVAL:
            return BadValue("a usage, cause or policy isn't known; potentially volatile needs track_accesses() first")
        return self._failed(err, None)

    @property
    def tracks_usages(self) -> bool:
        return bool(self._call(lib.emu_usage_tracked) == 1)

    def say(self, ranges: Ranges, usage: int, cause: int) -> "tuple[int, array[int]]":
        with ffi.from_buffer(_RANGES, ranges.flat) as flat:
            return self._said(lib.emu_usage_set, (flat, len(ranges)), ranges.frames, usage, cause)

    def say_frames(self, gfns: "array[int]", usage: int, cause: int) -> "tuple[int, array[int]]":
        if gfns.typecode != "I":
            raise BadValue(f"frame numbers come as array('I'), not {gfns.typecode!r}")
        with ffi.from_buffer("uint32_t[]", gfns) as flat:
            return self._said(lib.emu_usage_set_frames, (flat, len(gfns)), len(gfns), usage, cause)

    def _said(
        self, call: Callable[..., int], of: tuple[Any, int], frames: int, usage: int, cause: int
    ) -> "tuple[int, array[int]]":
        room = frames if usage == lib.EMU_STABLE else 0
        gone, found = _uncleared("uint64_t[]", room), ffi.new("size_t *")
        changed = self._call(call, *of, usage, cause, gone, room, found)
        if changed < 0:
            raise self._unsaid(changed)
        return int(changed), array("Q", bytes(ffi.buffer(gone, 8 * found[0])))

    @property
    def bytes_address(self) -> int:
        self.check()
        return int(ffi.cast("uintptr_t", lib.emu_region_bytes(self._cell[0])))

    def sayer(self, gfn: "array[int]", usage: int, cause: int) -> "functools.partial[int]":
        if not self.tracks_usages:
            raise self._unsaid(-errno.EOPNOTSUPP)
        at = ffi.from_buffer("uint64_t[]", gfn)
        call = functools.partial(lib.emu_usage_one, ffi.new("struct emu_sayer *", (self._cell[0], at, usage, cause)))
        call.keep = (self, at)  # type: ignore[attr-defined]  # for as long as it can be called
        return call

    def page_states(self, memmap: Any, how: int) -> None:
        self._begun(self._call(lib.emu_page_states_on, memmap, how))

    def usage_counts(self) -> Any:
        counts = ffi.new("struct emu_usage_counts *")
        err = self._call(lib.emu_usage_counts, counts)
        if err:
            raise self._unsaid(err)
        return counts

    def usage_matrix(self) -> list[list[int]]:
        flat = ffi.new("int64_t[]", lib.EMU_NR_USAGES * lib.EMU_NR_STATES)
        err = self._call(lib.emu_usage_matrix, flat)
        if err:
            raise self._unsaid(err)
        return [list(flat[u * lib.EMU_NR_STATES : (u + 1) * lib.EMU_NR_STATES]) for u in range(lib.EMU_NR_USAGES)]

    def usages(self, gfn: int, count: int) -> bytes:
        buffer = bytearray(count)
        err = self._call(lib.emu_usage_copy, gfn, count, ffi.from_buffer(buffer))
        if err:
            raise self._failed(err, None)
        return bytes(buffer)

    def steal(self, frames: int, usages: int, policy: int, seed: int) -> int:
        took = self._call(lib.emu_steal_some, frames, usages, policy, seed)
        if took in (-errno.EOPNOTSUPP, -errno.EINVAL):
            raise self._unsaid(took)
        if took < 0:
            raise self._failed(took, None)
        return int(took)

    def written(self) -> int:
        pages = self._call(lib.emu_access_written)
        if pages < 0:
            raise HostError(f"the kernel doesn't note writes here: {os.strerror(-pages)} (write_tracking=True?)")
        return int(pages)

    # ---- watching

    def look(self, everything: bool) -> tuple[int, bool] | None:
        """Return (resident pages, whether all of that is of now); None without PAGEMAP_SCAN."""
        result = ffi.new("struct emu_look *")
        err = self._call(lib.emu_rss_look, everything, result)
        if err in (-errno.ENOTTY, -errno.EPERM, -errno.EACCES):
            return None
        if err:
            raise HostError(f"PAGEMAP_SCAN: {os.strerror(-err)}")
        return int(result.rss), bool(result.whole)

    def tally(self, memmap: Any, ranges: Ranges, cell_frames: int) -> "array[int]":
        """Count all frames by cell, owner and state; see emu_states_tally."""
        counts = array("I", bytes(4 * -(-self.frames // cell_frames) * lib.EMU_NR_OWNERS * lib.EMU_NR_TALLIES))
        flat = ffi.from_buffer("struct emu_range[]", ranges.flat)
        into = ffi.from_buffer("uint32_t[]", counts)
        err = self._call(lib.emu_states_tally, memmap, flat, len(ranges), cell_frames, into)
        if err == -errno.EINVAL:
            raise BadValue("the ranges of a tally must ascend, and their owners be known")
        if err:
            raise self._failed(err, None)
        return counts

    def latency(self, which: int, histogram: Any) -> None:
        self._call(lib.emu_latency_read, which, histogram)

    def states(self, gfn: int, count: int) -> bytes:
        buffer = bytearray(count)
        err = self._call(lib.emu_states_copy, gfn, count, ffi.from_buffer(buffer))
        if err:
            raise self._failed(err, None)
        return bytes(buffer)

    def stats(self) -> dict[str, int]:
        values = ffi.new("int64_t[]", len(_STATS))
        self._call(lib.emu_stats_read, values)
        return dict(zip(_STATS, values, strict=True))

    def events(self, cap: int) -> list[tuple[int, int, int, int, int]]:
        """Drain up to cap events: (ns, type, gfn, count, arg). One reader at a time."""
        events = ffi.new("struct emu_event[]", cap)
        n = self._call(lib.emu_ring_drain, events, cap)
        return [(e.ns, e.type, e.gfn, e.count, e.arg) for e in events[0:n]]

    def trace_faults(self, on: bool) -> None:
        self._call(lib.emu_ring_trace_faults, on)

    @property
    def table_bytes(self) -> int:
        return int(self._call(lib.emu_region_table_bytes))

    @property
    def vectored(self) -> bool:
        return bool(self._call(lib.emu_region_vectored))
