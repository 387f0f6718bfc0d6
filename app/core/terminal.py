"""What a process shows on the terminal: its own lines, and of the libraries only warnings."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from app.core.files import printable
from app.core.mounts import as_known

log = logging.getLogger("app")


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
    rank = int(rank_text) if rank_text.isascii() and rank_text.isdigit() else 0
    handler = AboveBars(sys.stderr)
    handler.setFormatter(Printable(f"process {rank + 1}: %(message)s" if rank else "%(message)s"))
    handler.addFilter(lambda record: record.name.partition(".")[0] == "app" or record.levelno >= logging.WARNING)
    logging.basicConfig(handlers=[handler])
    logging.raiseExceptions = False  # a full disk is reported once, by the file that matters, not by every log record
    log.setLevel(logging.ERROR if rank else logging.INFO)
    if rank:
        handler.setLevel(logging.ERROR)
        logging.captureWarnings(True)
    # Brevitas imports it. Without a GPU it warns that there is none, which its owner knows.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
