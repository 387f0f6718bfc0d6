"""What test_ddp.py starts with torchrun: trainings with BatchNorm fixed, one after the other.

ddp_program.py RUNS_DIR RUN DEVICES VARIANT... [stop]      with `stop` the second process gets a SIGTERM in the last
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from app.config import Config, load
from app.data import prepare
from app.interrupt import Interrupted
from app.ranks import joined
from app.run import RunRoot
from app.train import train
from app.trainer import Trainer

# 30 images: batches of 8, 8, 8 and 6, which 3 processes share as 2, 3, 3 and 2, 2, 2; two batches to an optimizer step.
# Mosaic in the first of two epochs; a fast EMA.
SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=30", "data.n_val=8", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=8", "train.epochs=2", "train.workers=0", "train.bn_batches=2", "hyp.nbs=16",
    "hyp.warmup_epochs=1", "hyp.close_mosaic=1", "train.ema_tau=5", "eval.provider=cpu",
]  # fmt: skip
STOP_AT = 4  # optimizer steps, of five: inside the second epoch
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


def settle(runs_dir: Path, name: str, variant: str, device: str = "cpu") -> tuple[Config, RunRoot]:
    """Configuration and run root with a prepared dataset."""
    config, run = load(variant, sets=[*SETTINGS, f"train.device={device}"]), RunRoot(runs_dir, name)
    prepare(config, run, force=False)
    return config, run


def main(run: RunRoot, devices: str, variants: list[str], stop: bool) -> None:
    with joined(devices.split(",")) as ranks:
        for variant in variants:
            if stop and variant == variants[-1]:
                Trainer.optimizer_step = stopped_step
            train(load(variant, sets=[*SETTINGS, f"train.device={devices}"]), run, False, ranks)


if __name__ == "__main__":
    _, runs_dir, run_name, of, *words = sys.argv
    logging.basicConfig(level=logging.ERROR)
    Trainer._model_train = fixed_norm
    try:
        main(RunRoot(Path(runs_dir), run_name), of, [word for word in words if word != "stop"], "stop" in words)
    except Interrupted as stopped:
        sys.exit(128 + stopped.signal)
