"""Paths as the user knows them: what a container's message, page and recorded command say in place of its own paths."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path

import pytest

from app.core.environment import environment
from app.core.mounts import MOUNTS, as_known, in_container, only_seen
from app.core.os_errors import explanation
from app.core.progress import Printable
from app.report.appendix import dataset_lines, settings_block
from app.report.tables import plain

# As docker-compose.yml and scripts/job set it for COCO_DIR=/home/u/data/coco CONF=../my.yaml ONNX=/disk/x.onnx.
OUTSIDE = "/host=/\n/conf/0/my.yaml=../my.yaml\n/src=.\n/data/coco=/home/u/data/coco"


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MOUNTS, OUTSIDE)


@pytest.mark.usefixtures("container")
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("/data/coco has no val2017/", "/home/u/data/coco has no val2017/"),
        ("--set data.coco_dir=/data/coco.", "--set data.coco_dir=/home/u/data/coco."),
        ("'/data/coco/a b.jpg', /data/coco", "'/home/u/data/coco/a b.jpg', /home/u/data/coco"),
        ("chown -R 1000 /src/runs", "chown -R 1000 runs"),
        ("in /src", "in ."),
        ("/host/disk/x.onnx is missing", "/disk/x.onnx is missing"),
        ("/conf/0/my.yaml: bad", "../my.yaml: bad"),
        ("/data/coco2 /data/coco-x /data/coco.x", "/data/coco2 /data/coco-x /data/coco.x"),
        ("/home/u/src/data/coco ~/src a/src/b", "/home/u/src/data/coco ~/src a/src/b"),
    ],
)
def test_a_path_of_the_container_is_shown_as_the_user_knows_it(inside: str, outside: str) -> None:
    assert as_known(inside) == outside


def test_without_a_container_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MOUNTS, raising=False)
    assert as_known("/src/runs /data/coco /host/x") == "/src/runs /data/coco /host/x"
    assert (in_container(), only_seen()) == (False, "")


def test_a_folder_that_compose_was_not_given_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MOUNTS, "\n/src=.\n/data/coco=")
    assert as_known("/data/coco /src/runs") == "/data/coco runs"


@pytest.mark.usefixtures("container")
def test_log_lines_pages_and_the_recorded_command_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Printable("%(message)s"))
    handler.emit(logging.LogRecord("app", logging.INFO, "", 0, "wrote %s", (Path("/data/coco/x"),), None))
    assert stream.getvalue() == "wrote /home/u/data/coco/x\n"
    assert plain("# /host/disk/a and /src/runs/b") == "# /disk/a and runs/b"
    monkeypatch.setattr(sys, "argv", ["x", "eval", "--set", "data.coco_dir=/data/coco"])
    assert environment()["command"].endswith("-m app eval --set data.coco_dir=/home/u/data/coco")
    monkeypatch.setattr(sys, "argv", ["app", "eval", "--conf", "/conf/0/my.yaml", "--onnx", "/host/disk/a b.onnx"])
    assert environment()["command"].endswith("-m app eval --conf ../my.yaml --onnx '/disk/a b.onnx'")
    provenance = {"title": "COCO 2017", "coco_dir": "/data/coco", "splits": {}, "seed": 0}
    assert dataset_lines(provenance)[0] == "COCO 2017 in `/home/u/data/coco`."
    assert (
        settings_block({"fp16": {"data": {"coco_dir": "/data/coco"}}})[1] == "data:\n  coco_dir: /home/u/data/coco\n```"
    )


@pytest.mark.usefixtures("container")
def test_a_foreign_runs_folder_names_the_variables_that_compose_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    owner = tmp_path.stat()
    monkeypatch.setattr(os, "getuid", lambda: owner.st_uid + 1)
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "new" / "file"))
    line = explanation(denied, tmp_path, "")
    assert line is not None
    assert f"export APP_UID={owner.st_uid} APP_GID={owner.st_gid}; make does it" in line
    monkeypatch.delenv(MOUNTS)
    assert "APP_UID" not in (explanation(denied, tmp_path, "") or "")


@pytest.mark.usefixtures("container")
def test_a_missing_path_says_what_the_container_sees() -> None:
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/model.onnx")
    line = explanation(gone, Path("runs"), "")
    assert line is not None
    assert line.endswith(
        "(the container sees only runs/, data/, COCO_DIR, and what make is given as A, B, ONNX, WEIGHTS, CONF, "
        "quant.scheme, sensitivity.against or train.weights)"
    )
