"""Ultralytics' own training loop with our recipe, timed by its callbacks: python -m app.bench.stock FOLDER [compile].

With `compile` it is that of yolo train compile=True. FOLDER holds config.json and coco.yaml; images_per_s.json, one
number an epoch, is written beside them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import validate
from app.core.files import write_json
from app.train.device import check_devices
from app.train.trainer import recipe_args


def main(folder: Path, compiles: bool) -> None:
    """Trains config.train.epochs epochs and writes how many images a second each one took in."""
    config = validate(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    arguments = {"data": str(folder / "coco.yaml"), "save_dir": str(folder / "train"), "val": False, "save": False}
    arguments |= {"compile": compiles, **recipe_args(config, check_devices(config)[0])}
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
