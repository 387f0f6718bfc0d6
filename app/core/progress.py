"""Progress of long work: a bar on a terminal; elsewhere a log line every minute and one at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from app.core.files import printable

T = TypeVar("T")
LOG_EVERY_S = 60.0
REFRESH_S = 0.5
log = logging.getLogger(__name__)


class Meter:
    """Counts finished units of work, and shows their number, the rate and the time left.

    Args:
        desc: the work, in a few words.
        total: number of units when all is done.
        unit: name of the units, plural.
    """

    def __init__(self, desc: str, total: int, unit: str = "images") -> None:
        self.desc = printable(desc)
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = self.shown = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self.bar = tqdm(desc=self.desc, total=total, unit=f" {unit}", leave=False, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def update(self, count: int = 1, note: Callable[[], str] = str) -> None:
        """Adds `count` finished units.

        `note` returns the end of the line, such as loss and memory; it is called only when the line is shown.
        """
        self.done += count
        now = time.monotonic()
        interval_s = LOG_EVERY_S if self.bar is None else REFRESH_S
        show = now - self.shown >= interval_s
        if show:
            self.shown = now
        if self.bar is not None:
            if show:
                self.bar.set_postfix_str(note(), refresh=False)
            self.bar.update(count)
        elif show and self.done < self.total:
            parts = [progress_line(self), note()]
            log.info(", ".join(part for part in parts if part))

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()


def track(items: Iterable[T], desc: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yields `items` while a Meter shows the progress; logs one line at the end."""
    meter = Meter(desc, total, unit)
    try:
        for item in items:
            yield item
            meter.update()
    finally:
        meter.close()
    log.info(progress_line(meter))


def progress_line(meter: Meter) -> str:
    """'desc: 12/72 images, 35.2 images/s, 0:02 left'; when all is done it ends in 'in 0:02'."""
    seconds = meter.seconds
    rate = meter.done / seconds if seconds > 0 else 0.0
    left = clock((meter.total - meter.done) / rate) if rate else "?"
    tail = f"in {clock(seconds)}" if meter.done >= meter.total else f"{left} left"
    return f"{meter.desc}: {meter.done:,}/{meter.total:,} {meter.unit}, {rate:.1f} {meter.unit}/s, {tail}"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, whole_seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{whole_seconds:02d}"
    return f"{minutes}:{whole_seconds:02d}"
