"""The inline service and everybody else who wants SIGBUS. Each case is a process of its own."""

import itertools
import signal
import subprocess
import sys
import textwrap

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.inline]

PRELUDE = """
import faulthandler, mmap, os, signal, sys, tempfile, threading
import emu

def cut_file():
    "A mapping of a file that was cut short: touching it is a SIGBUS that isn't a guest's."
    file = tempfile.TemporaryFile()
    file.truncate(4096)
    mapping = mmap.mmap(file.fileno(), 4096)
    file.truncate(0)
    return mapping

def serve(ram, first):
    ram.touch(first, 50)
    ram.fill(first, 50, seed=first)
    assert ram.verify(first, 50, seed=first) == []
    assert ram.rss_bytes >= 50 * 4096
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


STEPS = {
    "open": "ram = emu.GuestRam('4MiB', service='inline')",
    "enable": "faulthandler.enable()",
    "disable": "faulthandler.disable()",
    "enable again": "faulthandler.enable()",
}
ORDERS = [order for n in range(1, 5) for order in itertools.permutations(STEPS, n) if "open" in order]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_guest_faults_are_served_in_every_order(order):
    """Our handler first or last, faulthandler enabled and disabled before, after, and twice."""
    lines = []
    for i, step in enumerate(order):
        lines.append(STEPS[step])
        if "open" in order[: i + 1]:
            lines.append(f"serve(ram, {i * 60})")
    lines += ["serve(ram, 500)", "ram.close()", "print('served')"]
    done = run("\n".join(lines))
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")


@pytest.mark.parametrize(
    "order", [("open", "enable"), ("enable", "open"), ("enable", "open", "disable", "enable again")], ids=" ".join
)
@pytest.mark.parametrize("serve_between", [True, False])
def test_a_foreign_sigbus_still_reaches_faulthandler_and_kills(order, serve_between):
    """Its traceback is printed, once, and the process dies by SIGBUS as it would without us."""
    lines = [STEPS[step] for step in order] + (["serve(ram, 0)"] if serve_between else []) + ["cut_file()[0]"]
    done = run("\n".join(lines))
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == 1
    assert "in <module>" in done.stderr


def test_a_foreign_sigbus_kills_when_nobody_handles_it():
    """Also after faulthandler was disabled again, whose handler then sits on the chain and does nothing."""
    for lines in (
        [STEPS["open"], "serve(ram, 0)"],
        [STEPS["enable"], STEPS["open"], "serve(ram, 0)", STEPS["disable"], "serve(ram, 100)"],
        [STEPS["open"], STEPS["enable"], "serve(ram, 0)", STEPS["disable"], "serve(ram, 100)"],
    ):
        done = run("\n".join([*lines, "cut_file()[0]"]))
        assert done.returncode == -signal.SIGBUS
        assert "Fatal" not in done.stderr


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("send", ["signal.raise_signal(signal.SIGBUS)", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_a_sent_sigbus_reaches_a_python_handler(late, send):
    """signal.signal() before us or after us."""
    install = "signal.signal(signal.SIGBUS, lambda n, f: print('theirs', flush=True))"
    lines = [STEPS["open"], install] if late else [install, STEPS["open"]]
    done = run("\n".join([*lines, "serve(ram, 0)", send, "serve(ram, 100)", "print('served')"]))
    assert (done.returncode, done.stdout) == (0, "theirs\nserved\n"), done.stderr


def test_a_handler_installed_while_a_call_is_under_way_does_not_hang_it():
    """It returns at once, the access faults again; within a moment the signal is ours again."""
    done = run("""
        faulthandler.dump_traceback_later(30, exit=True)
        ram = emu.GuestRam('512MiB', service='inline')
        t = threading.Thread(target=lambda: ram.touch(0, ram.frames))
        t.start()
        for _ in range(3):
            signal.signal(signal.SIGBUS, lambda n, f: None)
        t.join()
        assert ram.rss_bytes == ram.size
        print('served')
    """)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_an_ignored_sigbus_stays_ignored_when_sent():
    """SIG_IGN is somebody's choice."""
    done = run("""
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        ram = emu.GuestRam('4MiB', service='inline')
        serve(ram, 0)
        os.kill(os.getpid(), signal.SIGBUS)
        serve(ram, 100)
        print('served')
    """)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_a_raw_view_survives_faulthandler_enabled_after_the_last_call():
    """It prints a traceback for the guest's fault, hands over, and the access is served after all."""
    done = run("""
        ram = emu.GuestRam('4MiB', service='inline')
        serve(ram, 0)
        view = ram.unsafe_view()
        faulthandler.enable()
        assert view[900 * 4096] == 0
        view[901 * 4096] = 1
        assert view[902 * 4096] == 0
        serve(ram, 100)
        view.release()
        print('served')
    """)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_a_raw_view_under_a_late_faulthandler_is_not_passed_on_to_an_older_handler():
    """The alternate stack tells that the signal came out of another handler."""
    done = run("""
        signal.signal(signal.SIGBUS, lambda n, f: print('passed on', flush=True))
        ram = emu.GuestRam('4MiB', service='inline')
        serve(ram, 0)
        view = ram.unsafe_view()
        faulthandler.enable()
        assert view[900 * 4096] == 0
        print('served')
        view.release()
    """)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_a_thread_with_sigbus_blocked_is_served_and_its_mask_kept():
    """Through every public call."""
    done = run("""
        ram = emu.GuestRam('4MiB', service='inline')
        def work():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
            serve(ram, 0)
            ram.write(400 * 4096 + 1, b'x' * 9000)
            assert ram.read(399 * 4096, 4 * 4096).count(b'x') == 9000
            ram.install([500, 600], bytes(8192))
            ram.touch(700, 10, threads=3)
            assert signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, ())
            print('served')
        t = threading.Thread(target=work)
        t.start()
        t.join()
    """)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_the_process_gets_its_handler_back_when_the_last_ram_closes():
    """Nothing of ours stays installed."""
    done = run("""
        from emu._native import lib
        handler = lambda n, f: None
        signal.signal(signal.SIGBUS, handler)
        one, two = emu.GuestRam('1MiB', service='inline'), emu.GuestRam('1MiB', service='inline')
        serve(one, 0)
        assert lib.emu_sigbus_is_ours()
        one.close()
        serve(two, 0)
        assert lib.emu_sigbus_is_ours()
        two.close()
        assert not lib.emu_sigbus_is_ours()
        os.kill(os.getpid(), signal.SIGBUS)
        print('done')
    """)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("plugin", [[], ["-p", "no:faulthandler"]], ids=["with faulthandler", "without"])
def test_pytest_runs_guests_with_and_without_its_faulthandler_plugin(plugin, tmp_path):
    """The plugin enables faulthandler at configure time and disables it at the end."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import emu
            RAM = emu.GuestRam("4MiB", service="inline")
            RAM.touch(0, 10)
            def test_one(rss_delta):
                with rss_delta(RAM) as d:
                    RAM.touch(100, 50)
                assert d.pages == 50
            def test_two():
                with emu.GuestRam("1MiB", service="inline") as ram:
                    ram.touch(0, 256)
                RAM.close()
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
