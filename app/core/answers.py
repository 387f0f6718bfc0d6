"""SIGINT and SIGTERM are answered at once, also while the main thread is in a long call of a library.

Python runs a signal's handler between two bytecodes of the main thread. A line of that handler would wait for the end
of a backward pass, which takes minutes on a CPU. The part of the handler that is written in C sends the number of the
signal to a socket at once (signal.set_wakeup_fd), and a thread reads it there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_SOCKET = -1
END = b"\0"  # no signal has this number
FIRST = "interrupted: the same command starts this stage again, or goes on from the last checkpoint"
FIRST_FORCED = "interrupted: the same command starts over; without --force it goes on from what is saved"
SECOND = "ended at once: finished files and the last checkpoint are whole, the same command makes the rest"
SECOND_FORCED = "ended at once: finished files and the last checkpoint are whole, the same command starts over"
log = logging.getLogger(__name__)


class Answers:
    """Context: a line for the first signal; a line for the second one, which ends the process with 128 + its number.

    What else a signal does is up to its handler. A signal without a handler in Python is not answered.
    """

    def __init__(self, first: Callable[[], str], second: Callable[[], str]) -> None:
        self.first, self.second = first, second

    def __enter__(self) -> Self:
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)  # set_wakeup_fd asks for it
        self.before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, name="answers", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self.before)
        self.writer.send(END)
        self.thread.join()
        self.reader.close()
        self.writer.close()

    def _listen(self) -> None:
        n_signals = 0
        while (number := self.reader.recv(1)) != END:
            if ord(number) not in SIGNALS:
                continue
            n_signals += 1
            if n_signals == 1:
                log.warning("%s", self.first())
            else:
                log.warning("%s", self.second())
                os._exit(128 + ord(number))


def command_that_goes_on(forced: bool) -> str:
    """What to start after a command that was, or was not, to start over."""
    return "the same command without --force" if forced else "the same command"


@contextlib.contextmanager
def answered(forced: bool = False) -> Iterator[None]:
    """Context of a stage without a state to save: after the answer SIGINT interrupts it, and SIGTERM exits with 143.

    A stage that is `forced` starts over, so the answer names the command that goes on.
    """
    first, second = (FIRST_FORCED, SECOND_FORCED) if forced else (FIRST, SECOND)
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with Answers(lambda: first, lambda: second):
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def left_to_children() -> Iterator[None]:
    """Context in which this process answers nothing, because it passes its signals on to processes that answer."""
    before = signal.set_wakeup_fd(NO_SOCKET)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


# A forked process, such as a loader's, has its parent's handlers. Its signals would count as its parent's.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(NO_SOCKET))
