"""What a process shows: the log, and of long work its progress.

On a terminal that is one line, drawn anew; elsewhere a log line every minute and one at the end.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO, TypeVar

from tqdm import tqdm

from app.core.environment import has_ranks
from app.core.files import printable
from app.core.mounts import as_known

T = TypeVar("T")
LOG_EVERY_S = 60.0
REFRESH_S = 0.5
LOG_WIDTH = 80  # columns of a log line
MIN_BAR = 10  # columns, with its frame; a shorter bar says nothing
HOUR_S, DAY_S = 3600, 86400
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """Words of a progress line. In a line that is too long, segments are replaced by `short`, the highest rank first;
    one of rank 0 stays."""

    text: str
    rank: int = 0
    short: str = ""

    def at(self, rank: int) -> str:
        return self.text if self.rank <= rank else self.short


# Ranks of the segments. Beside them a bar needs room, so the bar goes first.
COUNT, LOSS, NAME, MEMORY, RATE = 5, 4, 3, 2, 1


def fitted(name: Segment, segments: list[Segment], width: int) -> tuple[str, str]:
    """Name and segments as text, so that 'name: segments' has at most `width` columns where that can be had."""
    head = tail = ""
    for rank in range(COUNT, -1, -1):
        words = [segment.at(rank) for segment in segments]
        head, tail = name.at(rank), ", ".join(filter(None, words))
        if len(f"{head}: {tail}") <= width:
            break
    return head, tail


class Meter:
    """Counts finished units of work, and shows their number, the rate and the time left.

    `desc` are a few words for the work, `short` fewer for a narrow terminal; `unit` is the plural of what is counted.
    """

    def __init__(self, desc: str, total: int, unit: str = "images", short: str | None = None) -> None:
        self.desc = printable(desc)
        self.name = Segment(self.desc, NAME, self.desc if short is None else printable(short))
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = self.shown = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self.bar = tqdm(total=total, leave=False, dynamic_ncols=True, bar_format=_literal(self.desc))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def update(self, count: int = 1, notes: Callable[[], list[Segment]] = list) -> None:
        """Adds `count` finished units.

        `notes` returns the end of the line, such as memory and loss; it is called only when the line is shown.
        """
        self.done += count
        now = time.monotonic()
        if now - self.shown < (LOG_EVERY_S if self.bar is None else REFRESH_S):
            return
        self.shown = now
        if self.bar is not None:
            self.bar.n = self.done
            width = shutil.get_terminal_size().columns - 1  # in the last column some terminals begin a new line
            self.bar.bar_format = line_format(self.name, [*segments_of(self), *notes()], width)
            self.bar.refresh()
        elif self.done < self.total:
            log.info("%s: %s", *fitted(self.name, [*segments_of(self), *notes()], LOG_WIDTH))

    def close(self) -> None:
        """Removes the line from the terminal."""
        if self.bar is not None:
            self.bar.close()


def line_format(name: Segment, segments: list[Segment], width: int) -> str:
    """The line as tqdm's bar_format, with a bar where there is room for one beside all segments."""
    tail = ", ".join(segment.text for segment in segments)
    if len(f"{name.text} {tail} ") + MIN_BAR <= width:
        return f"{_literal(name.text)} {{bar}} {_literal(tail)}"
    head, tail = fitted(name, segments, width)
    return _literal(f"{head}: {tail}")


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def segments_of(meter: Meter) -> list[Segment]:
    """How much is done, the rate, and the time left."""
    rate = _rate(meter)
    left = clock((meter.total - meter.done) / rate) if rate else "?"
    count = f"{meter.done:,}/{meter.total:,}"
    return [Segment(count, COUNT), Segment(_rate_text(meter), RATE), Segment(f"{left} left")]


def track(items: Iterable[T], desc: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yields `items` while a Meter shows the progress; logs one line at the end."""
    meter = Meter(desc, total, unit)
    yield from counted(items, meter)
    count = f"{meter.done:,}/{meter.total:,} {meter.unit}"
    log.info("%s: %s, %s, in %s", meter.desc, count, _rate_text(meter), clock(meter.seconds))


def counted(items: Iterable[T], meter: Meter) -> Iterator[T]:
    """Yields `items`, counted by the meter, which is closed at their end."""
    try:
        for item in items:
            yield item
            meter.update()
    finally:
        meter.close()


def _rate(meter: Meter) -> float:
    seconds = meter.seconds
    return meter.done / seconds if seconds > 0 else 0.0


def _rate_text(meter: Meter) -> str:
    """'35.2 images/s', from 100 on without decimals."""
    rate = _rate(meter)
    return f"{rate:.{1 if rate < 100 else 0}f} {meter.unit}/s"


def clock(seconds: float) -> str:
    """Seconds as m:ss, from an hour on h:mm:ss, from a day on '3 d 4 h'."""
    whole = int(seconds + 0.5)
    if whole >= DAY_S:
        return f"{whole // DAY_S} d {whole % DAY_S // HOUR_S} h"
    minutes, whole_seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{whole_seconds:02d}"
    return f"{minutes}:{whole_seconds:02d}"


class Printable(logging.Formatter):
    """Log lines with the paths that the user knows, and without control characters.

    Names in foreign files must not steer the terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        lines = as_known(super().format(record)).split("\n")
        return "\n".join(map(printable, lines))


class AboveBars(logging.StreamHandler[TextIO]):
    """Writes a record on lines of its own, above a progress line that is on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def set_up_terminal() -> None:
    """Shows our own lines, and of the libraries only warnings; a training's log.txt has everything.

    Of the ranks of a training, rank 0 speaks for all; the other ranks log only their errors.
    """
    rank_text = os.environ.get("RANK", "")
    rank = int(rank_text) if has_ranks() and rank_text.isascii() and rank_text.isdigit() else 0
    handler = AboveBars(sys.stderr)
    handler.setFormatter(Printable(f"process {rank + 1}: %(message)s" if rank else "%(message)s"))
    handler.addFilter(lambda record: record.name.partition(".")[0] == "app" or record.levelno >= logging.WARNING)
    logging.basicConfig(handlers=[handler])
    logging.raiseExceptions = False  # a full disk is reported once, by the file that matters, not by every log record
    logging.getLogger("app").setLevel(logging.ERROR if rank else logging.INFO)
    if rank:
        handler.setLevel(logging.ERROR)
        logging.captureWarnings(True)
    # Brevitas imports it. Without a GPU it warns that there is none, which its owner knows.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
