"""The run root: the paths of its files, its lock, its record of stages, and how many images it has."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.config import Config, UserError
from app.core.environment import code_version, utc_now
from app.core.files import printable, read_json, write_json
from app.core.labels import Label
from app.core.os_errors import lock
from app.core.shapes import Count, FolderName, Id, PathText, Shape

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
RESERVED_NAMES = ("log.md", "reports", "compare", "eval")  # what publish, compare and eval write beside the runs
MAX_NAME = 100  # characters: file names are made of it
SPLIT_SHAPE = {
    "name": FolderName, "annotation_sha256": str, "image_ids_sha256": str, "image_ids": list[Id] | None,
    "subset": bool, "n_images": Count, "n_listed": Count, "n_broken": Count, "n_annotations": Count, "n_crowd": Count,
    "n_without_objects": Count, "images?": PathText, "annotations?": PathText, "part?": str | None,
    "images_sha256?": str, "n_clipped?": Count, "n_dropped?": Count, "n_unlisted?": Count, "notes?": dict[str, Count],
}  # fmt: skip
PROVENANCE_SHAPE: Shape = {
    "title": str, "coco_dir": PathText, "seed": Count, "names?": list[str],
    **{f"splits.{split}.{key}": kind for split in ("train", "val") for key, kind in SPLIT_SHAPE.items()},
}  # fmt: skip
VIEW_SHAPE: Shape = {**PROVENANCE_SHAPE, "view_dir": PathText, "names": list[str]}
SWEEP_FILE = "sweep.json"  # in the folder of a sweep: its runs, one a seed
SEED_OF_SWEEP = "-seed"  # in the names of its runs, before the seed
SWEEP_SHAPE: Shape = {"runs": dict[str, Count]}
RECORD_SHAPE: Shape = {"stages": dict[str, dict[str, Any]]}


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
            is_locked = lock(file)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{run.root} is in use by {file.read().strip()}: let it end, or take another RUN=name"
            ) from error
        file.truncate(0)
        file.write(f"'{stage}' (process {os.getpid()} on {socket.gethostname()}, since {utc_now()})\n")
        file.flush()
        for part in run.root.rglob(".*.part") if is_locked else ():
            if part.is_file() or part.is_symlink():
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
        """Folder that all runs share: the drawn shapes, YOLO views, locks, Ultralytics' settings."""
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

    def done(self, label: Label | str) -> Path:
        """What says that a training, or PTQ, is finished: written last."""
        return self.variant_dir(label) / "done.json"

    def finished(self, label: Label | str) -> Path:
        """The checkpoint of a training that is finished: a later epoch may still replace another one's.

        Raises:
            UserError: there is none.
        """
        if not self.done(label).exists():
            command = f"make train-{Label.parse(str(label)).method}"
            raise UserError(f"{self.root} has no finished training of {label}: run '{command}' first")
        return self.best(label)

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
        raise UserError(
            f"--run '{printable(name)}': use letters, digits, '.', '_' and '-' (it becomes a folder under {runs_dir})"
        )
    if len(name) > MAX_NAME:
        raise UserError(f"--run {name[:10]}...: {len(name)} characters are too many, {MAX_NAME} at most")
    if name.lower() in RESERVED_NAMES:
        raise UserError(f"--run '{name}': {runs_dir / name} is no run, choose another name")
    return RunRoot(runs_dir, name)


def runs_of(names: Iterable[str], runs_dir: Path) -> list[RunRoot]:
    """The runs with these names, each once; in place of a sweep those that it is made of."""
    found: list[str] = []
    for name in names:
        path = open_run(name, runs_dir).root / SWEEP_FILE
        of_sweep = list(read_json(path, "sweep", SWEEP_SHAPE)["runs"]) if path.exists() else [name]
        if not of_sweep:
            raise UserError(f"{path} names no runs: run 'make sweep' again")
        found += of_sweep
    return [open_run(name, runs_dir) for name in dict.fromkeys(found)]


def sweep_of(run: RunRoot) -> RunRoot | None:
    """The sweep that has made a run, which it names <sweep>-seed<N>."""
    name, is_named, _ = run.name.rpartition(SEED_OF_SWEEP)
    sweep = RunRoot(run.runs_dir, name)
    path = sweep.root / SWEEP_FILE
    is_of_it = bool(is_named) and path.exists() and run.name in read_json(path, "sweep", SWEEP_SHAPE)["runs"]
    return sweep if is_of_it else None


def record_stage(run: RunRoot, stage: str, facts: dict[str, Any]) -> None:
    """Writes to run.json what a stage did, when, and with which code."""
    record = {"name": run.name, "stages": {}}
    if run.run_json.exists():
        record = read_json(run.run_json, "data", RECORD_SHAPE)
    record["stages"][stage] = {"time_utc": utc_now(), "code_version": code_version(), **facts}
    write_json(run.run_json, record)


@dataclass(frozen=True)
class Images:
    """How many images a run trains and validates on."""

    train: int
    val: int


def images_of(run: RunRoot) -> Images:
    """The numbers that the data stage has chosen; raises a UserError if it has not run."""
    splits = read_json(run.provenance, "data", VIEW_SHAPE)["splits"]
    return Images(splits["train"]["n_images"], splits["val"]["n_images"])


def n_bn_images(config: Config, images: Images) -> int:
    """How many images BatchNorm is re-estimated on: train.bn_batches batches, or all where they are fewer."""
    return min(config.train.bn_batches * config.train.batch, images.train)
