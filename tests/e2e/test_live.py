"""emu run --live on a real terminal, and in a pipe."""

import re
import signal
import subprocess
import sys
import time

import pytest

EMU = [sys.executable, "-m", "emu"]
RUN = [*EMU, "run", "memhog", "--live", "--size", "32MiB", "--ram", "128MiB"]
SHORT = [*RUN, "--rounds", "1", "--hold", "3s"]
LONG = [*RUN, "--rounds", "1000"]


def running(t):
    return len(t.frame) >= 5 and "q quit" in t.frame[-1]


def map_of(t):
    return "".join(line.split(" │ ")[0] for line in t.frame[3:] if " │ " in line)


def guest_time(t):
    minutes, seconds = re.search(r" t (\d+):(\d\d\.\d) ", t.frame[0]).groups()
    return int(minutes) * 60 + float(seconds)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (200, 60)])
def test_the_last_picture_and_the_table_agree_to_the_digit(terminal, width, height):
    """It stays until q; then the terminal is as it was found, and the table is printed."""
    t = terminal(SHORT, width=width, height=height)
    t.wait_for(lambda t: "ended: q leaves" in t.frame[-1])
    assert t.raw_mode
    assert t.on_alternate_screen
    frame = t.frame
    assert len(frame) == height
    assert all(len(line) <= width for line in frame)
    t.type("q")
    code, after = t.finish()
    assert code == 0
    assert t.as_found
    rss, footprint, used = re.search(r"MiB: RSS (\S+) .*footprint (\S+)  used (\S+)", frame[1]).groups()
    last = next(line for line in after.splitlines() if line.startswith("lists drained")).split()
    assert last[-4:-1] == [used, rss, footprint]
    assert f" t {last[-5]} " in frame[0]
    assert "RSS minus our books: 0" in " ".join(after.split())
    assert "  books 0" in frame[1]
    passes, reports = re.search(r"passes (\d+), reports (\d+)", "\n".join(frame)).groups()
    assert int(passes) > 0
    assert int(reports) > 0


def test_the_map_changes_as_the_guest_works(terminal):
    """Anonymous, then free or on the lists, then gone."""
    t = terminal([*SHORT, "--speed", "2"], width=100, height=30)
    for letters in ("A", "FfPp"):
        t.wait_for(lambda t, letters=letters: running(t) and set(letters) & set(map_of(t)))
    t.type("q")
    assert t.finish()[0] == 0


def test_keys(terminal):
    """Pause, speed, one pass, mechanism, help, and a quit that prints the rows so far."""
    t = terminal([*LONG, "--hold", "60s"], width=100, height=30)
    t.wait_for(running)
    t.type(" ")
    t.wait_for(lambda t: t.frame[0].rstrip().endswith("paused"))
    stands = guest_time(t)
    t.type("?")
    t.wait_for(lambda t: any("this page" in line for line in t.frame))
    t.type("?")
    time.sleep(0.5)
    t.wait_for(running)
    assert guest_time(t) == stands
    t.type("+")
    t.wait_for(lambda t: "x20" in t.frame[0])
    t.type("-")
    t.wait_for(lambda t: "x10" in t.frame[0])
    t.type(" ")
    t.wait_for(lambda t: t.frame[0].rstrip().endswith("running") and guest_time(t) > stands)
    t.wait_for(lambda t: any("1: freed" in line for line in t.frame))
    t.type(" ")
    t.wait_for(lambda t: t.frame[0].rstrip().endswith("paused"))
    passes = int(re.search(r"passes (\d+)", "\n".join(t.frame))[1])
    t.type("s")
    t.wait_for(lambda t: f"passes {passes + 1}," in "\n".join(t.frame) and t.frame[0].rstrip().endswith("paused"))
    t.type(" ")
    t.wait_for(lambda t: running(t) and t.frame[0].rstrip().endswith("running"))
    t.type("m")
    t.wait_for(lambda t: any("mechanism: none" in line for line in t.frame))
    t.type("s")
    t.wait_for(lambda t: "none makes no passes" in t.frame[-1])
    t.type(" ")
    t.wait_for(lambda t: t.frame[0].rstrip().endswith("paused"))
    rss, footprint, used = re.search(r"RSS (\S+) .*footprint (\S+)  used (\S+)", t.frame[1]).groups()
    t.type("q")
    code, after = t.finish()
    assert code == 0
    stopped = re.search(r"^stopped +(.*)$", after, re.MULTILINE)[1].split()
    assert stopped[1:3] == [used, rss]
    assert stopped[3] == footprint
    assert "the mechanism was switched during the run, at last to none" in " ".join(after.split())
    assert not t.raw_mode


def test_a_resized_terminal_is_filled_again(terminal):
    t = terminal([*LONG, "--hold", "60s"])
    t.wait_for(running)
    for width, height in ((120, 40), (60, 16)):
        t.resize(width, height)
        t.wait_for(lambda t, width=width, height=height: len(t.frame) == height and len(t.frame[0]) == width)
    t.type("q")
    assert t.finish()[0] == 0


@pytest.mark.parametrize(("send", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_gives_the_terminal_back(terminal, send, code):
    t = terminal(LONG)
    t.wait_for(running)
    t.child.send_signal(send)
    assert t.finish()[0] == code
    assert t.as_found
    assert "Traceback" not in t.seen


def test_an_exception_gives_the_terminal_back(terminal):
    """A bug in the view itself."""
    code = (
        "import sys, emu.cli.live as live, emu.cli.app as app\n"
        "real = live.compose\n"
        "def compose(state, width, height):\n"
        "    if state.looks > 3: raise RuntimeError('a bug')\n"
        "    return real(state, width, height)\n"
        "live.compose = compose\n"
        f"sys.exit(app.main({LONG[3:]!r}))"
    )
    t = terminal([sys.executable, "-c", code])
    code, after = t.finish()
    assert code == 1
    assert "RuntimeError: a bug" in after
    assert t.as_found


def test_it_reads_without_colour_and_without_unicode(terminal):
    t = terminal([*LONG, "--hold", "60s"], env={"NO_COLOR": "1", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    t.wait_for(running)
    assert "\n".join(t.frame).isascii()
    assert not re.search(r"\x1b\[(3|4|9)\d", t.seen)
    t.type("q")
    assert t.finish()[0] == 0


def test_a_pipe_gets_plain_lines():
    """And a dumb terminal; then the table as always."""
    done = subprocess.run(SHORT, capture_output=True, text=True, timeout=120, check=True)
    assert "\x1b" not in done.stdout
    assert re.search(r"^t +0:\d\d\.\d  RSS +\S+  used +\S+ .* books 0 ", done.stdout, re.MULTILINE)
    assert "-- 1: freed" in done.stdout
    assert "\nphase " in done.stdout


def test_live_and_json_are_refused_together():
    done = subprocess.run([*SHORT, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "emu: --live draws where --json prints: give one of the two\n"
