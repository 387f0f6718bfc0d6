"""The price of a job: the arithmetic by hand, a watched process, and the words of the pilot."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from app.core.config import UserError, load
from app.core.memory import pss_bytes
from app.core.results import write_rows
from app.core.run import RunRoot
from app.estimate import estimate as estimate_module
from app.estimate import watch as watch_module
from app.estimate.estimate import Command, estimate
from app.estimate.price import (
    Images,
    Peaks,
    between_epochs,
    eval_seconds,
    limit,
    training_parts,
    training_seconds,
)
from app.estimate.watch import Took, run_watched
from tests.support.report_fixtures import write

SMALL = ["train.batch=4", "train.bn_batches=5", "train.epochs=2"]
ROWS = [
    {"epoch": 1.0, "time/train_s": 90.0, "time/epoch_s": 120.0, "time/bn_reestimation_s": 9.0},
    {"epoch": 2.0, "time/train_s": 32.0, "time/epoch_s": 50.0, "time/bn_reestimation_s": 8.0},
]


def test_a_training_costs_its_start_once_and_its_images_every_epoch() -> None:
    """The pilot's second epoch: 32 train images in 32 s, BN on 20 in 8 s, 5 val images in the remaining 10 s."""
    parts = training_parts(load("fp16", sets=SMALL), Images(32, 5), 200.0, ROWS, 3.0)
    expected = {"start_s": 24.0, "image_s": 1.0, "val_image_s": 2.0, "bn_image_s": 0.4, "between_s": 3.0}
    assert parts == pytest.approx(expected)
    job = load("fp16", sets=["train.batch=8", "train.bn_batches=5", "train.epochs=7", "train.val_every=2"])
    seconds = training_seconds(job, Images(100, 10), parts)  # validated after epochs 2, 4, 6 and 7; BN on 40 images
    expected = {"start": 24.0, "steps": 700.0, "validation": 80.0, "BatchNorm": 64.0, "checkpoints": 21.0}
    assert seconds == pytest.approx(expected)
    few = training_seconds(job, Images(30, 10), parts)  # BN on all images where they are fewer than its batches
    assert few["BatchNorm"] == pytest.approx(48.0)


def test_what_an_epoch_takes_after_its_line_is_read_from_the_log() -> None:
    """The second line comes 53.5 s after the first one, and results.csv knows of 50.0 of them."""
    lines = (
        "2026-11-27 11:59:59,000 app.train.train INFO train fp16: yolov10n, 2 epochs",
        "2026-11-27 12:00:58,000 app.core.progress INFO fp16 epoch 1/2: 64/96, 12.0 images/s, loss 9.1",
        "2026-11-27 12:01:00,250 app.train.monitor INFO fp16 epoch 1/2: loss 9.100, AP raw 0.000",
        "2026-11-27 12:01:53,750 app.train.monitor INFO fp16 epoch 2/2: loss 8.900, AP raw 0.000",
    )
    assert between_epochs("\n".join(lines), ROWS) == pytest.approx(3.5)
    assert between_epochs("\n".join(lines[:3]), ROWS[:1]) == 0


def test_eval_costs_what_is_not_images_once() -> None:
    """Two files of 5 s for 10 images, and 6 times 0.5 s at the clock each; of 25 s nothing else but 9 s is left."""
    latency = {"warmup": 1, "runs": 5, "p50": 500.0}
    scored = [{"time_s": {"total": 4.0, "score": 1.0}, "dataset": {"n_images": 10}, "latency_ms": latency}] * 2
    job = load("qat", sets=["eval.latency_warmup=3", "eval.latency_runs=20"])
    assert eval_seconds(job, 25.0, scored, 50) == pytest.approx({"start": 9.0, "images": 50.0, "latency": 23.0})


def test_memory_grows_with_the_batch_and_says_what_fits() -> None:
    peaks = Peaks(half_batch=8, half_bytes=600, batch=16, bytes=1000)  # 200 and 50 an image
    assert peaks.at(32) == 1800
    assert peaks.largest_batch(2000, 0.9) == 32
    assert peaks.largest_batch(100, 0.9) == 0
    assert Peaks(1, 500, 1, 500).largest_batch(2000, 0.9) is None
    assert Peaks(8, 600, 16, 590).largest_batch(2000, 0.9) is None, "a smaller peak tells nothing"


@pytest.mark.parametrize(
    ("gpu_use", "cpu_use", "part"),
    [(None, 1.0, "processor"), (0.95, 0.2, "GPU"), (0.5, 0.95, "loader"), (0.5, 0.3, "loader or disk")],
)
def test_what_is_busy_limits(gpu_use: float | None, cpu_use: float, part: str) -> None:
    assert limit(gpu_use, cpu_use)[0] == part


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """What `python -m app` is for run_watched."""
    monkeypatch.setattr(watch_module.sys, "executable", "/bin/sh")
    monkeypatch.setattr(watch_module, "PROGRAM", ["-c", text])


