"""SIGTERM and SIGINT as requests: the step in hand ends, the state is saved, the process exits with 128 + signal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal ended the work after its state had been saved; `signal` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class PeerLost(Exception):
    """Another process of the same training has ended or hangs; nothing is saved since the last checkpoint."""


class Interrupt:
    """Context in which the first signal is only noted in `signal`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.immediate = False

    def __enter__(self) -> Self:
        self.handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.signal = number
        if self.immediate:
            self.leave()

    def leave(self) -> None:
        """Raises Interrupted if a signal has come; the caller has saved everything."""
        if self.signal:
            raise Interrupted(self.signal)

    @contextlib.contextmanager
    def at_once(self, save: Callable[[], None]) -> Iterator[None]:
        """A block that a signal ends at any point, after `save`. The block changes nothing that a checkpoint holds."""
        self.immediate = True
        try:
            self.leave()
            yield
        except Interrupted:
            self.immediate = False
            save()
            raise
        finally:
            self.immediate = False
