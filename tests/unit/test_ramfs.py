"""emu.guest.ramfs and private mappings of a file, on memory without faults; page_fault1 and 2."""

import pytest

from emu.clock import StepClock
from emu.errors import BadValue, GuestError, OutOfMemory
from emu.guest.kernel import GuestKernel
from emu.guest.page import Owner
from emu.machine import Machine
from emu.testing import BytesMemory, ReferenceMemory
from emu.workloads.page_fault import PageFault1, PageFault2
from emu.workloads.runner import run

MIB = 1 << 20


def shmem(kernel):
    return kernel.memmap.count(Owner.SHMEM) * 4096


@pytest.fixture(params=[ReferenceMemory, BytesMemory])
def kernel(request):
    return GuestKernel(request.param("64MiB"), StepClock())


def test_a_private_mapping_shows_the_file_until_it_is_written(kernel):
    """Then its own copy; the file and other mappings of it keep theirs."""
    file = kernel.create_file("2MiB")
    file.fill(seed=3)
    content = file.content(0, 2 * MIB, seed=3)
    one = kernel.spawn("a").mmap("2MiB", file=file)
    two = kernel.spawn("b").mmap("1MiB", file=file)
    assert kernel.used_bytes == 2 * MIB
    one.touch(write=False)
    assert one.present == 0
    assert one.read(0, 2 * MIB) == content
    one.touch("1MiB", "1MiB")
    assert one.present == 256
    assert kernel.used_bytes == 3 * MIB
    assert one.read(0, 2 * MIB) == content
    one.write(MIB + 5, b"mine")
    two.write(0, b"two's")
    assert one.read(0, 5) == content[:5]
    assert one.read(MIB, 10) == content[MIB : MIB + 5] + b"mine" + content[MIB + 9 : MIB + 10]
    assert two.read(0, MIB) == b"two's" + content[5:MIB]
    file.unlink()
    with pytest.raises(GuestError, match="unlinked"):
        kernel.spawn("c").mmap("1MiB", file=file)
    with pytest.raises(GuestError, match="unlinked"):
        file.fill(seed=1)
    one.madvise_dontneed("1MiB", "1MiB")
    assert one.read(0, 2 * MIB) == content
    one.munmap()
    assert shmem(kernel) == 2 * MIB
    two.process.exit()
    assert kernel.used_bytes == shmem(kernel) == kernel.cached_bytes == 0


def test_a_file_is_made_of_holes_that_read_as_zero(kernel):
    """Pages come at the first access, cleared of what their frames held."""
    dirty = kernel.spawn("a").mmap("8MiB")
    dirty.fill(seed=1)
    dirty.munmap()
    file = kernel.create_file("4MiB")
    assert shmem(kernel) == 0
    memory = kernel.spawn("b").mmap("4MiB", file=file)
    assert memory.read(5 * 4096, 8192) == bytes(8192)
    assert shmem(kernel) == 2 * 4096
    memory.touch()
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)
    assert file.present == 1024


def test_a_file_that_does_not_fit_is_out_of_memory_and_leaks_nothing(kernel):
    file = kernel.create_file("128MiB")
    with pytest.raises(OutOfMemory):
        file.fill(seed=1)
    file.unlink()
    assert kernel.used_bytes == 0
    with pytest.raises(BadValue, match="larger than the file"):
        kernel.spawn("a").mmap("8MiB", file=kernel.create_file("4MiB"))


@pytest.mark.parametrize("cls", [PageFault1, PageFault2])
@pytest.mark.parametrize("threads", [1, 3])
def test_page_fault_touches_every_page_and_checks_the_last(cls, threads):
    """What it counts is what it did; afterwards everything is free."""
    with Machine("128MiB", "reporting:order=0", clock=StepClock(), uffd="off") as m:
        workload = cls("8MiB", 3, threads, "60s")
        result = run(m, workload, seed=1)
        assert (result.verified_frames, result.corrupt_frames) == (2048 * threads, 0)
        assert workload.pages == 3 * 2048 * threads
        assert result.phases[-1].guest_used_bytes == 0
        measures = result.measures
        assert measures["page"].value == pytest.approx(measures["page_c"].value + measures["page_python"].value)
        assert measures["page_c"].value > 0
        assert 0 < measures["host_faults"].value <= (2 if cls.of_file else 1)
        assert result.books_difference == 0


def test_page_fault_says_when_it_does_not_fit():
    with Machine("64MiB", "none", clock=StepClock(), uffd="off") as m, pytest.raises(BadValue, match="needs 96 MiB"):
        run(m, PageFault2("24MiB", 1, 2), seed=1)
    for options in ({"iterations": 0}, {"threads": 0}, {"size": 0}):
        with pytest.raises(BadValue):
            PageFault1(**options)
