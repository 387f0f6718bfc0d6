"""The stages of a sweep as processes that are stopped as one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Self

from app.core import child
from app.core.answers import Answers
from app.train.interrupt import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FIRST = "stopping: the stages at work save first; again: at once, going on from the last checkpoints"
SECOND = "ended at once: finished files and the last checkpoints are whole, the same command goes on"
log = logging.getLogger(__name__)


class Children:
    """Context of the processes that it starts. A signal to this process is noted in `signal` and passed on to all as
    SIGTERM, a second one too, and that ends this process; when the context is left, all have ended."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.answers = Answers(lambda: FIRST, self._second)

    def __enter__(self) -> Self:
        self.answers.__enter__()
        self.before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        for process in self.processes:
            process.wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.answers.__exit__()

    def start(self, words: list[str], gpu: str | None, log_path: Path) -> subprocess.Popen[bytes]:
        """`python -m app` with these words; it sees one GPU, or with None all of them; its lines go into a file."""
        environ = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        command = [sys.executable, *child.PROGRAM, *words]
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as output:
            # In a session of its own: a terminal's Ctrl-C would reach it beside our SIGTERM, and a second one ends it.
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """SIGTERM to all that are at work."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def leave(self) -> None:
        """Raises Interrupted if a signal has come; to be called when all have ended."""
        if self.signal:
            raise Interrupted(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or (signal.SIGTERM if number == signal.SIGHUP else number)

    def _second(self) -> str:
        self.stop()
        return SECOND
