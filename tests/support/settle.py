"""Configuration and data of the small trainings in tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.core.config import Config, load
from app.core.run import RunRoot
from app.data.prepare import prepare

FIXED = {
    "model": "yolov10n.yaml", "data.coco_dir": "coco-subset", "train.imgsz": 64, "train.workers": 0,
    "train.device": "cpu", "train.bn_batches": 1,
}  # fmt: skip
AT_EVERY_STEP = {"train.save_every_s": 1e-9}  # a checkpoint, for trainings that are interrupted


def sets_of(settings: Mapping[str, Any]) -> list[str]:
    """FIXED and `settings`, which outweigh it, as the command line takes them."""
    return [f"{key}={value}" for key, value in {**FIXED, **settings}.items()]


def settle(runs_dir: Path, name: str, variant: str, settings: Mapping[str, Any]) -> tuple[Config, RunRoot]:
    """Configuration of a training, and the run root runs_dir/name with a prepared dataset."""
    config, run = load(variant, sets=sets_of(settings)), RunRoot(runs_dir, name)
    prepare(config, run, force=False)
    return config, run
