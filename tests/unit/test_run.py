"""Run root: names, atomic writes, messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.core.config import UserError
from app.core.environment import REPO_DIR
from app.core.files import read_json, write_atomic, write_json, write_text
from app.core.os_errors import explain_os_errors
from app.core.run import RunRoot, hold, open_run, record_stage

WAIT_S = 60  # for another process to start


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


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], object]) -> None:
    """Runs `action` in a process of its own, which it must end by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("n_bytes", [0, 1, 5, 9, 10])
def test_kill_at_any_byte_of_a_write_leaves_the_old_file_whole(tmp_path: Path, n_bytes: int) -> None:
    path, new = tmp_path / "x.json", '{"a": 222}'
    write_json(path, {"a": 1})

    def write(part: Path) -> None:
        part.write_text(new[:n_bytes])
        die()

    killed(lambda: write_atomic(path, write))
    assert read_json(path, "data") == {"a": 1}


@pytest.mark.parametrize(
    ("point", "survives"), [("os.fsync", 1), ("pathlib.Path.replace", 1), ("pathlib.Path.unlink", 222)]
)
def test_kill_before_fsync_or_rename_leaves_the_old_file_and_after_it_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, survives: int
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(point, die)
        killed(lambda: write_json(path, {"a": 222}))
    assert read_json(path, "data") == {"a": survives}


@pytest.mark.parametrize("point", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.write_text"])
def test_failing_write_fsync_or_rename_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(point, fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_json(path, {"a": 222})
    assert read_json(path, "data") == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("links", [True, False])
def test_the_file_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also where the file system has no hard links."""
    path, previous = tmp_path / "x", tmp_path / "x-1"

    def refuse(*args: Any) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    for text in ("a", "b", "c"):
        write_atomic(path, lambda part, text=text: part.write_text(text), previous)
    assert (path.read_text(), previous.read_text()) == ("c", "b")
    assert sorted(os.listdir(tmp_path)) == ["x", "x-1"]


def test_a_full_disk_is_a_line_and_the_old_file_stays(tmp_path: Path) -> None:
    """A real limit of the kernel: no file of this process may grow beyond it."""
    path = tmp_path / "x.txt"
    write_text(path, "old")
    code = (
        "import resource, sys; from pathlib import Path; from app.core.files import *; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_text(Path(sys.argv[1]), 'n' * 2000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=REPO_DIR, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.stderr.endswith("OSError: [Errno 27] File too large\n")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]
    with (
        pytest.raises(UserError, match=r"no space left in .* MiB free\): make room"),
        explain_os_errors(tmp_path, "make room"),
    ):
        raise OSError(27, "File too large")


# --- one process at a time -------------------------------------------------------------------------------------------


def holder(run: RunRoot) -> subprocess.Popen[str]:
    """Another process that holds the run root."""
    code = (
        "import sys; from pathlib import Path; from app.core.run import hold; from app.core.run import RunRoot\n"
        "with hold(RunRoot(Path(sys.argv[1]), sys.argv[2]), 'train'):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.runs_dir), run.name]
    process = subprocess.Popen(command, cwd=REPO_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_on_a_run_root_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = open_run("r", tmp_path)
    with holder(run) as process:
        expected = rf"/r is in use by 'train' \(process {process.pid} on .*\): let it end, or take another RUN=name"
        with pytest.raises(UserError, match=expected), hold(run, "report"):
            pass
        with hold(open_run("other", tmp_path), "report"):
            pass
        process.kill()
        process.wait(WAIT_S)
        with hold(run, "report"):  # the kernel has taken the lock away
            pass


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    run = open_run("r", tmp_path)
    write_text(run.root / "fp16" / "weights" / ".last.pt.77.part", "half")
    write_text(run.root / "fp16" / "weights" / "last.pt", "whole")
    with hold(run, "train"):
        assert os.listdir(run.root / "fp16" / "weights") == ["last.pt"]


@pytest.mark.parametrize("stage", ["data", "train --variant qat", "export", "eval", "report"])
def test_every_stage_that_writes_is_refused(tmp_path: Path, stage: str) -> None:
    run = open_run("r", tmp_path)
    with holder(run) as process:
        command = [sys.executable, "-m", "app", *stage.split(), "--run", "r", "--runs-dir", str(tmp_path)]
        done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, timeout=WAIT_S)
        process.kill()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run.root} is in use by 'train' (process {process.pid} on ")
    assert done.stderr.count("\n") == 1


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


def test_trainings_come_before_ptq_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    run = open_run("r", tmp_path)
    for label in ("qat-w4a16", "ptq-w4a16-bn", "fp16", "aaa", "ptq-w4a16"):
        write_json(run.variant_dir(label) / "done.json", {})
    run.variant_dir("qat-w8a16").mkdir()
    labels = [str(label) for label in run.finished_labels()]
    assert labels == ["fp16", "qat-w4a16", "aaa", "ptq-w4a16", "ptq-w4a16-bn"]
