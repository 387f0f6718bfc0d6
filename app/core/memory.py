"""Memory and processes, as /proc tells them: what can still be taken, and what a stage and its processes take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a cgroup, by version: limit, usage, and the key in memory.stat of cached files, which the kernel gives back.
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
KIB = 2**10


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """What this process can still take: the smallest of MemAvailable and of what every cgroup above it leaves."""
    lines = (proc / "meminfo").read_text().splitlines()
    of_machine = next(int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable:"))
    return min([of_machine, *_left_by_cgroups(proc, cgroups)])


def _left_by_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """In a container the paths of /proc may be those of the host: then only the root of its own mount is there."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, cgroups / "memory") if controllers else (2, cgroups)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit_file, usage_file, cache_key = FILES[version]
            if not group.is_relative_to(root) or not (group / limit_file).exists():
                continue
            limit = (group / limit_file).read_text().strip()
            if limit != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / usage_file).read_text()) - int(stat[cache_key])
                yield max(int(limit) - used, 0)


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
        return pss_bytes((PROC / str(pid) / "smaps_rollup").read_text())
    return 0


def pss_bytes(text: str) -> int:
    """Proportional set size in the text of smaps_rollup."""
    return next((int(line.split()[1]) * KIB for line in text.splitlines() if line.startswith("Pss:")), 0)
