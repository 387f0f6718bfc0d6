"""A stage as a process of its own, which gets the signals of this one."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from app.core.answers import command_that_goes_on, left_to_children

log = logging.getLogger(__name__)
PROGRAM = ["-m", "app"]  # what a stage is, as words for Python
SHORT_OF_MEMORY = (signal.SIGKILL, signal.SIGBUS)  # what the kernel sends where memory or shared memory is short


def job_words(run: str, runs_dir: Path, overlays: list[Path], sets: list[str]) -> list[str]:
    """What a stage needs on its command line to read the same run and configuration as this process."""
    words = ["--run", run, "--runs-dir", str(runs_dir)]
    for path in overlays:
        words += ["--conf", str(path)]
    for setting in sets:
        words += ["--set", setting]
    return words


def run_stage(stage: str, arguments: list[str]) -> int:
    """Runs a stage to its end; signals are passed on to it, once each, and it decides what to save.

    Args:
        stage: its name and own arguments, 'train --variant qat'.
        arguments: of all stages.

    Returns:
        its exit code; 128 + signal where it was killed, which is logged.
    """
    command = [sys.executable, *PROGRAM, *stage.split(), *arguments]
    child = subprocess.Popen(command, start_new_session=True)  # else a terminal's Ctrl-C would reach it a second time
    with signals_passed_on(child):
        code = child.wait()
    if code >= 0:
        return code
    again = command_that_goes_on("--force" in arguments)
    log.error("'%s' was killed by %s: %s goes on from there", stage, signal_name(-code), again)
    return 128 - code


@contextlib.contextmanager
def signals_passed_on(*children: subprocess.Popen[bytes]) -> Iterator[None]:
    """Context in which the signals of this process go to its children, which answer them."""
    before = {}

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    with left_to_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def signal_name(number: int) -> str:
    """SIGKILL (short of memory?)."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (short of memory?)" if number in SHORT_OF_MEMORY else name
