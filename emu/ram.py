"""GuestRam: a mapping, a fault service, and a state for each frame.

Guest bytes are reached by read, write, touch, fill, verify and install: C calls with the GIL released. A raw view
exists as unsafe_view(). Ranges are [(gfn, count), ...] in frames; gpa is a byte address in the guest, gfn * 4096.
"""

import ctypes
import mmap
import os
import threading
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from emu import _native, residency
from emu._native import lib
from emu.errors import BadValue, ClosedError, GuestMemoryError, HostError, RangeError
from emu.frames import EVENT_TYPES, Event, FrameState, Op
from emu.histogram import Histogram
from emu.mapping import RamMapping
from emu.ranges import Ranges
from emu.reclaim import Reclaim, StoreInfo
from emu.uffd import Features, Mode, Rung, Userfaultfd, probe
from emu.units import FRAME_SIZE, format_size, parse_ram_size
from emu.usage import Usages

__all__ = ["Event", "FrameState", "GuestRam", "Histogram", "Op", "StoreInfo"]

_CHUNK = 16384  # frames (64 MiB) a native call: Python can handle Ctrl-C between two
_SHORT_CHUNK = 2048  # while somebody watches


class GuestRam(Reclaim, Usages):
    """A guest's memory.

    size: bytes or text, whole frames. service: "inline" (SIGBUS in the faulting thread), "thread", or "auto" (inline
    where the kernel has the feature, and "off" without userfaultfd). uffd: "auto", "full", "user" or "off", the rung to
    stand on; a named one that can't be had raises. fault_around: frames installed a fault, a power of two to 512; 1
    keeps RSS exact. service_cpu pins the service thread. disable: names as in EMU_DISABLE. thp must be False.
    write_tracking: let the kernel note which pages are written (WP_ASYNC, 6.7); needs UFFDIO_MOVE (6.8).

    Raises BadValue for arguments, HostError when the machine can't map or serve it.
    """

    def __init__(
        self,
        size: int | str,
        *,
        thp: bool = False,
        fault_around: int = 1,
        service: Literal["auto", "inline", "thread"] = "auto",
        uffd: Literal["auto", "full", "user", "off"] = "auto",
        service_cpu: int | None = None,
        write_tracking: bool = False,
        disable: str | Iterable[str] = (),
    ) -> None:
        self._region: _native.Region | None = None
        self._uffd: Userfaultfd | None = None
        self._side: RamMapping | None = None
        self._side_lock = threading.Lock()
        self._store_file: Any = None
        self._gate: object = None
        self._views: list[tuple[weakref.ref[memoryview], weakref.ref[Any]]] = []
        #: called between the native calls of one vcpu(), if set: whoever watches gets to look
        self.between: Callable[[], None] | None = None
        self.size = parse_ram_size(size)
        self.frames = self.size // FRAME_SIZE
        off = self._off = _native.disabled(disable)
        if mmap.PAGESIZE != FRAME_SIZE:
            raise HostError(f"this host's pages are {mmap.PAGESIZE} bytes; emu needs {FRAME_SIZE}")
        if thp:
            raise BadValue("thp=True can't be had: this version serves 4 KiB frames only")
        if service not in ("auto", "inline", "thread"):
            raise BadValue(f"service {service!r} isn't known: auto, inline or thread")
        if uffd not in ("auto", "full", "user", "off"):
            raise BadValue(f"uffd {uffd!r} isn't known: auto, full, user or off")
        if not 1 <= fault_around <= lib.EMU_BLOCK_FRAMES or fault_around & (fault_around - 1):
            raise BadValue(f"fault_around {fault_around!r} must be a power of two from 1 to {lib.EMU_BLOCK_FRAMES}")
        if service_cpu is not None and not 0 <= service_cpu < (os.cpu_count() or 1):
            raise BadValue(f"service_cpu {service_cpu!r} must be from 0 to {(os.cpu_count() or 1) - 1}")
        self.fault_around = fault_around
        self.write_tracking = write_tracking
        self.service_cpu = service_cpu
        self._mapping = RamMapping(self.size)
        try:
            self._mapping.map()
            self._base = self._mapping.base
            self._open_uffd(service, uffd, off, write_tracking)
            self._region = _native.Region(self.frames)
            self._region.open(
                self._base,
                uffd=self._uffd.fileno() if self._uffd else -1,
                service=getattr(lib, f"EMU_SERVICE_{self.service.upper()}"),
                poison=bool(self._uffd and Features.POISON in self._uffd.features),
                move=bool(self._uffd and Features.MOVE in self._uffd.features),
                wp=bool(self._uffd and Features.PAGEFAULT_FLAG_WP in self._uffd.features),
                wp_async=bool(self._uffd and Features.WP_ASYNC in self._uffd.features),
                service_cpu=-1 if service_cpu is None else service_cpu,
                fault_around=fault_around,
                disable=off,
            )
        except BaseException:
            if self._region is not None:
                self._region.close()
            self._release()
            raise

    def _open_uffd(self, service: str, uffd: str, off: frozenset[str], write_tracking: bool) -> None:
        self.service: str = "off"
        self.rung = Rung.OFF
        self.rung_reason = "asked for uffd=off"
        if write_tracking and (uffd == "off" or {"uffd", "move", "wp"} & off):
            raise HostError("write_tracking needs userfaultfd with WP_ASYNC and MOVE, and one of them is switched off")
        pagemap = "pagemap" not in off and residency.has_pagemap()
        if write_tracking and not pagemap:
            raise HostError("write_tracking needs /proc/self/pagemap, which can't be read here")
        if uffd == "off":
            if service != "auto":
                raise BadValue(f"service={service} needs userfaultfd, and uffd=off was asked for")
            return
        can = probe(off)
        self.rung_reason = can.why
        if can.rung == Rung.OFF and service != "auto":
            raise HostError(f"service={service} can't be had here: no userfaultfd ({can.why})")
        wanted = {"auto": Rung.USER, "user": Rung.USER, "full": Rung.FULL}[uffd]
        if can.rung < wanted:
            if uffd == "auto":
                return
            raise HostError(f"uffd={uffd} can't be had here: {can.why}")
        sigbus = Features.SIGBUS in can.features and "sigbus" not in off
        if service == "inline" and not sigbus:
            raise HostError("service=inline can't be had here: no UFFD_FEATURE_SIGBUS (Linux 4.14, or switched off)")
        inline = sigbus and service != "thread"
        required = Features.SIGBUS if inline else Features(0)
        mode = Mode.MISSING
        # one way out of the guest, and never WP_ASYNC beside the second: it would lose writes (csrc/aside.c); nor the
        # first without pagemap, which tells what has moved (csrc/move.c)
        if write_tracking:
            required |= Features.PAGEFAULT_FLAG_WP | Features.WP_ASYNC | Features.MOVE
            mode |= Mode.WP
        elif Features.MOVE in can.features and "move" not in off and pagemap:
            required |= Features.MOVE
        elif Features.PAGEFAULT_FLAG_WP in can.features and "wp" not in off:
            required |= Features.PAGEFAULT_FLAG_WP
            mode |= Mode.WP
        self._uffd = Userfaultfd(
            required=required,
            wanted=Features.POISON,
            rung=Rung.USER if uffd == "user" else Rung.FULL,
            disable=off,
        )
        self.service = "inline" if inline else "thread"
        self.rung = self._uffd.rung
        self.rung_reason = self._uffd.why
        self._uffd.register(self._base, self.size, mode)

    # ---- life

    def close(self) -> None:
        """Give everything back. Waits for calls under way in other threads; a second call does nothing.

        Views handed out by unsafe_view() are released. Raises BadValue while somebody still holds a slice of one.
        """
        for view, _ in self._views:
            if (held := view()) is not None:
                try:
                    held.release()
                except BufferError:
                    pass  # exported further: its exporter is alive, which is what counts
        self._views = [(view, exporter) for view, exporter in self._views if exporter() is not None]
        if self._views:
            raise BadValue("an unsafe_view() of this guest RAM, or a slice of one, is still in use: release it first")
        if self._region is not None:
            self._region.close()
        self._release()

    def _release(self) -> None:
        uffd, self._uffd = self._uffd, None
        if uffd is not None:
            uffd.close()
        self._mapping.close()
        side, self._side = self._side, None
        if side is not None:
            side.close()
        file, self._store_file = self._store_file, None
        if file is not None:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        region = getattr(self, "_region", None)
        if region is not None and not region.closed:
            warnings.warn(
                f"guest RAM of {format_size(self.size)} wasn't closed", ResourceWarning, source=self, stacklevel=2
            )
            self.close()

    def __repr__(self) -> str:
        return f"<GuestRam {format_size(self.size)}, faults {self.service}{', closed' if self.closed else ''}>"

    def check(self) -> None:
        """Raise ClosedError or ForkedError unless this RAM can be used here and now."""
        self._core.check()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._region is None or self._region.closed

    @property
    def _core(self) -> _native.Region:
        if self._region is None:
            raise ClosedError("this guest RAM is closed")
        return self._region

    # ---- guest access

    def vcpu(
        self, op: Op, ranges: Ranges, arg: int = 0, *, threads: int = 1, latency: Histogram | None = None
    ) -> list[int]:
        """Run op over the ranges' frames in C, shared out to `threads`; return the frames VERIFY found different.

        latency, if given, gets one sample a frame (two clock readings around each access). Raises GuestMemoryError
        with the frame that stopped it.
        """
        if not 1 <= threads <= 1024:
            raise BadValue(f"threads {threads!r} must be from 1 to 1024")
        core = self._core
        bad: list[int] = []
        done = 0
        # several threads are started and joined in each part: those stay long
        chunk = _CHUNK if self.between is None or threads > 1 else _SHORT_CHUNK
        for batch in ranges.chunks(chunk * threads):
            if done and self.between is not None:
                self.between()
            try:
                bad += core.vcpu(op, batch, arg, threads, None if latency is None else latency.native)
            except GuestMemoryError as error:
                error.done += done
                raise
            done += batch.frames
        return bad

    def _one(self, gfn: int, count: int) -> Ranges:
        ranges = Ranges.of([(gfn, count)])
        ranges.check(self.frames, disjoint=False)
        return ranges

    def touch(
        self, gfn: int, count: int = 1, write: bool = True, threads: int = 1, latency: Histogram | None = None
    ) -> None:
        """Touch each frame: a load, or an atomic OR of 0, which dirties it and changes nothing."""
        self.vcpu(Op.TOUCH_WRITE if write else Op.TOUCH_READ, self._one(gfn, count), threads=threads, latency=latency)

    def touch_ranges(self, ranges: Iterable[Sequence[int]] | Ranges, write: bool = False) -> None:
        """Touch the frames of many ranges, in their order."""
        batch = ranges if isinstance(ranges, Ranges) else Ranges.of(ranges)
        batch.check(self.frames, disjoint=False)
        self.vcpu(Op.TOUCH_WRITE if write else Op.TOUCH_READ, batch)

    def fill(self, gfn: int, count: int, seed: int, threads: int = 1, latency: Histogram | None = None) -> None:
        """Fill frames with content that follows from the seed and the frame's number."""
        self.vcpu(Op.FILL, self._one(gfn, count), seed, threads=threads, latency=latency)

    def verify(self, gfn: int, count: int, seed: int, threads: int = 1) -> list[int]:
        """Return the frames whose content isn't what fill() with this seed left there."""
        return self.vcpu(Op.VERIFY, self._one(gfn, count), seed, threads=threads)

    def read(self, gpa: int, n: int) -> bytes:
        """Return n bytes from guest physical address gpa."""
        if gpa < 0 or n < 0 or gpa + n > self.size:
            self._check_bytes(gpa, n)
        return self._core.read(gpa, n)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write data at guest physical address gpa; whole missing frames are installed, not faulted."""
        self._check_bytes(gpa, memoryview(data).nbytes)
        self._core.write(gpa, data)

    def readv(self, ranges: Ranges, skip: int, into: bytearray | memoryview) -> None:
        """Fill `into` from the ranges' frames, one after another, from byte `skip` of them on (preadv)."""
        self._core.copyv(ranges, skip, into, False)

    def writev(self, ranges: Ranges, skip: int, data: bytes | bytearray | memoryview) -> None:
        """Write data to the ranges' frames likewise (pwritev); whole missing frames are installed, not faulted."""
        self._core.copyv(ranges, skip, data, True)

    def install(self, gfns: Sequence[int], buffer: bytes | bytearray | memoryview | mmap.mmap) -> None:
        """Give frames the pages in buffer (len(gfns) * 4096 bytes): missing ones without a fault (UFFDIO_COPY)."""
        if memoryview(buffer).nbytes != len(gfns) * FRAME_SIZE:
            raise BadValue(f"install of {len(gfns)} frames needs {len(gfns) * FRAME_SIZE} bytes, not {len(buffer)}")
        if isinstance(gfns, range) and gfns.step == 1 and len(gfns):  # neighbours: their bytes are in a row
            self._one(gfns.start, len(gfns))
            try:
                self._core.write(gfns.start * FRAME_SIZE, buffer)
            except GuestMemoryError as error:
                error.done //= FRAME_SIZE
                raise
            return
        try:
            frames = array("Q", gfns)
        except (TypeError, OverflowError):
            raise BadValue("gfns must be integers of 0 or more") from None
        self._core.install(frames, buffer)

    def unsafe_view(self) -> memoryview:
        """Return the raw memory. For tests and experiments: a touch may fault while Python holds its lock.

        Both services serve such a fault without Python. A thread that has SIGBUS blocked dies of it with the inline
        service, and writes through the view reach zero-mapped frames without our books.
        """
        self._core.check()
        # The exporter holds us, so that a view keeps its memory mapped and served; close() sees whether it is alive.
        array_type: Any = type("_Exporter", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": self.size})
        exporter = array_type.from_address(self._base)
        exporter.ram = self
        view = memoryview(exporter).cast("B")
        self._views.append((weakref.ref(view), weakref.ref(exporter)))
        return view

    def _check_bytes(self, gpa: int, n: int) -> None:
        if gpa < 0 or n < 0 or gpa + n > self.size:
            raise RangeError(
                f"bytes [{gpa}, {gpa + n}) are outside the RAM, which has {self.size}",
                gfn=gpa // FRAME_SIZE,
                frames=self.frames,
            )

    # ---- watching

    @property
    def address(self) -> int:
        """Host virtual address of frame 0."""
        self._core.check()
        return self._base

    @property
    def rss_bytes(self) -> int:
        """Resident bytes of the guest's RAM, from the kernel (smaps)."""
        return self.smaps().rss

    @property
    def lazyfree_bytes(self) -> int:
        """Of rss_bytes, what the kernel may drop without an event, from the kernel (smaps)."""
        return self.smaps().lazyfree

    def smaps(self) -> residency.Smaps:
        """Return what smaps says of the RAM."""
        self._core.check()
        return residency.read_smaps(self._base, self.size)

    def scan(self) -> residency.Scan | None:
        """Return what PAGEMAP_SCAN says of the RAM; None before Linux 6.7."""
        self._core.check()
        return None if "pagemap_scan" in self._off else residency.scan(self._base, self.size)

    def mincore_bytes(self) -> int:
        """Return what mincore(2) says of the RAM: an upper bound, since it counts zero pages."""
        self._core.check()
        return residency.mincore_bytes(self._base, self.size)

    def look(self, *, everything: bool = False) -> residency.Look:
        """Return the RSS by the kernel as a tick can afford it: asked again where something may have changed.

        In a RAM with no more than 512 MiB resident, all of it is asked about; in a larger one, the 2 MiB blocks whose
        frames changed their state since the last look and, in rotation, others (csrc/rss.c). Without PAGEMAP_SCAN
        (Linux 6.7), or with frames lazily freed, it is smaps, which tells LazyFree and takes 25 ns a page.
        """
        core = self._core
        core.check()
        if "pagemap_scan" not in self._off and not core.stats()["nr_lazy"] and (seen := core.look(everything)):
            pages, whole = seen
            return residency.Look(pages * FRAME_SIZE, 0, whole, "PAGEMAP_SCAN")
        smaps = self.smaps()
        return residency.Look(smaps.rss, smaps.lazyfree, True, "smaps")

    def latency(self, write: bool = True) -> Histogram:
        """Return how long write (or read) faults took, as the faulting vCPU saw them, since the RAM was opened.

        Each is the time of one access to a missing frame from before it to after it: kernel, service, way back, and the
        reading of the clock. One in eight is timed, each thread's first among them. Not among them: returns from aside,
        and from the store.
        """
        return self._latency(lib.EMU_LAT_FAULT_WRITE if write else lib.EMU_LAT_FAULT_READ)

    def return_latency(self, *, stored: bool = False) -> Histogram:
        """Return how long accesses took that brought a frame back from aside, or from the store."""
        return self._latency(lib.EMU_LAT_SWAP_IN if stored else lib.EMU_LAT_ASIDE_RETURN)

    def _latency(self, which: int) -> Histogram:
        histogram = Histogram()
        self._core.latency(which, histogram.native)
        return histogram

    def tally(self, memmap: Any, listed: Iterable[Sequence[int]], cell_frames: int) -> "array[int]":
        """Count frames by cell, owner and FrameState: flat, [cell][owner][state], cells of cell_frames each.

        One state more, the last: in memory, and volatile or potentially so.

        memmap: the guest's descriptors (native), which know the owners. listed: (gfn, count, owner), ascending, for
        frames of which it is known otherwise.
        """
        if cell_frames < 1:
            raise BadValue(f"cells of {cell_frames!r} frames: give 1 or more")
        return self._core.tally(memmap, Ranges.of(listed), cell_frames)

    @property
    def footprint_bytes(self) -> int:
        """What the host really holds for this RAM, by the kernel: RSS, frames aside, the store's pool, tables."""
        return self.rss_bytes + self.side_bytes + self.store.pool_resident + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Resident bytes of the host's tables for this RAM."""
        return self._core.table_bytes

    @property
    def vectored(self) -> bool:
        """Whether many ranges are discarded in one system call (process_madvise on ourselves, Linux 6.13)."""
        return self._core.vectored

    def states(self, gfn: int = 0, count: int | None = None) -> bytes:
        """Return one FrameState byte a frame."""
        count = self.frames - gfn if count is None else count
        self._one(gfn, count)
        return self._core.states(gfn, count)

    def stats(self) -> dict[str, int]:
        """Return the core's counters; those named nr_* are frames by state."""
        return self._core.stats()

    def events(self, most: int = 4096) -> list[Event]:
        """Return and forget the events since the last call. One reader at a time."""
        return [
            Event(ns, EVENT_TYPES.get(kind, str(kind)), gfn, count, arg)
            for ns, kind, gfn, count, arg in self._core.events(most)
        ]

    def attach_gate(self, gate: Any, slot: int, deadline_ms: int, keep: object) -> None:
        """Charge frames at a gate; for emu.gate.Gate, which is kept as long as this RAM."""
        self._core.attach_gate(gate, slot, deadline_ms)
        self._gate = keep

    def trace_faults(self, on: bool = True) -> None:
        """Record every fault as an event, too."""
        self._core.trace_faults(on)
