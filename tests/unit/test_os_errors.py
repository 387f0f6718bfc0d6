"""What the operating system refuses is one line with the remedy, in every stage; locks and links are not needed."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from app import __main__ as cli
from app.core import os_errors
from app.core.config import UserError
from app.core.files import write_text
from app.core.os_errors import explain_os_errors, explanation
from app.core.run import hold, open_run

EXPLAINED = (*os_errors.REMEDIES, *os_errors.DENIED_ERRNOS)


@pytest.mark.parametrize("number", EXPLAINED, ids=lambda number: errno.errorcode[number])
def test_every_refusal_names_path_and_remedy(tmp_path: Path, number: int) -> None:
    path = tmp_path / "runs" / "r" / "x.json"
    with pytest.raises(UserError) as raised, explain_os_errors(tmp_path, "make room"):
        raise OSError(number, os.strerror(number), str(path))
    line = str(raised.value)
    assert line.startswith(f"{path} ")
    assert ":" in line.removeprefix(str(path)) or "," in line
    assert "\n" not in line


def test_the_target_of_a_rename_or_link_is_named(tmp_path: Path) -> None:
    error = OSError(errno.EPERM, "not permitted", str(tmp_path / "a"), None, str(tmp_path / "b"))
    line = explanation(error, tmp_path, "")
    assert line is not None
    assert line.startswith(f"{tmp_path / 'b'} may not be written by this user (uid ")


def test_whose_folder_it_is_stands_in_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    line = explanation(PermissionError(errno.EACCES, "denied", str(tmp_path / "runs" / "r")), tmp_path, "")
    owner = tmp_path.stat().st_uid
    assert line is not None
    assert f"(uid 65534): {tmp_path} belongs to uid {owner}; " in line
    assert f"sudo chown -R 65534 {tmp_path}" in line


@pytest.mark.parametrize("free", [0, 5])
def test_a_disk_without_inodes_is_told_from_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    disk = os.statvfs(tmp_path)
    values = (*disk[:5], 1000, free, free, *disk[8:])
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    line = explanation(OSError(errno.ENOSPC, "No space left on device"), tmp_path, "make room")
    assert line is not None
    assert ("it takes no more files" in line) == (free == 0)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("no number"), TimeoutError(), OSError(errno.EIO, "x")])
def test_a_fault_of_ours_stays_one(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_os_errors(tmp_path, "make room"):
        raise error
    assert not isinstance(raised.value, UserError)


def end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["app", *words])
    monkeypatch.setattr("app.core.progress.set_up_terminal", lambda: None)
    code = cli.main()
    return code, [record.getMessage() for record in caplog.records]


STAGES = ("data", "train --variant fp16", "ptq", "export", "eval", "report", "publish", "all")


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_in_place_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    (tmp_path / "runs").write_text("")
    code, lines = end(monkeypatch, caplog, *stage.split(), "--runs-dir", str(tmp_path / "runs"), "--run", "r")
    assert code == 2
    assert len(lines) == 1
    assert str(tmp_path / "runs") in lines[0]


@pytest.mark.parametrize("name", ["LOG.md", "reports", ".cache", "log.MD", "a" * 101, "a\x1b[2J", "-", "..", "a/b", ""])
@pytest.mark.parametrize("stage", ["report", "publish"])
def test_names_that_are_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str, name: str
) -> None:
    (tmp_path / "LOG.md").write_text("# Runs")
    (tmp_path / "reports").mkdir()
    code, lines = end(monkeypatch, caplog, stage, "--runs-dir", str(tmp_path), f"--run={name}")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert sorted(os.listdir(tmp_path)) == ["LOG.md", "reports"] or name == "-"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_a_file_system_without_locks_gets_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os_errors.lock, "__defaults__", (refuse,))
    run = open_run("r", tmp_path)
    write_text(run.root / "fp16" / ".last.pt.77.part", "of a process that may be alive")
    with hold(run, "train"):
        assert (run.root / "fp16" / ".last.pt.77.part").exists()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}/.cache/locks/r: its file system has no locks; ")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_held_lock_is_no_missing_one(tmp_path: Path, number: int) -> None:
    def held(file: IO[Any], flags: int) -> None:
        assert flags == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise OSError(number, os.strerror(number))

    with open(tmp_path / "lock", "w") as file, pytest.raises(BlockingIOError):
        os_errors.lock(file, held)


def test_a_folder_that_cannot_be_flushed_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"
