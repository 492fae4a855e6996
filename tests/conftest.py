"""Shared set-up: hypothesis profiles, skips with a reason, and a check that not everything was skipped."""

import signal

import hypothesis
import pytest

import emu
from emu._native import disabled
from emu.residency import scan
from emu.uffd import Features, Rung, probe

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, print_blob=True)
hypothesis.settings.register_profile("storm", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm", action="store_true", help="run the long storms, too")
    parser.addoption("--require-uffd", action="store_true", help="no userfaultfd at all is an error, not skips")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--storm"):
        hypothesis.settings.load_profile("storm")
    # what a shell runs in the background ignores these, and so would every command that is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    can = probe()
    for item in items:
        if item.get_closest_marker("storm") and not config.getoption("--storm"):
            item.add_marker(pytest.mark.skip(reason="long; run with --storm"))
        if item.get_closest_marker("uffd") and can.rung is Rung.OFF:
            if config.getoption("--require-uffd"):
                raise pytest.UsageError(f"all userfaultfd tests would be skipped: {can.why}")
            item.add_marker(pytest.mark.skip(reason=f"no userfaultfd here: {can.why}"))
        if item.get_closest_marker("inline") and (Features.SIGBUS not in can.features or "sigbus" in disabled()):
            item.add_marker(pytest.mark.skip(reason="no UFFD_FEATURE_SIGBUS here"))
        if item.get_closest_marker("pagemap_scan") and scan(0, 4096) is None:
            item.add_marker(pytest.mark.skip(reason="no PAGEMAP_SCAN here (Linux 6.7)"))


@pytest.fixture(
    params=[
        pytest.param("inline", marks=[pytest.mark.uffd, pytest.mark.inline]),
        pytest.param("thread", marks=pytest.mark.uffd),
        "off",
    ]
)
def service(request: pytest.FixtureRequest) -> str:
    """Each fault service; "off" is no userfaultfd at all."""
    return str(request.param)


@pytest.fixture
def open_ram(service: str):
    """Open guest RAMs with the parametrised service; all are closed at the end."""
    opened = []

    def open_(size: "int | str", **options: object) -> emu.GuestRam:
        where = {"uffd": "off"} if service == "off" else {"service": service}
        ram = emu.GuestRam(size, **where, **options)
        opened.append(ram)
        return ram

    yield open_
    for ram in opened:
        ram.close()
