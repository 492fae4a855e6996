"""emu compare, and the workloads over real files, from the command line."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

EMU = [sys.executable, "-m", "emu"]
CACHE = ["cache", "--ram", "96MiB", "--memory", "8MiB", "--hold", "100s", "--speed", "step"]


def emu(*words, **options):
    return subprocess.run([*EMU, *words], capture_output=True, text=True, timeout=110, check=False, **options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    rng = random.Random(3)
    for n in range(12):
        (root / f"f{n}").write_bytes(b"needle" + rng.randbytes(1_000_000 + n))
    return str(root)


def test_one_table_for_all_mechanisms(tree):
    """Phase by phase, then what each came to; a name may come twice with other settings."""
    chosen = [
        "none",
        "reporting",
        "reporting+dropcaches",
        "aging:seconds=20",
        "aging:seconds=60",
        "balloon:target=64MiB",
    ]
    done = emu("compare", *CACHE, "--path", tree, *(word for name in chosen for word in ("-m", name)))
    assert done.returncode == 0, done.stderr
    for name in chosen:
        assert len(re.findall(rf"^  {re.escape(name)} ", done.stdout, re.MULTILINE)) == 7  # once a phase
        assert re.search(rf"^{re.escape(name)} ", done.stdout, re.MULTILINE)
    assert "1 run each, in a process of its own" in done.stdout
    assert "again: " in done.stdout
    heads = done.stdout.splitlines()[0].split()
    assert heads == [
        "phase",
        "/",
        "mechanism",
        *["used", "cached", "per-CPU", "balloon", "free", "RSS", "footprint", "bloat", "read"],
    ] or ("per-CPU" not in heads)


def test_json_has_every_run_whole(tree):
    done = emu("compare", *CACHE, "--path", tree, "-m", "none", "-m", "aging", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "emu.compare/1"
    assert [row["label"] for row in result["rows"]] == ["none", "aging"]
    for row in result["rows"]:
        assert row["schema"] == "emu.run/1"
        assert row["corrupt_frames"] == 0
        assert row["machine"]["disks"][0].startswith(f"disk {tree} (")
        for phase in row["phases"]:
            sizes = ("used", "cached", "free", "pcp", "ballooned")
            assert sum(phase[f"guest_{name}_bytes"] for name in sizes) == row["ram_bytes"]
            assert sum(phase["stages"].values()) == row["ram_bytes"]
            assert {"from", "to", "bytes"} == set(phase["flows_since_start"][0])
    none, aging = result["rows"]
    assert aging["footprint_byte_seconds"] < none["footprint_byte_seconds"]
    assert aging["counters"]["disk_read_bytes"] > none["counters"]["disk_read_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache", "--path", "/nonexistent"], "isn't a directory"),
        (["cache", "--path", "TREE", "-m", "nonsense"], "'nonsense' isn't known"),
        (["cache", "--path", "TREE", "-m", "none", "-m", "none"], "named twice"),
        (["nonsense"], "nonsense"),
        (["cache", "--path", "TREE", "--live"], "--live isn't for a comparison"),
        (["cache", "--path", "TREE", "--working-set", "2"], "working set 2.0"),
        (["fio", "--reads", "5"], "reads 5.0"),
        (["cache", "--path", "TREE", "-m", "aging:seconds=0"], "aging seconds"),
        (["cache", "--path", "TREE", "-m", "balloon:keep=2"], "keep"),
        (["cache", "--path", "TREE", "--ram", "8MiB"], "memory 64 MiB is more than the RAM"),
        (["cache", "--path", "TREE", "--speed", "1e308"], "speed"),
    ],
)
def test_bad_input_is_exit_2_and_one_line(tree, words, said):
    done = emu(
        "compare", *(tree if word == "TREE" else word for word in words), *([] if "-m" in words else ["-m", "none"])
    )
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_guest_that_fails_under_one_is_said_and_is_exit_1():
    done = emu("compare", "memhog", "--size", "50MiB", "--ram", "64MiB", "--rounds", "2", "--speed", "step",
               "-m", "none", "-m", "balloon:target=40MiB,deflate_on_oom=no")  # fmt: skip
    assert done.returncode == 1
    assert "the guest failed under balloon:target=40MiB,deflate_on_oom=no" in done.stderr
    assert "(failed)" in done.stdout
    assert "was killed: the guest is out of memory" in done.stdout


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_gets_more_tables_and_whole_numbers(terminal, tree, width):
    words = [*EMU, "compare", *CACHE, "--path", tree, "-m", "none", "-m", "reporting+dropcaches:every=20,order=0"]
    t = terminal(words, width=width, env={"COLUMNS": str(width), "LINES": "50"})
    code, text = t.finish()
    assert code == 0
    lines = text.replace("\r", "\n").splitlines()
    lines = lines[lines.index(next(line for line in lines if line.startswith("phase"))) :]
    assert max(len(line.rstrip()) for line in lines) <= width
    numbers = [line for line in lines if line.startswith("none ")]
    assert numbers
    assert not any("…" in line for line in numbers)


def test_an_interrupt_ends_the_runs_too(tree):
    """130, and no child is left."""
    child = subprocess.Popen(
        [*EMU, "compare", "cache", "--path", tree, "--speed", "1", "-m", "none", "-m", "aging"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(3)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(20) == 130
    child.stderr.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(child.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize(
    "words",
    [
        ["grep", "--path", "TREE", "--pattern", "needle", "--hold", "5s"],
        ["build", "--jobs", "6", "--memory", "4MiB", "--hold", "40s"],
        ["fio", "--size", "8MiB", "--ops", "500", "--hold", "5s"],
    ],
)
def test_workloads_run_and_leave_nothing(tree, tmp_path, words):
    """The table has their rows, the stages, what flowed, and the disk."""
    done = emu("run", *(tree if word == "TREE" else word for word in words), "--ram", "128MiB", "--speed", "step",
               env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MiB by stage" in done.stdout
    assert re.search(r"^until .*: free -> ", done.stdout, re.MULTILINE)
    assert re.search(r"frames checked, 0 wrong", done.stdout)
    assert re.search(r"^disk .*MiB read, ", done.stdout, re.MULTILINE)
    if words[0] == "grep":
        assert re.search(r"^12(\.00)? matches: of 'needle'", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.uffd
@pytest.mark.inline
def test_what_a_guest_says_of_its_pages_is_counted_priced_and_shown(tree):
    """A grep leaves nearly all of the cache volatile; the host takes, and no page of the guest's is handled for it."""
    words = ["grep", "--path", tree, "--ram", "96MiB", "--memory", "4MiB", "--hold", "9s", "--speed", "step"]
    done = emu("compare", *words, "-m", "reporting:order=0", "-m", "cmm2:max=8MiB", "-m", "swap", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    reporting, cmm2, swap = result["rows"]
    boot, grep, after = (phase["usages"] for phase in cmm2["phases"][:3])
    assert boot["S"] == {"r": 1024, "p": 0, "z": 0}
    assert sum(n for held in grep.values() for n in held.values()) == 96 * 256
    pages = 12 * 245
    assert grep["V"] == {"r": pages, "p": 0, "z": 0}
    assert grep["V"]["r"] / sum(held["r"] for held in grep.values()) >= 0.7
    assert after["V"]["z"] > 1000
    assert after["V"]["r"] + after["V"]["z"] == pages
    counters = cmm2["counters"]
    assert counters["usage_said"] - counters["said_other"] == counters["said_alloc"] + counters["said_read"] + (
        counters["said_lookup"] + counters["said_put"]
    )
    prices, by_hooks = result["prices"], counters["usage_said"] - counters["said_other"]
    native = (
        counters["guest_pgaccess"] * prices["read"]
        + counters["guest_pgfault"] * prices["fault"]
        + counters["guest_pgfree"] * prices["free"]
        + counters["guest_pgpgin"] // 4 * prices["fill"]
    )
    assert cmm2["said_share"] == pytest.approx(by_hooks * prices["transition"] / native)
    assert "usage_said" not in reporting["counters"]
    assert reporting["phases"][0]["usages"] is None
    assert any("nothing was swapped" in note for note in swap["notes"])
    text = emu("compare", *words, "-m", "cmm2:max=8MiB", "-m", "reporting:order=0").stdout.splitlines()
    head = next(i for i, line in enumerate(text) if line.startswith("over the run") and "worked" in line)
    totals = {line.split()[0]: line.split() for line in text[head + 1 : head + 3]}
    columns = re.split(r"\s+", text[head].replace("over the run", "run").replace("of native", "of_native"))
    worked = columns.index("worked")
    assert totals["cmm2:max=8MiB"][worked] == "0"
    assert int(totals["reporting:order=0"][worked].replace(",", "")) > 10_000
    assert totals["cmm2:max=8MiB"][columns.index("of_native")].startswith("~")


@pytest.mark.uffd
@pytest.mark.inline
def test_the_table_of_states_is_in_the_shape_of_the_patches(tree):
    done = emu("run", "grep", "--path", tree, "--ram", "96MiB", "--memory", "4MiB", "--hold", "0", "-m", "cmm2")
    assert done.returncode == 0, done.stderr
    head = next(line for line in done.stdout.splitlines() if line.startswith("4 KiB pages by state"))
    assert head.split()[5:] == ["Sr", "Sp", "Sz", "Ur", "Uz", "Pr", "Vr", "Vz", "resident", "Vr", "/", "resident"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("pass 1") and line.endswith("%"))
    assert row.split()[-11:] == ["1,024", "0", "0", "0", "20,612", "0", "2,940", "0", "3,964", "74.2", "%"]
    assert "transitions (" in done.stdout
