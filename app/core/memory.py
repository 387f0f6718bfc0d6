"""Memory and processes, as /proc tells them: what can still be taken, and what a stage and its processes take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from app.core import cgroups

# Files of a cgroup, by version: limit, usage, and the key in memory.stat of cached files, which the kernel gives back.
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
KIB = 2**10


def available_bytes() -> int:
    """What this process can still take: the smallest of MemAvailable and of what every cgroup above it leaves."""
    lines = (cgroups.PROC / "meminfo").read_text().splitlines()
    of_machine = next(int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable:"))
    return min([of_machine, *_left_by_cgroups()])


def _left_by_cgroups() -> Iterator[int]:
    for group in cgroups.groups_above("memory"):
        limit_file, usage_file, cache_key = FILES[group.version]
        limit, usage, stat = map(group.read, (limit_file, usage_file, "memory.stat"))
        if limit and usage and stat and limit != "max":
            cached = dict(line.split() for line in stat.splitlines())[cache_key]
            yield max(int(limit) - (int(usage) - int(cached)), 0)


@dataclass(frozen=True)
class Process:
    """A process of a session: what it keeps in memory, shared pages included, and how many files it has open."""

    pid: int
    parent: int
    resident_bytes: int
    n_files: int


def _of_session(session: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(process.pid) == session:
                yield process


def processes(session: int) -> list[Process]:
    found = []
    for process in _of_session(session):
        with contextlib.suppress(psutil.Error):  # it has ended, or is somebody else's
            found.append(Process(process.pid, process.ppid(), process.memory_info().rss, process.num_fds()))
    return found


def memory_of(session: int) -> int:
    """Bytes of all processes of a session; what several share counts once."""
    return sum(_memory_of(process.pid) for process in _of_session(session))


def own_memory() -> tuple[int, int]:
    """Bytes of this process, and of all that it has started and that still live; what several share counts once."""
    children = psutil.Process().children(recursive=True)
    return _memory_of(os.getpid()), sum(_memory_of(child.pid) for child in children)


def _memory_of(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        return pss_bytes((cgroups.PROC / str(pid) / "smaps_rollup").read_text())
    return 0


def pss_bytes(text: str) -> int:
    """Proportional set size in the text of smaps_rollup."""
    return next((int(line.split()[1]) * KIB for line in text.splitlines() if line.startswith("Pss:")), 0)
