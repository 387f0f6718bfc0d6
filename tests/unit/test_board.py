"""TensorBoard's run names: those of our folders, without /tensorboard, for runs that come and go."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories

from app.train import board

EVENTS = "events.out.tfevents.1.host.1.0"


def add_training(runs_dir: Path, name: str) -> Path:
    folder = runs_dir / name / "tensorboard"
    folder.mkdir(parents=True)
    (folder / EVENTS).write_bytes(b"")
    return folder


def names_of_runs(links: Path) -> set[str]:
    """As TensorBoard itself walks its log folder and names what it finds."""
    return {str(Path(folder).relative_to(links)) for folder in GetLogdirSubdirectories(str(links))}


@pytest.fixture
def links(tmp_path: Path) -> Path:
    folder = tmp_path / "links"
    folder.mkdir()
    return folder


def test_runs_have_the_names_of_their_trainings(tmp_path: Path, links: Path) -> None:
    for name in ("smoke/fp16", "smoke/qat-w4a16", "full/fp16", ".cache/hidden"):
        add_training(tmp_path / "runs", name)
    board.link_events(tmp_path / "runs", links)
    assert names_of_runs(links) == {"smoke/fp16", "smoke/qat-w4a16", "full/fp16"}


def test_new_runs_appear_and_deleted_ones_go(tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's loop, one turn at a time."""
    runs_dir = tmp_path / "runs"
    gone = add_training(runs_dir, "old/fp16")
    board.link_events(runs_dir, links)
    assert names_of_runs(links) == {"old/fp16"}
    (gone / EVENTS).unlink()
    gone.rmdir()
    add_training(runs_dir, "new/fp16")
    turns = iter([False, True])
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: next(turns))
    board.keep_current(runs_dir, links, stop)
    assert names_of_runs(links) == {"new/fp16"}


def test_no_run_yet(tmp_path: Path, links: Path) -> None:
    board.link_events(tmp_path / "runs", links)
    assert names_of_runs(links) == set()
