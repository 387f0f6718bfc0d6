"""What /proc says of the processes of a session: a stage and all that it has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SESSION, PARENT = 3, 1  # places in /proc/PID/stat, counted after the name in brackets
KIB = 2**10


@dataclass(frozen=True)
class Process:
    """A process of a session: what it keeps in memory, shared pages included, and how many files it has open."""

    pid: int
    parent: int
    resident_bytes: int
    n_files: int


def of_session(session: int) -> Iterator[Path]:
    """The folders in /proc of the processes of a session."""
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if int(_fields(folder)[SESSION]) == session:
                yield folder


def _fields(folder: Path) -> list[str]:
    return (folder / "stat").read_text().rpartition(")")[2].split()


def processes(session: int) -> list[Process]:
    found = []
    for folder in of_session(session):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            n_pages = int((folder / "statm").read_text().split()[1])
            resident = n_pages * os.sysconf("SC_PAGE_SIZE")
            n_files = len(os.listdir(folder / "fd"))
            found.append(Process(int(folder.name), int(_fields(folder)[PARENT]), resident, n_files))
    return found


def memory_of(session: int) -> int:
    """Bytes of all processes of a session; what several share counts once."""
    total = 0
    for folder in of_session(session):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            total += pss_bytes((folder / "smaps_rollup").read_text())
    return total


def pss_bytes(text: str) -> int:
    """Proportional set size in the text of smaps_rollup."""
    return next((int(line.split()[1]) * KIB for line in text.splitlines() if line.startswith("Pss:")), 0)
