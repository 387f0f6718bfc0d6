"""A detector with both heads of YOLOv10 that a CPU trains in milliseconds, and trainings of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import Config
from app.core.files import read_json
from app.core.run import RunRoot
from app.train.loader import CocoDataset, train_loader
from app.train.train import train
from tests.support.recorder import Recorder, recording

LAYERS = {
    "nc": 80,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [[[2], 1, "v10Detect", ["nc"]]],
}


@contextmanager
def tiny_network() -> Iterator[None]:
    """Inside, Ultralytics reads LAYERS from every architecture file, and figures stay empty, which is a second less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralytics.nn.tasks.yaml_model_load", lambda path: deepcopy(LAYERS))
        patch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
        yield


def train_recorded(config: Config, run: RunRoot, recorder: Recorder) -> Path:
    """Trains to the end, going on after every interruption of the recorder's; gives the folder of the variant."""
    n_starts = 1 + len(recorder.crash_before)
    with recording(recorder):
        for start in range(n_starts):
            try:
                train(config, run, force=False)
            except KeyboardInterrupt:
                assert start < n_starts - 1
    return run.variant_dir(config.label)


class StockTrainer(DetectionTrainer):
    """Ultralytics' loop, optimizer, schedule and EMA on our batches, without validation and files."""

    provenance: dict[str, Any]

    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(self.args.seed)
        return super().get_model(*args, **kwargs)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        dataset = CocoDataset(
            "train", self.data, self.provenance, self.args.seed,
            imgsz=self.args.imgsz, batch_size=batch_size, hyp=self.args,
        )  # fmt: skip
        return train_loader(dataset, 0, pin_memory=False)

    def validate(self) -> Any:
        return {}, 0.0

    def save_model(self) -> Any:
        return False

    def final_eval(self) -> None:
        pass


def train_stock(config: Config, run: RunRoot, hyp: dict[str, Any], factors: dict[int, float] | None = None) -> Recorder:
    """A training by Ultralytics' own loop with the size and data of `config` and the recipe `hyp`."""
    t = config.train
    arguments: dict[str, Any] = {
        "model": config.model, "data": str(run.dataset_yaml.resolve()), "save_dir": str((run.root / "stock").resolve()),
        "epochs": t.epochs, "batch": t.batch, "imgsz": t.imgsz, "seed": t.seed, "device": "cpu", "workers": 0,
        "pretrained": False, "plots": False, "verbose": False, "exist_ok": True, "patience": 0, "nms": False, **hyp,
    }  # fmt: skip
    trainer = StockTrainer(overrides=arguments)
    trainer.provenance = read_json(run.provenance, "data")
    with recording(Recorder(factors=factors)) as recorder:
        trainer.train()
    return recorder
