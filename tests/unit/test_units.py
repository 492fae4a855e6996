"""emu.units: sizes and times in, text out."""

import pytest

from emu.errors import BadValue
from emu.units import format_size, parse_duration, parse_ram_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("512M", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2TiB", 2 << 40),
        ("2kB", 2000),
        ("3GB", 3_000_000_000),
        ("0", 0),
    ],
)
def test_a_size_is_bytes_or_text(text, size):
    """Binary units are powers of 1024, SI ones of 1000."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "5x", "-1", "1..5M", "1e9", "0.3", "½G", None, 1.5, True, b"1M"])
def test_what_is_not_a_size_is_refused_by_name(text):
    """The message repeats the value."""
    with pytest.raises(BadValue, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "at least one frame"),
        (4097, "multiple of the frame size, 4096"),
        ("65TiB", "at most 64 TiB"),
        (1 << 80, "address space"),
        (-4096, "negative"),
    ],
)
def test_a_ram_size_names_its_limit(value, words):
    """Size 0, part frames and more than the address space each say what is allowed."""
    with pytest.raises(BadValue, match=words):
        parse_ram_size(value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), (2, 2.0), ("2", 2.0), ("1m", 60.0), ("0", 0.0), ("5us", 5e-6)]
)
def test_a_time_is_seconds_or_text(text, seconds):
    """Units as users write them."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1", -1, float("nan"), float("inf"), "1y", None, True])
def test_what_is_not_a_time_is_refused(text):
    """NaN and infinity, too: a timer would never be due."""
    with pytest.raises(BadValue):
        parse_duration(text)


def test_sizes_print_exactly_when_they_are_short():
    """One decimal otherwise."""
    assert [format_size(n) for n in (0, 1023, 4096, 512 << 20, 3 << 29, -4096)] == [
        "0 B",
        "1023 B",
        "4 KiB",
        "512 MiB",
        "1.5 GiB",
        "-4 KiB",
    ]
