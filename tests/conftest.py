"""Shared set-up: Ultralytics must find its settings folder before its first import; the folder of a module's runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.environment import isolate_libraries

# Several tests share the cores: OpenMP threads do not spin (app/core/environment.py lets them spin a little).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process of tests a core: more threads wait for each other
isolate_libraries(Path(tempfile.mkdtemp(prefix="w4a16-tests-")))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of all run roots, so that coco-subset is drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Path]:
    """A folder for the runs of one module. It goes with the module: in the container it lies in memory."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / ".cache").symlink_to(shared_cache)
    yield folder
    shutil.rmtree(folder)
