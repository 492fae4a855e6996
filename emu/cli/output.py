"""Where the command line prints: rich's console, and a reader that has gone is an error for app.py."""

from rich.console import Console

__all__ = ["Output"]


class Output(Console):
    """A console for stdout. Highlighting is off: numbers are plain."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles a BrokenPipeError."""
        raise  # noqa: PLE0704
