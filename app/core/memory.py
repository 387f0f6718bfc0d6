"""Memory that this process can still take: the machine's, or what the limits of its cgroups (a container's) leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a cgroup, by version: limit, usage, and the key in memory.stat of cached files, which the kernel gives back.
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The smallest of MemAvailable and of what every cgroup above this process leaves."""
    return min([_machine(proc), *_left_by_cgroups(proc, cgroups)])


def _machine(proc: Path) -> int:
    lines = (proc / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left_by_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """In a container the paths of /proc may be those of the host: then only the root of its own mount is there."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, cgroups / "memory") if controllers else (2, cgroups)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root) and (group / FILES[version][0]).exists():
                yield from _left(group, *FILES[version])


def _left(group: Path, limit_file: str, usage_file: str, cache_key: str) -> Iterator[int]:
    limit = (group / limit_file).read_text().strip()
    if limit == "max":
        return
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / usage_file).read_text()) - int(stat[cache_key])
    yield max(int(limit) - used, 0)
