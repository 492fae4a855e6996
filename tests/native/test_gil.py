"""The GIL trap: a missing page touched while Python is busy elsewhere must never deadlock.

Each case runs in a process of its own under faulthandler's watchdog, which needs no GIL; a deadlock is exit code 1
with a traceback, not a hung test run.
"""

import subprocess
import sys
import textwrap

import pytest

CASES = {
    "touch": "ram.touch(gfn, 64)",
    "touch read": "ram.touch(gfn, 64, write=False)",
    "fill": "ram.fill(gfn, 64, seed=1)",
    "verify": "ram.verify(gfn, 64, seed=1)",
    "read": "ram.read(gfn * 4096, 64 * 4096)",
    "write": "ram.write(gfn * 4096 + 5, b'x' * (64 * 4096 - 5))",
    "install": "ram.install(list(range(gfn, gfn + 64)), bytes(64 * 4096))",
    "discard": "ram.touch(gfn, 64); ram.discard([(gfn, 64)])",
    "view read": "sum(view[g * 4096] for g in range(gfn, gfn + 64))",  # faults with the GIL held
    "view write": "[view.__setitem__(g * 4096, 1) for g in range(gfn, gfn + 64)]",
    "view slice": "bytes(view[gfn * 4096 : (gfn + 64) * 4096])",
}

CODE = """
import faulthandler, sys, threading
faulthandler.dump_traceback_later(40, exit=True)
import emu

stop = threading.Event()
def spin():
    n = 0
    while not stop.is_set():
        n += 1

with emu.GuestRam("64MiB", service={service!r}) as ram:
    view = ram.unsafe_view()
    spinners = [threading.Thread(target=spin) for _ in range(2)]
    for t in spinners: t.start()
    def work(first):
        for gfn in range(first, first + 2048, 64):
            {call}
    workers = [threading.Thread(target=work, args=(i * 4096,)) for i in range(2)]
    for t in workers: t.start()
    for t in workers: t.join()
    stop.set()
    for t in spinners: t.join()
    view.release()
    assert ram.stats()["nr_busy"] == 0
    assert ram.rss_bytes <= ram.size
print("done")
"""


@pytest.mark.uffd
@pytest.mark.parametrize("service", [pytest.param("inline", marks=pytest.mark.inline), "thread"])
@pytest.mark.parametrize("case", CASES)
def test_no_call_deadlocks_with_the_gil(case, service):
    """Two workers fault, two Python threads spin."""
    code = textwrap.dedent(CODE).format(service=service, call=CASES[case])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
