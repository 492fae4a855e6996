"""The command line as it was given, and how its words are read."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import Token

from emu.errors import BadValue

__all__ = ["again", "whole"]


def again() -> str:
    """Return the command as it was given, with what it took from the environment."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", "emu"]
    elif (found := shutil.which(program.name)) and Path(found).resolve() == program.resolve():
        words = [program.name]
    else:
        near = program.is_absolute() and program.is_relative_to(Path.cwd())
        words = [str(program.relative_to(Path.cwd()) if near else program)]
    command = shlex.join([*words, *sys.argv[1:]])
    off = os.environ.get("EMU_DISABLE")
    return f"EMU_DISABLE={shlex.quote(off)} {command}" if off else command


def whole(type_: object, tokens: Sequence[Token]) -> int:
    """Read an integer; the parser would round 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise BadValue(f"{tokens[0].keyword} {tokens[0].value!r} isn't a whole number") from None
