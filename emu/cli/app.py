"""The root of the command line, and what a failure looks like to a shell.

Exit codes: 0; 1 for a run that failed; 2 for bad input, with one line on stderr that names the value and the limit; 130
after Ctrl-C, with everything released.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError
from rich.console import Console

from emu import __version__
from emu.cli import bench, compare, doctor, run
from emu.errors import BadValue, EmuError

__all__ = ["app", "main"]

app = App(
    name="emu",
    version=f"emu {__version__}",
    help="A guest's memory on a desk: real pages, real page faults, real RSS, no virtual machine.",
)
app.command(doctor.doctor)
app.command(run.app)
app.command(compare.compare)
app.command(bench.bench)


def _terminated(number: int, frame: FrameType | None) -> None:
    # unwind as Ctrl-C does, so that the terminal is restored and the memory released
    raise SystemExit(128 + number)


def _drop_output() -> None:
    # what is still buffered can't be written, and must not fail once more at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _terminated)
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    errors = Console(stderr=True, highlight=False, markup=False)
    errors.soft_wrap = not errors.is_terminal  # a terminal wraps at words, a file gets one line
    try:
        code = app(
            sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except CycloptsError as error:
        errors.print(f"emu: {' '.join(str(error).split())}")
        return 2
    except BadValue as error:
        errors.print(f"emu: {error}")
        return 2
    except EmuError as error:
        errors.print(f"emu: {error}")
        return 1
    except BrokenPipeError:  # the reader (head, less) has gone: say no more, as a filter would that SIGPIPE ends
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        errors.print(f"emu: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("emu: interrupted")
        return 130
    return code if isinstance(code, int) else 0
