"""What a gate's max may be below a cgroup's limit: memory without a charge, and charge without memory."""

import pytest

from emu.fleet import ceiling
from emu.fleet.ceiling import Ceiling
from emu.gate import GateSlot
from emu.host.cgroup import MemoryLimit

MIB = 1 << 20


class Gate:
    """Charges as a test wants them."""

    def __init__(self):
        self.charged = {}

    def slot(self, slot):
        return GateSlot(self.charged.get(slot, 0), 0, 0.0, 0)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """gate, memory by pid, and what the cgroup uses; meanwhile() runs between both looks."""

    class World:
        used = 0
        limit = 1024 * MIB

        def __init__(self):
            self.gate = Gate()
            self.memory = {}

        def meanwhile(self):
            pass

    world = World()

    def limits():
        world.meanwhile()
        return (MemoryLimit(tmp_path, world.limit, world.used),)

    monkeypatch.setattr(ceiling, "memory_limits", limits)
    monkeypatch.setattr(ceiling, "_anonymous", lambda pid: world.memory.get(pid, 0))
    return world


def test_what_others_use_is_taken_off(world):
    """1024 - 16 - 20 spare; 70 of the interpreters, 200 of somebody else."""
    top = Ceiling(world.gate, 20 * MIB)
    world.memory = {11: 40 * MIB, 12: 30 * MIB}
    world.used = 270 * MIB
    assert top.most({0: 11, 1: 12}) == (1024 - 16 - 20 - 270) * MIB
    # the same max while the guests take memory
    world.gate.charged = {0: 100 * MIB, 1: 50 * MIB}
    world.memory = {11: 140 * MIB, 12: 80 * MIB}
    world.used = 420 * MIB
    assert top.most({0: 11, 1: 12}) == (1024 - 16 - 20 - 270) * MIB


def test_a_charge_without_a_page_is_no_room(world):
    """A guest that has read 300 MiB of nothing, and may write it at any time."""
    top = Ceiling(world.gate, 0)
    world.memory, world.used = {11: 40 * MIB}, 40 * MIB
    before = top.most({0: 11})
    world.gate.charged = {0: 300 * MIB}
    assert top.most({0: 11}) == before == (1024 - 16 - 40) * MIB


def test_what_is_taken_or_given_back_meanwhile_makes_no_room(world):
    top = Ceiling(world.gate, 0)
    world.gate.charged, world.memory, world.used = {0: 100 * MIB}, {11: 140 * MIB}, 140 * MIB
    steady = top.most({0: 11})

    def change(frames):
        def meanwhile():
            world.gate.charged[0] += frames * MIB
            world.memory[11] += frames * MIB
            world.used += frames * MIB

        return meanwhile

    for frames in (-60, 60, 60, -60):
        world.meanwhile = change(frames)
        assert top.most({0: 11}) <= steady
    world.meanwhile = lambda: None
    assert top.most({0: 11}) == steady


def test_a_guest_that_is_gone_has_nothing(world):
    top = Ceiling(world.gate, 0)
    world.gate.charged, world.memory, world.used = {0: 100 * MIB}, {11: 140 * MIB}, 140 * MIB
    assert top.most({0: 11}) == (1024 - 16 - 40) * MIB
    world.memory, world.used = {}, 0
    assert top.most({0: 11}) == (1024 - 16) * MIB
    assert top.most({}) == (1024 - 16) * MIB
    world.limit = 0
    assert top.most({}) == 0


def test_no_limit_no_ceiling(world, monkeypatch):
    monkeypatch.setattr(ceiling, "memory_limits", lambda: ())
    assert Ceiling(world.gate, 0).most({}) is None