def test_memory_of_all_processes_of_a_stage_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = f"{sys.executable} -c 'import time; held = bytearray(40_000_000); time.sleep(1.5)'"
    program(monkeypatch, f"{python} & {python}; wait")
    took = run_watched([], tmp_path / "said.txt")
    assert 80e6 < took.peak_bytes < 160e6
    assert took.seconds > 1.4
    assert 0 < took.cpu_s < took.seconds


def test_a_failed_stage_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "echo working; echo 'error: no COCO folder at x: give COCO_DIR=path' >&2; exit 2")
    with pytest.raises(UserError, match="the pilot's 'data' ended with exit code 2: no COCO folder at x: give"):
        run_watched(["data"], tmp_path / "said.txt")


def test_shared_memory_counts_once() -> None:
    assert pss_bytes("Rss:  900 kB\nPss:  512 kB\nPss_Dirty: 5 kB\n") == 512 * 1024


def fake_stage(words: list[str], log_path: Path) -> Took:
    """Writes what a stage leaves behind, and says that it took a minute."""
    settings = dict(word.split("=") for word in words[words.index("--set") :] if "=" in word)
    root = Path(words[words.index("--runs-dir") + 1]) / words[words.index("--run") + 1]
    if words[0] == "data":
        counts = dict.fromkeys(("n_listed", "n_broken", "n_annotations", "n_crowd", "n_without_objects"), 0)
        facts: dict[str, Any] = {"annotation_sha256": "", "image_ids_sha256": "", "image_ids": None, "subset": False}
        train = {**counts, **facts, "name": "train2017", "n_images": 1000}
        splits = {"train": train, "val": {**train, "name": "val2017", "n_images": 100}}
        tree = {"title": "", "names": ["a"], "coco_dir": "/", "seed": 0, "splits": splits, "view_dir": "/"}
        write(root / "dataset" / "provenance.json", tree)
    if words[0] == "train":
        folder = root / ("fp16" if "fp16" in words else "qat-w4a16")
        folder.mkdir(parents=True)
        n_train, n_val = int(settings["data.n_train"]), int(settings["data.n_val"])
        row = {"time/train_s": 0.1 * n_train, "time/epoch_s": 0.1 * n_train + 0.02 * n_val}
        write_rows(folder / "results.csv", [{"epoch": epoch, **row} for epoch in (1.0, 2.0)])
        (folder / "log.txt").write_text("")
    if words[0] == "eval":
        latency = {"warmup": 1, "runs": 5, "p50": 1000.0}
        metrics = {"time_s": {"total": 3.0, "score": 1.0}, "dataset": {"n_images": int(settings["data.n_val"])}}
        metrics["latency_ms"] = latency
        write(root / "baseline-coco" / "metrics.json", metrics)
    return Took(seconds=60.0, cpu_s=60.0, peak_bytes=int(settings.get("train.batch", "0")) * 2**30)


def test_the_pilots_words_and_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(words: list[str], log_path: Path) -> Took:
        calls.append(words)
        return fake_stage(words, log_path)

    monkeypatch.setattr(estimate_module, "run_watched", run)
    monkeypatch.setattr(estimate_module, "sees_gpu", lambda: False)
    sets = ["train.imgsz=320", "train.epochs=10", "train.batch=32", "data.coco_dir=/a place"]
    estimate(Command([], sets), RunRoot(tmp_path, "small"))
    facts = json.loads((tmp_path / "small" / "estimate.json").read_text())
    assert [words[0] for words in calls] == ["data", "train", "train", "train", "ptq", "export", "eval", "report"]
    assert all("data.coco_dir=/a place" in words for words in calls)
    # 850,000 px hold 8 images of 320 px, 2.5 million 3 batches of them, and 1.65 million 16 images.
    assert {key: facts["pilot"][key] for key in ("batch", "n_train", "n_val")} == {
        "batch": 8,
        "n_train": 24,
        "n_val": 16,
    }
    assert facts["pilot"]["seconds"] == dict.fromkeys(["train fp16", "train qat", *estimate_module.AFTER], 60.0)
    half = dict(word.split("=") for word in calls[3][calls[3].index("--set") :] if "=" in word)
    assert (half["train.batch"], half["data.n_train"], half["train.epochs"]) == ("4", "8", "1")
    seconds = facts["seconds"]
    assert seconds["train qat"]["steps"] == pytest.approx(10 * 1000 * 0.1)
    assert seconds["train qat"]["validation"] == pytest.approx(10 * 100 * 0.02)
    assert seconds["eval"] == pytest.approx({"start": 50.0, "images": 4 / 16 * 100, "latency": 110.0})
    assert facts["hours"]["whole job"] == pytest.approx(sum(sum(parts.values()) for parts in seconds.values()) / 3600)
    assert facts["ram"]["peak_gib"] == pytest.approx(32)  # 8 GiB at batch 8, 4 at batch 4
    assert facts["ram"]["train_cache_gib"] == pytest.approx(1000 * 3 * 320 * 240 / 2**30)
    assert os.listdir(tmp_path) == ["small"], "nothing of the pilot stays"
