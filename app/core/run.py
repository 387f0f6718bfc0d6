"""The run root: the paths of its files, its lock, and its record of stages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.config import UserError
from app.core.environment import code_version, utc_now
from app.core.files import read_json, write_json
from app.core.labels import Label

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@contextlib.contextmanager
def hold(run: RunRoot, stage: str) -> Iterator[None]:
    """Locks the run root for this process, and removes half-written files that a killed process has left there.

    It is a POSIX lock: loader processes do not inherit it, and the kernel releases it when the process ends in any way.
    The lock file is in the shared cache, so that a stage that refuses its input creates no run root.

    Raises:
        UserError: another process holds the lock; the message names the process.
    """
    path = run.cache_dir / "locks" / run.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{run.root} is in use by {file.read().strip()}: let it end, or take another RUN=name"
            ) from error
        file.truncate(0)
        file.write(f"'{stage}' (process {os.getpid()} on {socket.gethostname()}, since {utc_now()})\n")
        file.flush()
        for part in run.root.rglob(".*.part"):
            part.unlink()
        yield


@dataclass(frozen=True)
class RunRoot:
    """Paths of runs/<name>. Stages exchange data only through these files."""

    runs_dir: Path
    name: str

    @property
    def root(self) -> Path:
        return self.runs_dir / self.name

    @property
    def cache_dir(self) -> Path:
        """Folder that all runs share: the drawn coco-subset, YOLO views, locks, Ultralytics' settings."""
        return self.runs_dir / ".cache"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def dataset_yaml(self) -> Path:
        return self.root / "dataset" / "coco.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "dataset" / "provenance.json"

    def variant_dir(self, label: Label | str) -> Path:
        """Folder of a checkpoint: fp16 or qat-<scheme> of a training, ptq-<scheme> or ptq-<scheme>-bn of PTQ."""
        return self.root / str(label)

    def best(self, label: Label | str) -> Path:
        """The checkpoint that is exported."""
        return self.variant_dir(label) / "weights" / "best.pt"

    def finished_labels(self) -> list[Label]:
        """Labels of the finished checkpoints: fp16, the other trainings, then PTQ."""
        labels = [Label.parse(path.parent.name) for path in self.root.glob("*/done.json")]
        return sorted(labels, key=lambda label: (label.method == "ptq", label.order))

    @property
    def onnx_dir(self) -> Path:
        return self.root / "onnx"

    @property
    def summary(self) -> Path:
        return self.root / "summary.md"

    @property
    def figures_dir(self) -> Path:
        return self.root / "figures"


def open_run(name: str, runs_dir: Path) -> RunRoot:
    """Checks the name of a run. It creates no folder; a stage does when it writes its first file."""
    if not RUN_NAME.fullmatch(name):
        raise UserError(f"--run '{name}': use letters, digits, '.', '_' and '-' (it becomes a folder under {runs_dir})")
    return RunRoot(runs_dir, name)


def record_stage(run: RunRoot, stage: str, facts: dict[str, Any]) -> None:
    """Writes to run.json what a stage did, when, and with which code."""
    record = {"name": run.name, "stages": {}}
    if run.run_json.exists():
        record = read_json(run.run_json, "data")
    record["stages"][stage] = {"time_utc": utc_now(), "code_version": code_version(), **facts}
    write_json(run.run_json, record)
