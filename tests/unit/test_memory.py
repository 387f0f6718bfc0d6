"""Memory that is left, read from /proc and cgroups written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core import cgroups
from app.core.memory import available_bytes

GIB = 2**30


def group(folder: Path, limit: str, used_gib: float, cached_gib: float, version: int = 2) -> None:
    limit_file, usage_file, key = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{int(used_gib * GIB)}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{key} {int(cached_gib * GIB)}\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 GiB are available on the machine."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 33554432 kB\nMemAvailable: {20 * 2**20} kB\nCached: 1 kB\n")
    return tmp_path / "proc"


def test_without_cgroups_it_is_the_machines(proc: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/user.slice\n")
    assert available_bytes() == 20 * GIB


def test_a_container_sees_its_group_at_the_root(proc: Path, tmp_path: Path) -> None:
    """8 GiB, 3 used, of which 1 is cached files that the kernel gives back."""
    (proc / "self" / "cgroup").write_text("0::/\n")
    group(tmp_path / "cgroup", str(8 * GIB), 3, 1)
    assert available_bytes() == 6 * GIB


def test_the_narrowest_of_nested_groups_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/a.slice/b.scope\n")
    group(tmp_path / "cgroup" / "a.slice" / "b.scope", "max", 1, 0)
    group(tmp_path / "cgroup" / "a.slice", str(4 * GIB), 2.5, 0.5)
    assert available_bytes() == 2 * GIB


def test_version_1_with_a_path_of_the_host(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n")
    group(tmp_path / "cgroup" / "memory", str(2 * GIB), 0.5, 0, version=1)
    assert available_bytes() == 3 * GIB // 2


def test_a_group_beyond_its_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    group(tmp_path / "cgroup", str(GIB), 2, 0)
    assert available_bytes() == 0
