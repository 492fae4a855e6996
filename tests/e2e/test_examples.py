"""Every example runs, is short, and prints what its header says."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


def test_there_are_examples():
    """The folder is found."""
    assert len(EXAMPLES) >= 4


@pytest.mark.uffd
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_its_header_says(path):
    """The indented block at the end of the docstring, to the letter."""
    source = path.read_text()
    assert len(source.splitlines()) < 80
    header = ast.get_docstring(ast.parse(source), clean=False)
    _, _, block = header.partition("Prints")
    expected = textwrap.dedent(block.partition("\n\n")[2]).strip("\n").replace("\\\\", "\\")
    environment = {key: value for key, value in os.environ.items() if key != "EMU_DISABLE"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert [line.rstrip() for line in textwrap.dedent(done.stdout).strip("\n").splitlines()] == expected.splitlines()


def test_the_example_test_is_one():
    """Example 4 is a pytest file, too."""
    path = next(path for path in EXAMPLES if path.stem.startswith("04"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
