"""A command on a pseudo-terminal: what it wrote, keys, sizes, signals, and whether it left the terminal as it was."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

import pytest

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Runs argv on a terminal of that size; seen is all that it wrote."""

    def __init__(self, argv, *, width=80, height=24, env=None):
        self.control, self._terminal = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self._terminal)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.child = subprocess.Popen(
            argv,
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "PYTHONUTF8": "1"} | (env or {}),
        )

    def resize(self, width, height):
        self.width, self.height = width, height
        fcntl.ioctl(self.control, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _read(self, timeout):
        if not select.select([self.control], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self.control, 1 << 16)
        except OSError:
            return False
        self.seen += self._decoder.decode(data)  # a character may come in two reads
        return bool(data)

    def wait_for(self, test, timeout=30):
        """Read until test(self) is true; raises with what was seen."""
        deadline = time.monotonic() + timeout
        while not test(self):
            self._read(0.1)
            if time.monotonic() > deadline or (self.child.poll() is not None and not self._read(0.1)):
                assert test(self), self.seen[-3000:]

    def type(self, keys):
        os.write(self.control, keys.encode())

    @property
    def frame(self):
        """The lines of the last whole picture on the alternate screen: one that fills it to the last column."""
        for picture in reversed(self.seen.split("\x1b[H")[1:]):
            lines = [_CONTROL.sub("", line) for line in picture.partition("\x1b[?1049l")[0].split("\r\n")]
            if len(lines) == self.height and len(lines[-1]) >= self.width:
                return lines
        return [""]

    @property
    def raw_mode(self):
        return termios.tcgetattr(self._terminal) != self.before

    @property
    def on_alternate_screen(self):
        return self.seen.rfind("\x1b[?1049h") > self.seen.rfind("\x1b[?1049l")

    @property
    def cursor_hidden(self):
        return self.seen.rfind("\x1b[?25l") > self.seen.rfind("\x1b[?25h")

    @property
    def as_found(self):
        return not (self.raw_mode or self.on_alternate_screen or self.cursor_hidden)

    def finish(self, timeout=30):
        """Read to the end; return the exit code and the text after the alternate screen was left."""
        deadline = time.monotonic() + timeout
        while self.child.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        code = self.child.wait(1)
        while self._read(0.1):
            pass
        return code, _CONTROL.sub("", self.seen.rpartition("\x1b[?1049l")[2]).replace("\r\n", "\n")

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self.control)
        os.close(self._terminal)


@pytest.fixture
def terminal():
    """Open terminals: terminal(argv, width=80, height=24, env=None). None outlives the test."""
    opened = []

    def open_(*arguments, **options):
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()
