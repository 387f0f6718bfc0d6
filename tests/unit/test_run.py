"""Run root: names, atomic writes, messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.config import UserError
from app.run import open_run, read_json, record_stage, write_atomic, write_json


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "ü"])
def test_run_name_that_is_no_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--run"):
        open_run(name, tmp_path)


def test_opening_a_run_writes_nothing(tmp_path: Path) -> None:
    assert open_run("a-1.b_2", tmp_path / "runs").root == tmp_path / "runs" / "a-1.b_2"
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(part: Path) -> None:
        part.write_text("{half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, fail)
    assert read_json(path, "data") == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_nan_never_reaches_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"AP": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_and_broken_json_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'make eval' first"):
        read_json(tmp_path / "metrics.json", "eval")
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "metrics.json", "eval")


def test_stages_are_recorded_side_by_side(tmp_path: Path) -> None:
    run = open_run("r", tmp_path)
    record_stage(run, "data", {"n": 1})
    record_stage(run, "export fp16", {"n": 2})
    stages = read_json(run.run_json, "data")["stages"]
    assert list(stages) == ["data", "export fp16"]
    assert stages["data"]["n"] == 1


def test_fp16_comes_first_and_unfinished_trainings_do_not_count(tmp_path: Path) -> None:
    run = open_run("r", tmp_path)
    for label in ("qat-w4a16", "fp16", "aaa"):
        write_json(run.variant_dir(label) / "done.json", {})
    run.variant_dir("qat-w8a16").mkdir()
    assert run.trained_labels() == ["fp16", "aaa", "qat-w4a16"]
