"""Signals are answered while the main thread is in a call of a library, and by the process that they are meant for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from app.core.answers import FIRST, FIRST_FORCED, SECOND, SECOND_FORCED

BUSY_S, POLL_S = 0.1, 0.01
PROGRAM = """
import hashlib, logging, os, signal, time
from app.core.answers import answered, left_to_children
logging.basicConfig(format="%(message)s")
with answered({forced}):
"""
BUSY_IN_C = """
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # half an hour in C, without the GIL
"""
CHILDS = """
    signal.signal(signal.SIGINT, lambda *_: os._exit(3))
    with left_to_children():
        print("ready", flush=True)
        time.sleep(60)
"""
FORKED = """
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(4)
    print("ready", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    time.sleep(60)
"""


def start(body: str, forced: bool = False) -> tuple[subprocess.Popen[str], str]:
    """The program with this body, and the line that says it is there."""
    program = PROGRAM.format(forced=forced) + body
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, process.stdout.readline()


def wait_until_busy(process: subprocess.Popen[str]) -> None:
    """Waits until it has computed for so long that it is in the call: the way there from "ready" takes microseconds."""
    cpu = psutil.Process(process.pid).cpu_times
    start_s = cpu().user
    while cpu().user < start_s + BUSY_S:
        time.sleep(POLL_S)


@pytest.mark.parametrize(
    ("number", "forced", "answers"),
    [
        (signal.SIGINT, False, (FIRST, SECOND)),
        (signal.SIGTERM, False, (FIRST, SECOND)),
        (signal.SIGTERM, True, (FIRST_FORCED, SECOND_FORCED)),
    ],
)
def test_the_answer_does_not_wait_for_the_call_and_a_second_signal_ends_it(
    number: signal.Signals, forced: bool, answers: tuple[str, str]
) -> None:
    process, _ = start(BUSY_IN_C, forced)
    wait_until_busy(process)
    assert process.stderr
    process.send_signal(number)
    assert process.stderr.readline() == answers[0] + "\n"
    assert process.poll() is None
    process.send_signal(number)
    assert process.communicate()[1] == answers[1] + "\n"
    assert process.returncode == 128 + number


def test_who_passes_its_signals_on_answers_nothing() -> None:
    process, _ = start(CHILDS)
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.returncode) == ("", 3)


def test_a_signal_of_a_forked_process_is_not_its_parents() -> None:
    """As a loader's: it got its parent's handlers. The first signal of the parent is answered as the first."""
    process, ready = start(FORKED)
    assert ready == "ready 4\n"
    process.send_signal(signal.SIGTERM)
    assert (process.communicate()[1], process.returncode) == (FIRST + "\n", 128 + signal.SIGTERM)
