"""The command line as a shell sees it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

EMU = [sys.executable, "-m", "emu"]


def emu(*arguments, **options):
    return subprocess.run([*EMU, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


BIG = ["--size", "256MiB", "--ram", "512MiB", "--speed", "step"]
QUICK = ["--ram", "128MiB", "--speed", "step"]


def test_memhog_ends_with_a_table_whose_rss_rises_and_falls():
    """RSS by what was touched, exactly; at the end under 1 % of the peak plus the per-CPU lists."""
    done = emu("run", "memhog", *BIG, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "emu.run/1"
    rows = {row["name"]: row for row in result["phases"]}
    assert list(rows) == [
        "boot",
        "1: touched 256 MiB",
        "1: freed",
        "1: freed, 40 s later",
        "2: touched 256 MiB",
        "2: freed",
        "2: freed, 40 s later",
        "lists drained, 40 s later",
    ]
    assert rows["boot"]["rss_bytes"] == 0
    assert rows["1: touched 256 MiB"]["rss_bytes"] == 256 << 20
    assert rows["1: freed"]["rss_bytes"] == 256 << 20
    assert rows["lists drained, 40 s later"]["rss_bytes"] == 0
    last = rows["2: freed, 40 s later"]
    assert last["rss_bytes"] <= (256 << 20) // 100 + last["guest_pcp_bytes"]
    assert result["verified_frames"] == 2 * 65536
    assert result["corrupt_frames"] == 0
    assert result["books_difference_bytes"] == 0
    assert result["counters"]["discard_frames"] > 65536
    for key in ("workload", "mechanism", "settings", "seed", "speed", "ram_bytes", "environment", "bloat"):
        assert key in result
    assert result["footprint_byte_seconds"] > 0


def test_none_stays_at_the_peak():
    """-m none."""
    done = emu("run", "memhog", "-m", "none", "--size", "64MiB", *QUICK, "--json")
    assert [row["rss_bytes"] >> 20 for row in json.loads(done.stdout)["phases"]] == [0] + [64] * 7


def test_the_table_says_what_was_measured_and_how():
    """Kernel, rung, service, seed, clock, rounds and the command."""
    done = emu("run", "memhog", "--size", "16MiB", *QUICK, "--rounds", "1")
    assert done.returncode == 0
    out = done.stdout
    assert re.search(r"^1: touched 16 MiB +0:00.0 +16.0 +16.0 +16.\d +1.0\d$", out, re.MULTILINE), out
    for words in ("mechanism reporting", "clock step", "seed 1", "Linux ", "userfaultfd", "RSS minus our books: 0"):
        assert words in out
    assert re.search(r"again: (EMU_DISABLE=\S+ )?python -m emu run memhog --size 16MiB", out)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines()[:6])) <= 80
    assert done.stderr == ""


def test_load_proves_every_file(tmp_path):
    """Read, freed, faulted back, and compared by SHA-256."""
    for i, size in enumerate((0, 1, 4095, 4096, 4097, 1 << 20, 5_000_000)):
        (tmp_path / f"d{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"d{i % 2}" / f"f{i}").write_bytes(os.urandom(size))
    (tmp_path / "link").symlink_to("d0")
    os.mkfifo(tmp_path / "fifo")
    done = emu("run", "load", "--path", str(tmp_path), *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["corrupt_frames"] == 0
    assert result["verified_frames"] == 0 + 1 + 1 + 1 + 2 + 256 + 1221
    names = [row["name"] for row in result["phases"]]
    assert names[1].startswith("read 7 files")
    assert "verified 7 by SHA-256" in names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run memhog --size 0", "is 0"),
        ("run memhog --size 4097", "multiple of the frame size"),
        ("run memhog --size 100TiB", "address space"),
        ("run memhog --size lots", "isn't a size"),
        ("run memhog --size 2GiB", "larger than the RAM, 1GiB"),
        ("run memhog --ram 0", "is 0"),
        ("run memhog -m magic", "none, reporting"),
        ("run memhog -m reporting:speed=3", "order=..., delay=..."),
        ("run memhog -m reporting:order=11", "0 to 10"),
        ("run memhog -m reporting:order=x", "0 to 10"),
        ("run memhog -m reporting:delay=-2", "isn't a time"),
        ("run memhog -m reporting:delay=2h", "0 to 3600"),
        ("run memhog -m reporting:poison=300", "isn't a byte"),
        ("run memhog --return never", "now, grace:SECONDS, lazy"),
        ("run memhog --rounds 0", "from 1 to"),
        ("run memhog --rounds x", "rounds"),
        ("run memhog --rounds 1.5", "isn't a whole number"),
        ("run memhog --seed 1.9", "isn't a whole number"),
        ("run memhog --size -5MiB", "isn't a size"),
        ("run memhog extra", "extra"),
        ("run memhog --ram 64TiB --size 4KiB", "less than 8 TiB"),
        ("run load --path=", "is empty"),
        ("run memhog --speed 0", "from 0.001 to 1000000"),
        ("run memhog --disable magic", "known are"),
        ("run memhog --frobnicate", "frobnicate"),
        ("run load", "path"),
        ("run load --path /does/not/exist", "No such file"),
        ("run nonsense", "nonsense"),
        ("nonsense", "nonsense"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_2(arguments, words):
    """Naming the value and the limit; nothing on stdout."""
    done = emu(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("emu: ")
    assert words in done.stderr


def test_a_run_that_fails_is_exit_1():
    """Out of memory in the guest: said, not a traceback."""
    done = emu("run", "memhog", "--size", "128MiB", *QUICK)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "was killed: the guest is out of memory" in done.stderr
    assert "--ram" in done.stderr
    assert re.search(r"^failed +0:00.0", done.stdout, re.MULTILINE)
    done = emu("run", "memhog", "--size", "128MiB", *QUICK, "--json")
    assert done.returncode == 1
    assert "was killed" in json.loads(done.stdout)["error"]


def test_what_keeps_memory_resident_is_said():
    """A small zone, poison, an assigned device."""
    small = emu("run", "memhog", "--size", "32MiB", "--ram", "64MiB", "--speed", "step", "--json")
    assert any("low watermark + 64 MiB" in note for note in json.loads(small.stdout)["notes"])
    held = emu("run", "memhog", *BIG, "-m", "reporting:assigned_device=yes", "--json")
    assert any("assigned device" in note for note in json.loads(held.stdout)["notes"])


def test_a_reader_that_goes_away_and_a_full_disk():
    """128 + SIGPIPE as a filter, and one line."""
    command = f"{' '.join(EMU)} run memhog --size 8MiB --ram 64MiB --speed step"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() in ("141", "0")
    assert done.stderr == ""
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["emu: [Errno 28] No space left on device"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_columns_not_digits(terminal, width):
    """No line of the table is longer than the terminal, and numbers stay whole."""
    t = terminal(
        [*EMU, "run", "memhog", "--size=16MiB", "--ram=64MiB", "--rounds=1", "--speed=step"],
        width=width,
        env={"COLUMNS": str(width), "LINES": "24"},
    )
    code, text = t.finish()
    assert code == 0
    text = text.replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert max(map(len, lines[lines.index(next(line for line in lines if line.startswith("phase"))) :])) <= width
    assert any(re.match(r"1: touched 16 MiB +.*\b16\.0\b", line) for line in lines)
    assert any(line.startswith("phase") and "footprint" in line for line in lines) == (width >= 60)


@pytest.mark.parametrize("send", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_restores_the_terminal_and_leaves_nothing(terminal, send):
    """Ctrl-C is 130, SIGTERM 143; the cursor is shown again."""
    t = terminal([*EMU, "run", "memhog", "--size", "64MiB", "--ram", "128MiB", "--rounds", "1000"])
    t.wait_for(lambda t: "guest uses" in t.seen)
    t.child.send_signal(send)
    assert t.finish()[0] == {signal.SIGINT: 130, signal.SIGTERM: 143}[send], t.seen
    assert t.seen.rfind("\x1b[?25h") > t.seen.rfind("\x1b[?25l"), "the cursor is hidden"
    assert "Traceback" not in t.seen
    # nobody of its session is left
    assert not [
        pid
        for pid in os.listdir("/proc")
        if pid.isdigit() and int(pid) != t.child.pid and _session(int(pid)) == t.child.pid
    ]


def _session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_doctor_says_what_it_tried():
    """As text and as JSON; with everything off it still works and says so."""
    done = emu("doctor")
    assert done.returncode == 0
    assert "mechanism reporting" in done.stdout
    result = json.loads(emu("doctor", "--json").stdout)
    assert result["schema"] == "emu.doctor/1"
    assert result["environment"]["uffd_rung"] in ("off", "user", "full")
    off = json.loads(emu("doctor", "--json", env=os.environ | {"EMU_DISABLE": "uffd,process_madvise"}).stdout)
    checks = {check["name"]: check for check in off["checks"]}
    assert not checks["userfaultfd"]["ok"]
    assert checks["userfaultfd"]["instead"]
    assert not checks["process_madvise on ourselves"]["ok"]
    assert checks["mechanism reporting"]["ok"]
    assert checks["mechanism none"]["ok"]


def test_without_userfaultfd_reporting_still_works():
    """EMU_DISABLE=uffd: the kernel zero-fills, discard gives back, the books still agree."""
    done = emu("run", "memhog", *BIG, "--json", env=os.environ | {"EMU_DISABLE": "uffd"})
    result = json.loads(done.stdout)
    assert result["machine"]["uffd"] == "off"
    last = result["phases"][-2]
    assert last["rss_bytes"] <= (256 << 20) // 100 + last["guest_pcp_bytes"]
    assert result["books_difference_bytes"] == 0
    assert result["corrupt_frames"] == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["run", "memhog", "--help"], ["doctor", "--help"]]
)
def test_every_verb_has_help(arguments):
    """On stdout, exit 0."""
    done = emu(*arguments)
    assert done.returncode == 0
    assert len(done.stdout) > 100


def test_importing_emu_is_light():
    """Neither the CLI's libraries nor the reporters' come with it."""
    code = (
        "import sys, emu; print([m for m in ('rich', 'cyclopts', 'pydantic', 'numpy', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
