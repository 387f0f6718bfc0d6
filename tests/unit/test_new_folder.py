"""A folder gets its name when it is complete, whatever other processes and interrupted ones do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from app.core.files import new_folder


def fill(path: Path, text: str, **options: bool) -> None:
    with new_folder(path, **options) as part:
        (part / "file").write_text(text)
        assert not path.exists() or (path / "file").read_text() != text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "made", "new")
    assert (tmp_path / "deep" / "made" / "file").read_text() == "new"
    assert names(tmp_path / "deep") == ["made"]


@pytest.mark.parametrize(("replace", "stays"), [(False, "old"), (True, "new")])
def test_an_older_folder_is_replaced_only_if_asked(tmp_path: Path, replace: bool, stays: str) -> None:
    fill(tmp_path / "made", "old")
    (tmp_path / "made" / "extra").touch()
    fill(tmp_path / "made", "new", replace=replace)
    assert (tmp_path / "made" / "file").read_text() == stays
    assert (tmp_path / "made" / "extra").exists() != replace
    assert names(tmp_path) == ["made"]


def test_the_folder_of_a_faster_process_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as part:
        (part / "file").write_text("slow")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_text("fast")
    assert (tmp_path / "made" / "file").read_text() == "fast"
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, replace: bool) -> None:
    fill(tmp_path / "made", "old")
    with pytest.raises(OSError, match="no luck"), new_folder(tmp_path / "made", replace) as part:
        (part / "file").write_text("half")
        raise OSError("no luck")
    assert (tmp_path / "made" / "file").read_text() == "old"
    assert names(tmp_path) == ["made"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for ending in ("part", "old"):
        (tmp_path / f".made.{ending}").mkdir()
        (tmp_path / f".made.{ending}" / "half").touch()
    fill(tmp_path / "made", "old")
    fill(tmp_path / "made", "new", replace=True, alone=True)
    assert names(tmp_path / "made") == ["file"]
    assert names(tmp_path) == ["made"]


def test_what_processes_of_earlier_days_left_is_cleared_away_and_nobody_elses(tmp_path: Path) -> None:
    for name, age_s in ((".made.17.part", 3 * 86_400), (".made.18.old", 3 * 86_400), (".made.19.part", 3_600)):
        (tmp_path / name).mkdir()
        stamp = time.time() - age_s
        os.utime(tmp_path / name, (stamp, stamp))
    fill(tmp_path / "made", "new")
    assert names(tmp_path) == [".made.19.part", "made"]


def test_a_name_that_is_taken_by_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "made").touch()
    with pytest.raises(NotADirectoryError):
        fill_over_file(tmp_path / "made")
    assert names(tmp_path) == ["made"]


def fill_over_file(path: Path) -> None:
    with new_folder(path) as part:
        (part / "file").touch()
