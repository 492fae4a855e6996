"""The seam: cdef, header and what the compiled module exports agree."""

import re
from pathlib import Path

from emu import _native
from emu.frames import FrameState, Op

CSRC = Path(_native.__file__).parent / "csrc"


def declared(text):
    return set(re.findall(r"\b(emu_[a-z_]+)\(", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))


def test_every_declared_function_is_in_the_header_and_the_module():
    """And under the limit that keeps the surface readable."""
    cdef = declared((CSRC / "emu.cdef.h").read_text())
    assert cdef <= declared((CSRC / "emu.h").read_text())
    assert cdef <= set(dir(_native.lib))
    assert len(cdef) < 120


def test_states_and_operations_come_from_the_core():
    """Never typed twice."""
    assert [state.name for state in FrameState] == [
        "ZERO",
        "ZEROMAP",
        "RESIDENT",
        "LAZY",
        "BUSY",
        "LOST",
        "ASIDE",
        "PRESERVED",
        "DISCARDED",
    ]
    assert len(FrameState) == _native.lib.EMU_NR_STATES
    assert len(set(Op)) == 6


def test_filled_content_differs_by_seed_key_and_place():
    """No two frames agree, none is zeros, and a frame is not its own shift."""
    pages = {_native.content(seed, key) for seed in range(3) for key in range(100)}
    assert len(pages) == 300
    assert bytes(4096) not in pages
    words = {page[i : i + 8] for page in pages for i in range(0, 4096, 8)}
    assert len(words) > 300 * 512 * 0.99


def test_every_counter_has_a_name():
    """As vmstat spells its own."""
    n = _native.lib.emu_stats_count()
    names = [_native.ffi.string(_native.lib.emu_stats_name(i)).decode() for i in range(n)]
    assert len(set(names)) == n
    assert all(re.fullmatch(r"[a-z_]+", name) for name in names)
    assert _native.lib.emu_stats_name(n) == _native.ffi.NULL
