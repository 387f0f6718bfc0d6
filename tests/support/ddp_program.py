"""What test_ddp.py starts with torchrun: trainings with BatchNorm fixed, one after the other.

ddp_program.py RUNS_DIR RUN DEVICES VARIANT... [stop | poison]

In the last one the second process gets a SIGTERM (stop), or images that are not finite (poison).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import Config, load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.train.interrupt import Interrupted
from app.train.processes import joined
from app.train.train import train
from app.train.trainer import Trainer

# 30 images: batches of 8, 8, 8 and 6, which 3 processes share as 2, 3, 3 and 2, 2, 2; two batches to an optimizer step.
# Mosaic in the first of two epochs; a fast EMA.
SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=30", "data.n_val=8", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=8", "train.epochs=2", "train.workers=0", "train.bn_batches=2", "hyp.nbs=16",
    "hyp.warmup_epochs=1", "hyp.close_mosaic=1", "train.ema_tau=5", "eval.provider=cpu",
]  # fmt: skip
STOP_AT = 4  # optimizer steps, of five: inside the second epoch
POISONED = 5  # number of the batch since the start: the second of the second epoch
optimizer_step = Trainer.optimizer_step


def fixed_norm(self: Trainer) -> None:
    """Trainer._model_train with BatchNorm as in evaluation: in training its statistics are those of a process's own
    images, as in Ultralytics, the one thing that depends on the number of processes."""
    DetectionTrainer._model_train(self)
    for layer in self.net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def stopped_step(self: Trainer) -> None:
    """Trainer.optimizer_step; the second process alone gets a signal."""
    optimizer_step(self)
    if self.ranks.rank == 1 and self.ema.updates == STOP_AT:
        os.kill(os.getpid(), signal.SIGTERM)


def poisoned_batch(self: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """Trainer.preprocess_batch; in the second process one batch has no finite image."""
    batch = DetectionTrainer.preprocess_batch(self, batch)
    if self.ranks.rank == 1 and self.epoch * len(self.train_loader) + self.batch_in_epoch - 1 == POISONED:
        batch["img"].fill_(float("nan"))
    return batch


def settle(runs_dir: Path, name: str, variant: str, device: str = "cpu") -> tuple[Config, RunRoot]:
    """Configuration and run root with a prepared dataset."""
    config, run = load(variant, sets=[*SETTINGS, f"train.device={device}"]), RunRoot(runs_dir, name)
    prepare(config, run, force=False)
    return config, run


def main(run: RunRoot, devices: str, variants: list[str], trick: str | None) -> None:
    with joined(devices.split(",")) as ranks:
        for variant in variants:
            if trick == "stop" and variant == variants[-1]:
                Trainer.optimizer_step = stopped_step
            if trick == "poison" and variant == variants[-1]:
                Trainer.preprocess_batch = poisoned_batch
            train(load(variant, sets=[*SETTINGS, f"train.device={devices}"]), run, False, ranks)


if __name__ == "__main__":
    _, runs_dir, run_name, of, *words = sys.argv
    logging.basicConfig(level=logging.ERROR)
    Trainer._model_train = fixed_norm
    try:
        trick = words.pop() if words[-1] in ("stop", "poison") else None
        main(RunRoot(Path(runs_dir), run_name), of, words, trick)
    except Interrupted as stopped:
        sys.exit(128 + stopped.signal)
