"""Ultralytics' own training loop with our recipe, timed by its callbacks: python -m app.bench.stock FOLDER [compile].

With `compile` it is that of yolo train compile=True. FOLDER holds config.json and coco.yaml; images_per_s.json, one
number an epoch, is written beside them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import validate
from app.core.files import write_json
from app.train.device import check_devices


def main(folder: Path, compiles: bool) -> None:
    """Trains config.train.epochs epochs and writes how many images a second each one took in."""
    config = validate(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    train = config.train
    arguments: dict[str, Any] = {
        "model": config.model,
        "data": str(folder / "coco.yaml"),
        "save_dir": str(folder / "train"),
        "epochs": train.epochs,
        "batch": train.batch,
        "imgsz": train.imgsz,
        "seed": train.seed,
        "deterministic": train.deterministic,
        "amp": train.amp,
        "workers": train.workers,
        "device": check_devices(config)[0],
        "cache": "ram" if train.cache else False,
        "plots": False,
        "pretrained": False,
        "val": False,
        "save": False,
        "exist_ok": True,
        "patience": 0,
        "nms": False,
        "compile": compiles,
        **config.hyp.model_dump(),
    }
    trainer = DetectionTrainer(overrides=arguments)
    rates: list[float] = []
    started: list[float] = []
    trainer.add_callback("on_train_epoch_start", lambda _: started.append(time.monotonic()))
    trainer.add_callback(
        "on_train_epoch_end",
        lambda trainer: rates.append(len(trainer.train_loader.dataset) / (time.monotonic() - started[-1])),
    )
    trainer.train()
    write_json(folder / "images_per_s.json", rates)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["compile"])
