"""What ends the program from outside: interrupts, a scheduler's stop, a closed terminal or output."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.execute.stopping import STOPPED
from harness.record.store import RecordStore

# A command that waits, and whose cleaning up waits as well where it is asked to.
WAITS = """
import atexit, sys
from harness.cli import main
from harness.commands import listing

def clean():
    print("cleaning", flush=True)
    sys.stdin.readline()

def wait(name):
    if name == "at exit":
        atexit.register(clean)
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    finally:
        if name == "at once":
            clean()
    return 0

listing.command = wait
sys.exit(main(["list", *sys.argv[1:]]))
"""
# `python -m harness`, as long as its imports take.
IMPORTS = """
import runpy, sys, types

class Slow(types.ModuleType):
    def __getattr__(self, name):
        print("ready", flush=True)
        sys.stdin.readline()

sys.modules["harness.cli"] = Slow("harness.cli")
runpy.run_module("harness", run_name="__main__")
"""


def started(program: str, *arguments: str, ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """The program's process, at the point where it waits. It ignores these signals, and none that the tests' own
    process was started to ignore, as `nohup` has it ignore one."""

    def set_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, preexec_fn=set_signals, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_one_line_and_its_exit_code(number):
    process = started(WAITS)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.strip().count("\n") == 0
    assert "give the same command again" in error


@pytest.mark.parametrize("when", ["at once", "at exit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_stop_while_cleaning_up_ends_at_once_without_a_traceback(number, when):
    process = started(WAITS, when)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    assert process.wait() == 130
    _, error = process.communicate()
    assert set(error.strip().splitlines()) <= {"", STOPPED.strip()}
    assert "give the same command again" in error


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_nohup_ignores_stays_ignored(number):
    process = started(WAITS, ignored=(number,))
    process.send_signal(number)
    _, error = process.communicate("\n")
    assert process.returncode == 0
    assert error == ""


def test_an_interrupt_of_the_imports_leaves_no_traceback():
    process = started(IMPORTS)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert error == ""


def test_a_terminal_without_our_signs_ends_no_sweep(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    options = ["--executor", "serial", "--batches", "2", "--results", str(tmp_path / "results")]
    assert main(["run", "--methods", "head", "--tasks", "synthetic", *options]) == 0
    assert rb"head \xb7 synthetic \xb7 seed 0" in sys.stdout.buffer.getvalue()


def test_output_that_is_closed_ends_no_sweep(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    options = ["--executor", "serial", "--batches", "2", "--results", str(tmp_path / "results")]
    try:
        assert main(["run", "--methods", "head", "--tasks", "synthetic", *options]) == 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
    assert [record.status for record in RecordStore(tmp_path / "results").records()] == ["done"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full is Linux's /dev/full")
def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "harness", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: what is printed cannot be written (No space left on device)\n"
