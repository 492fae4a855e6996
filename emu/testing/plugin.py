"""The pytest plugin: the fixture `rss_delta`, for every project that has emu installed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from emu.testing.rss import RssDelta

__all__ = ["rss_delta"]


@pytest.fixture
def rss_delta() -> "Callable[[Any], RssDelta]":
    """Measure residency: `with rss_delta(buf) as d: ...; assert d.pages == 0`. See emu.testing.rss."""
    from emu.testing.rss import rss_delta as measure

    return measure
