"""guest.readahead: windows as mm/readahead.c makes them, in literal pages."""

import pytest

from emu.guest.readahead import IO_PAGES, RA_PAGES, ReadaheadState, Window, next_window


def ask(ra, index, wanted, *, marked=False, cached=lambda first, n: 0, before=lambda last, n: 0):
    return next_window(ra, index, wanted, marked=marked, cached=cached, cached_before=before)


@pytest.mark.parametrize(
    ("wanted", "window"),
    [
        # get_init_ra_size(): up to max/32 fourfold, up to max/4 twofold, else max; the marker after what was wanted
        (1, Window(0, 4, 3)),
        (2, Window(0, 4, 2)),
        (4, Window(0, 8, 4)),
        (8, Window(0, 16, 8)),
        (16, Window(0, 32, 16)),
        (32, Window(0, 32, 16)),
    ],
)
def test_the_first_window_follows_from_the_first_read(wanted, window):
    assert ask(ReadaheadState(), 0, wanted) == window


def test_a_stream_grows_to_128_kib():
    """4, 8, 16, 32, 32 pages, each asked for at the marker of the one before."""
    ra = ReadaheadState()
    windows = [ask(ra, 0, 1)]
    for _ in range(4):
        last = windows[-1]
        windows.append(ask(ra, last.start + last.count - last.marker, 1, marked=True))
    assert windows == [Window(0, 4, 3), Window(4, 8, 8), Window(12, 16, 16), Window(28, 32, 32), Window(60, 32, 32)]
    assert RA_PAGES == 32


def test_a_small_random_read_is_read_as_it_is():
    """And leaves the state alone."""
    ra = ReadaheadState(start=4, size=8, async_size=8, prev_pos=5 * 4096)
    assert ask(ra, 1000, 2) == Window(1000, 2, 0)
    assert (ra.start, ra.size, ra.async_size) == (4, 8, 8)


def test_what_goes_on_where_the_last_read_ended_is_a_stream():
    ra = ReadaheadState(prev_pos=1000 * 4096)
    assert ask(ra, 1000, 1) == Window(1000, 4, 3)


def test_the_first_read_of_a_file_at_page_1_is_no_stream():
    """prev_pos is -1 before any read: the difference is huge, and not 1."""
    assert ask(ReadaheadState(), 1, 1) == Window(1, 1, 0)


def test_a_large_read_is_one_request_up_to_the_disks_limit():
    """bdi->io_pages: 1,280 KiB."""
    assert ask(ReadaheadState(), 0, 256) == Window(0, 256, 128)
    ra = ReadaheadState()
    window = ask(ra, 5000, 300)
    assert (window.start, window.count) == (5000, 300)
    assert ask(ReadaheadState(), 0, 10_000).count == IO_PAGES == 320


def test_a_stream_is_guessed_from_the_pages_before_it():
    """try_context_readahead(): longer than the read; counted twice where it reaches the file's start."""
    ra = ReadaheadState()
    assert ask(ra, 100, 2, before=lambda last, n: 10) == Window(100, 12, 1)
    assert ask(ReadaheadState(), 8, 2, before=lambda last, n: 8) == Window(8, 18, 1)
    assert ask(ReadaheadState(), 100, 4, before=lambda last, n: 4) == Window(100, 4, 0)


def test_anothers_marker_begins_at_the_next_gap():
    """Interleaved streams: the state knows nothing of this place."""
    ra = ReadaheadState(start=500, size=8, async_size=8)
    assert ask(ra, 40, 1, marked=True, cached=lambda first, n: 6) == Window(47, 16, 16)
    assert ask(ReadaheadState(start=500), 40, 1, marked=True, cached=lambda first, n: n) is None
