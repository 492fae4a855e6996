"""emu.mechanisms: names, settings, and the template."""

import pytest

from emu.clock import StepClock
from emu.errors import BadValue
from emu.machine import Machine
from emu.mechanisms import MECHANISMS, make_mechanism, settings_of
from emu.mechanisms._template import Eager


def test_a_mechanism_is_a_name_with_settings():
    """Aliases, too; times as text."""
    assert settings_of(make_mechanism("reporting")) == {
        "order": 9,
        "delay": 2.0,
        "poison": None,
        "assigned_device": False,
    }
    mechanism = make_mechanism("fpr:order=0,delay=250ms,poison=0xaa,assigned_device=yes")
    assert settings_of(mechanism) == {"order": 0, "delay": 0.25, "poison": 0xAA, "assigned_device": True}
    assert make_mechanism("none").name == "none"
    assert {"none", "reporting"} <= set(MECHANISMS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("magic", "'magic' isn't known"),
        ("none:x=1", "it has none"),
        ("reporting:order", "'order'"),
        ("reporting:order=", "0 to 10"),
        ("reporting:assigned_device=maybe", "yes or no"),
        ("", "''"),
    ],
)
def test_what_is_not_known_is_refused(text, words):
    """With what is."""
    with pytest.raises(BadValue, match=words):
        make_mechanism(text)


@pytest.mark.parametrize("text", ["reporting:order=11", "reporting:delay=99999", "reporting:poison=256"])
def test_settings_out_of_range_are_refused_and_nothing_stays_open(text):
    """When the machine is made."""
    with pytest.raises(BadValue):
        Machine("16MiB", text, clock=StepClock())


def test_the_template_works_as_it_stands():
    """What a user copies gives memory back."""
    with Machine("128MiB", Eager(period=3), clock=StepClock(), uffd="off") as m:
        memory = m.guest.spawn("a").mmap("32MiB")
        memory.touch()
        memory.munmap()
        m.guest.drain_pages()
        m.run_for(2.9)
        assert m.rss_bytes == 32 << 20
        m.run_for(0.2)
        assert m.rss_bytes == 0
