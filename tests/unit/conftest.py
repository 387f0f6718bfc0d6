"""What several modules need: a tiny dataset and a run root, and what takes seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.config import load
from app.core.run import RunRoot, open_run
from app.report.report import report
from tests.support.data_fixtures import write_dataset
from tests.support.report_fixtures import add_dataset, add_private, build_run


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    """A tiny COCO folder, which the test may spoil."""
    return write_dataset(tmp_path / "coco")


@pytest.fixture
def run(tmp_path: Path) -> RunRoot:
    """A run root of which nothing is there yet."""
    return open_run("r", tmp_path / "runs")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/small, a run with its report and drawn figures, and coco/, its dataset; not to be changed."""
    folder = tmp_path_factory.mktemp("reported")
    run = build_run(folder / "runs")
    add_dataset(run, folder / "coco")
    add_private(run)
    report(load("qat", sets=["report.gallery_images=1"]), run)
    return folder
