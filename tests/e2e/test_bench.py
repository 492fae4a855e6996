"""emu bench as a shell sees it. Nothing here asserts a time."""

import json
import re
import subprocess
import sys

import pytest

from emu.bench.rows import ROWS

EMU = [sys.executable, "-m", "emu", "bench"]
FEW = ["touch-write", "buddy-bulk"]


def bench(*arguments):
    return subprocess.run([*EMU, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.uffd
@pytest.mark.inline
def test_rows_are_measured_beside_their_references_and_compared(tmp_path):
    """JSON with the fields that were agreed on; a comparison is about the rows that were asked for."""
    path = tmp_path / "old.json"
    done = bench(*FEW, "install", "discard-scattered", "--rounds", "3", "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert "touch-write" in done.stdout
    assert "x(" not in done.stdout
    result = json.loads(path.read_text())
    assert result["schema"] == "emu.bench/1"
    assert {"kernel", "cpu", "cpus"} <= result["environment"].keys()
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "touch-write",
        "touch-write-ahead",
        "buddy-bulk",
        "install-512",
        "discard-scattered",
        "discard-scattered+thread",
    }
    for row in rows.values():
        assert row["rounds"] == len(row["samples"]) == 3
        assert row["ours"] > 0
        assert row["better"] in ("lower", "higher")
        assert {"unit", "target", "spread", "interval", "service", "placement", "second_thread"} <= row.keys()
    assert rows["buddy-bulk"]["ratio"] is rows["buddy-bulk"]["reference"] is None
    assert rows["install-512"]["ratio"] > 0.1
    done = bench(*FEW, "--rounds", "3", "--compare", str(path), "--json")
    assert json.loads(done.stdout)["rows"][0]["name"] == "touch-write"
    done = bench(*FEW, "--rounds", "3", "--compare", str(path))
    assert done.returncode == 0
    assert "gone" not in done.stdout
    assert re.search(r"^touch-write +\S+ \[.* (same|better|worse) *$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuchrow"], "no row has 'nosuchrow'"),
        (["--rounds", "1"], "from 2 to 1000"),
        (["--rounds", "ten"], "isn't a whole number"),
        (["touch", "--compare", "/nonexistent"], "can't be read as a bench: No such file"),
        (["touch", "--compare", "/proc/self/status"], "isn't JSON"),
        (["touch", "-o", "/nonexistent/x.json"], "no folder /nonexistent"),
        (["touch", "-o", "/tmp"], "is a folder"),
        (["touch", "--transition", "1us"], "is for emu bench cmm2"),
        (["cmm2", "--transition", "fast"], "transition"),
        (["cmm2", "--transition", "300"], "needs a unit"),
        (["cmm2", "--transition", "0ns"], "more than nothing"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = bench(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_rows_open_measure_and_close(monkeypatch):
    """Each once, but for three that take long: a row that can't run is a row that nobody has looked at."""
    from emu.bench.reference import Reference
    from emu.bench.rows import guest
    from emu.bench.runner import run_row
    from emu.bench.stage import Stage

    monkeypatch.setattr(guest, "_RESIDENT", 64 << 20)
    monkeypatch.setattr(guest, "_WINDOW", 0.05)
    quick = [row for row in ROWS if not row.name.startswith(("discard-large", "fault-scaling", "report-pass"))]
    with Reference() as reference:
        stage = Stage(reference)
        for row in quick:
            result = run_row(row, stage, 1)
            assert result.error is None or "second core" in result.error or "can't be had" in result.error, row.name
            # what page states add is a difference of two times, which may be smaller than what disturbs them
            assert (
                result.error is not None
                or result.ours.median > 0
                or row.name in ("cmm2-page_fault1", "cmm2-grep", "cmm2-scattered")
            )
