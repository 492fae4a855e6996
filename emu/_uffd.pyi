# The compiled core. Its surface is csrc/emu.cdef.h; only emu/_native.py may import it.
from typing import Any

ffi: Any
lib: Any
