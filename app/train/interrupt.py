"""SIGTERM and SIGINT as requests: the step in hand ends, the state is saved, the process exits with 128 + signal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

from app.core.answers import SIGNALS, Answers


class Interrupted(Exception):
    """A signal ended the work after its state had been saved; `signal` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class PeerLost(Exception):
    """Another process of the same training has ended or hangs; nothing is saved since the last checkpoint."""


class Interrupt:
    """Context in which the first signal is answered and noted in `signal`; a second one ends the process at once.

    Args:
        file: what holds the state that is kept, in words.
        work: what the first signal lets end, in words.

    Attributes:
        kept: where the same command goes on from after a second signal, in words.
        is_kept: whether the file holds that; at the start of a training there is none.
    """

    def __init__(self, file: str, work: str = "this step") -> None:
        self.signal: int | None = None
        self.immediate = False
        self.work, self.file, self.kept, self.is_kept = work, file, "the last checkpoint", True
        self.answers = Answers(
            lambda: f"stopping after {self.work}; again: at once, going on from {self.kept}",
            lambda: f"ended at once: the same command goes on from {self.kept}{self._where}",
        )

    @property
    def _where(self) -> str:
        return f", which {self.file} keeps" if self.is_kept else ""

    def __enter__(self) -> Self:
        self.answers.__enter__()
        self.handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.answers.__exit__()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            return  # a second one, which `Answers` ends the process for
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
        work, self.work = self.work, "saving"
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
            self.work = work
