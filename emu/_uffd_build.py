"""Describe the extension to cffi: declarations from csrc/emu.cdef.h, code from csrc/*.c.

Executed by setuptools (setup.py names it), never imported by emu, and imports nothing of ours. EMU_WERROR=1 makes
warnings errors (script/lint); EMU_DEBUG=1 keeps the assertions of the transition table.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
SOURCES = [
    "uffd.c",
    "region.c",
    "state.c",
    "stats.c",
    "ring.c",
    "fault.c",
    "sigbus.c",
    "service.c",
    "guestcopy.c",
    "guestwalk.c",
    "advise.c",
    "reclaim.c",
    "steal.c",
    "usage.c",
    "page_states.c",
    "aside.c",
    "move.c",
    "swap.c",
    "swapout.c",
    "swapin.c",
    "store.c",
    "lz4.c",
    "gate.c",
    "access.c",
    "vcpu.c",
    "rss.c",
    "residency.c",
    "memmap.c",
    "pagecache.c",
    "lru.c",
    "disk.c",
    "native.c",
]
HEADERS = ["emu.h", "core.h", "memmap.h", "store.h", "swap.h", "guestaccess.h", "uapi.h", "emu.cdef.h"]

# setuptools wants paths relative to the project's root
_relative = [str((CSRC / name).relative_to(HERE.parent)) for name in SOURCES]
# state bytes are read and exchanged eight at a time, as one word (csrc/state.c): hence no strict aliasing
_flags = ["-std=gnu11", "-O2", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wshadow"]
if os.environ.get("EMU_WERROR") == "1":
    _flags += ["-Werror"]
if os.environ.get("EMU_DEBUG") == "1":
    _flags += ["-UNDEBUG", "-g"]

ffibuilder = FFI()
ffibuilder.cdef((CSRC / "emu.cdef.h").read_text())
ffibuilder.set_source(
    "emu._uffd",
    '#include <sys/mman.h>\n#include "uapi.h"\n#include "emu.h"\n#include "memmap.h"\n',
    sources=_relative,
    include_dirs=[str(CSRC.relative_to(HERE.parent))],
    depends=[str((CSRC / name).relative_to(HERE.parent)) for name in HEADERS],
    extra_compile_args=_flags,
    extra_link_args=["-pthread", "-ldl"],
)
