"""What `emu bench cmm2` counts: exact numbers where the rule gives them, the same every time, and true of the code."""

import re
from pathlib import Path

import pytest

from emu import _native
from emu._native import disabled
from emu.bench import cmm2
from emu.bench.prices import Prices
from emu.frames import Cause, Usage

CSRC = Path(_native.__file__).parent / "csrc"
S, U, V = Usage.STABLE, Usage.UNUSED, Usage.VOLATILE


def test_the_hooks_are_those_of_the_code():
    """Each function of the guest's kernel that says something, and each cause, is in the list, and no other."""
    found = {}
    for name in ("memmap.c", "page_states.c", "pagecache.c", "lru.c"):
        text = (CSRC / name).read_text()
        for match in re.finditer(r"^[a-z].*?\b(\w+)\([^;{]*\)\n\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            causes = set(re.findall(r"EMU_CAUSE_(\w+)", match[2])) - {"OTHER"}
            if causes:
                found[match[1]] = causes
    # what frees pages does so for its caller; a lookup says for which of its callers it is, and undoes a step too many
    found["emu_pages_release"] = found.pop("emu_pages_freed")
    found["emu_space_lookup"] -= {"PUT"}
    filemap = (CSRC.parent / "guest" / "filemap.py").read_text()
    found["emu_space_lookup"] |= set(re.findall(r"Cause\.(\w+)", filemap))
    assert found == {name: {cause.name for cause in causes} for name, causes in cmm2.HOOKS.items()}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for number in range(40):
        (tree / f"f{number:02}").write_bytes(bytes([number + 1]) * (number * 1000 + 1))
    return {form: {work.workload: work for work in cmm2.count(tree, form)} for form in cmm2.FORMS}, tree


@pytest.mark.uffd
@pytest.mark.inline
@pytest.mark.skipif("wp" in disabled() and "move" in disabled(), reason="nothing leaves a running guest here")
def test_counts_are_what_the_rules_say(counted):
    forms, tree = counted
    for form, works in forms.items():
        faults = works["page_fault1"]
        assert faults.faults == faults.frees == 98304 == 16384 * 6  # four iterations, and two that are checked
        assert faults.said == {(Cause.FREE, S, U): 98304, (Cause.ALLOC, U, S): 98304}
        again = works["grep, cached"]
        pages = sum(-(-(n * 1000 + 1) // 4096) for n in range(40))
        assert again.reads == works["grep"].fills == pages
        assert again.fills == 0
        light = form == "cmm2-light"
        assert again.said == ({} if light else {(Cause.LOOKUP, V, S): pages, (Cause.PUT, S, V): pages})
        kinds = works["grep"].said
        assert kinds[Cause.ALLOC, U, S] == pages
        assert kinds.get((Cause.READ, S, V), 0) == (0 if light else pages)
    # each of the compiler's pages that is mapped: stable and volatile again, but for the variant that says nothing
    build, minor = forms["cmm2"]["build"], forms["cmm2:minor=yes"]["build"]
    mapped = build.said[Cause.MAP, V, S]
    assert mapped == 30 * (8 << 20) // 4096
    assert build.total - minor.total == 2 * mapped
    assert forms["cmm2:dirty=mapping"]["mapped writes"].total < forms["cmm2"]["mapped writes"].total
    assert cmm2.count(tree, "cmm2")[3] == build  # the same every time


def test_a_share_is_of_the_native_work():
    work = cmm2.Work("w", "cmm2", 100, 10, 4, 5, 0, 2, said={(Cause.PUT, S, V): 50})
    prices = Prices(fault=1000, free=100, map=30, read=200, fill=3000, transition=10, in_a_row=1)
    assert work.native(prices) == 100 * 200 + 6 * 1000 + 4 * 30 + 5 * 100 + 2 * 3000
    assert work.share(10, prices) == 500 / work.native(prices)
    counters = {"guest_pgaccess": 100, "guest_pgfault": 10, "guest_filemap_map_pages": 4, "guest_pgfree": 5}
    counters["guest_pgpgin"] = 8
    assert prices.native(counters) == work.native(prices)
    assert work.per_thousand(23) == 200
