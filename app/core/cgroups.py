"""The control groups above this process, which hold the limits of a container or of a batch system's job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group.

    Attributes:
        version: 1 or 2, which name files differently.
        folder: of its files.
    """

    version: int
    folder: Path

    def read(self, name: str) -> str | None:
        """The content of a file; None where the group has none, as the root of version 2."""
        path = self.folder / name
        return path.read_text(encoding="ascii").strip() if path.exists() else None


def groups_above(controller: str) -> Iterator[Group]:
    """The groups that limit this process by a controller ('memory', 'cpu'), from its own to the root.

    In a container the paths of /proc may be those of the host: then only the root of its own mount is there.
    """
    own = PROC / "self" / "cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version, root = (1, CGROUPS / controller) if controllers else (2, CGROUPS)
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and place.exists():
                yield Group(version, place)
