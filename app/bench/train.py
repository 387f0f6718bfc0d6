"""Images a second of whole training loops on the same data, in turns: Ultralytics', compiled too, our FP16 and QAT."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.coco.dataset import SPLITS
from app.core.child import job_words
from app.core.config import Config, UserError, load
from app.core.environment import environment
from app.core.files import read_json, write_json, write_text
from app.core.results import read_rows
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
# Arm -> its name in the table.
ARMS = {
    "stock": "stock yolo train", "compiled": "yolo train compile=True", "fp16": "our fp16", "qat": "our qat"
}  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """What is measured: `rounds` turns of every arm of `arms`, each of `epochs` after a first that is told apart.

    In its first epoch an arm compiles kernels, or captures its graph.
    """

    rounds: int
    epochs: int
    arms: list[str]


def bench_train(run: RunRoot, overlays: list[Path], sets: list[str], turns: Turns) -> None:
    """Trains each arm in a process of its own, in turns; prints the medians over epochs, validation left out."""
    sets = [*sets, f"train.epochs={turns.epochs + 1}", f"train.val_every={turns.epochs + 1}", "hyp.close_mosaic=0"]
    config = load("qat", overlays, sets)
    prepare(config, run, force=False)
    rates: dict[str, list[float]] = {}
    train = config.train
    result = {
        "model": config.model,
        "imgsz": train.imgsz,
        "batch": train.batch,
        "workers": train.workers,
        "cache": train.cache,
        "deterministic": train.deterministic,
        "scheme": config.label,
        "images_per_s": rates,
        "first_epoch_s": {},
        "environment": environment(),
    }
    n_images = read_json(run.provenance, "data")["splits"]["train"]["n_images"]
    for turn in range(turns.rounds):
        for arm in turns.arms:
            first, *others = measure(run, arm, overlays, sets)
            rates.setdefault(arm, []).extend(others)
            result["first_epoch_s"].setdefault(arm, []).append(n_images / first)
            log.info("turn %d, %s: %.0f images/s", turn + 1, arm, statistics.median(rates[arm]))
            write_json(run.root / "bench-train.json", result)  # what there is, if the next one is cut off
    show(result)


def measure(run: RunRoot, arm: str, overlays: list[Path], sets: list[str]) -> list[float]:
    """Images/s of every epoch of one training."""
    if arm in ("stock", "compiled"):
        return measure_stock(run, load("fp16", overlays, sets), arm == "compiled")
    run_child([*train_command(run, arm, overlays, sets), "--force"])
    config = load(arm, overlays, sets)
    return [row["time/images_per_s"] for row in read_rows(run.variant_dir(config.label) / "results.csv")]


def train_command(run: RunRoot, variant: str, overlays: list[Path], sets: list[str]) -> list[str]:
    """The train stage as a command."""
    command = [sys.executable, "-W", "ignore", "-m", "app", "train", "--variant", variant]
    return [*command, *job_words(run.name, run.runs_dir, overlays, sets)]


def visible_gpus() -> list[str]:
    """Indices for CUDA_VISIBLE_DEVICES; one empty string where there is no GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return given.split(",")
    return [str(i) for i in range(torch.cuda.device_count())] or [""]


def run_child(command: list[str]) -> None:
    """One training in a process of its own; what it says is shown only where it fails.

    Raises:
        UserError: it failed, with its last line.
    """
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    check_ended("a training", result.returncode, result.stderr)


def check_ended(training: str, code: int, said: str) -> None:
    """Raises a UserError with the last line that a training of a bench said, if it failed."""
    if code:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{training} of this bench ended with exit code {code}: {last}")


def measure_stock(run: RunRoot, config: Config, compiles: bool) -> list[float]:
    """The same recipe through Ultralytics' own trainer, with or without torch.compile."""
    stock_dir = run.root / "stock"
    shutil.rmtree(stock_dir, ignore_errors=True)
    stock_dataset(run, stock_dir)
    write_text(stock_dir / "config.json", json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-W", "ignore", "-m", "app.bench.stock", str(stock_dir)]
    if compiles:
        command.append("compile")
    run_child(command)
    return json.loads((stock_dir / "images_per_s.json").read_text(encoding="utf-8"))


def stock_dataset(run: RunRoot, stock_dir: Path) -> None:
    """Writes coco.yaml and all that it names into a new folder: Ultralytics' label scan writes beside the labels."""
    view = Path(read_json(run.provenance, "data")["view_dir"])
    shutil.copytree(view, stock_dir / "view", symlinks=True)
    copied_view = str((stock_dir / "view").resolve())
    for split in SPLITS:
        listed = (run.dataset_yaml.parent / f"{split}.txt").read_text(encoding="utf-8")
        write_text(stock_dir / f"{split}.txt", listed.replace(str(view), copied_view))
    dataset_yaml = run.dataset_yaml.read_text(encoding="utf-8")
    dataset_yaml = dataset_yaml.replace(str(run.dataset_yaml.parent.resolve()), str(stock_dir.resolve()))
    write_text(stock_dir / "coco.yaml", dataset_yaml)


def show(result: dict[str, Any]) -> None:
    medians = {arm: statistics.median(rates) for arm, rates in result["images_per_s"].items()}
    cells = [["loop", "images/s", "lowest", "highest", "to stock", "to our fp16", "first epoch s"]]
    for arm, rates in result["images_per_s"].items():
        median = medians[arm]
        numbers = [f"{value:.0f}" for value in (median, min(rates), max(rates))]
        ratios = []
        for base in ("stock", "fp16"):
            ratios.append(f"{median / medians[base]:.3f}" if base in medians else MISSING)
        first_s = statistics.median(result["first_epoch_s"][arm])
        cells.append([ARMS[arm], *numbers, *ratios, f"{first_s:.0f}"])
    log.info("%s, %d px, batch %d, %d workers", *(result[key] for key in ("model", "imgsz", "batch", "workers")))
    for line in markdown_table(cells):
        log.info("%s", line)
