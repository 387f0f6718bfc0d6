"""A run of two untrained YOLOv10n at 96 px on a few drawn images, ready for the export stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.core.config import Config, dump, load
from app.core.files import write_json, write_text
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.data.synthetic import draw_coco_subset
from app.export.trace import parity_images
from app.quant.model import build, save_checkpoint, scored_state

IMGSZ = 96
SETS = [
    "model=yolov10n.yaml",
    f"train.imgsz={IMGSZ}",
    "eval.provider=cpu",
    "eval.latency_warmup=0",
    "eval.latency_runs=1",
]


def config_of(run: RunRoot, variant: str, *sets: str) -> Config:
    return load(variant, [], [*SETS, f"data.coco_dir={run.runs_dir / 'coco'}", *sets])


def make_run(runs_dir: Path, *sets: str, variants: tuple[str, ...] = ("fp16", "qat")) -> RunRoot:
    """The state that `data` and `train` leave behind, without the training."""
    run = RunRoot(runs_dir, "tiny")
    draw_coco_subset(runs_dir / "coco", n_train=2, n_val=8)
    prepare(config_of(run, "qat", *sets), run, force=False)
    for variant in variants:
        config = config_of(run, variant, *sets)
        write_checkpoint(run, config, run.variant_dir(config.label))
    return run


def write_checkpoint(run: RunRoot, config: Config, variant_dir: Path) -> None:
    model, _ = build(config)
    enliven(model, torch.from_numpy(parity_images(run, config.train.imgsz)))
    entries: dict[str, Any] = {"scored": scored_state(model), "epoch": 0}
    save_checkpoint(variant_dir / "weights" / "best.pt", config, entries)
    write_text(variant_dir / "config.yaml", dump(config))
    write_json(variant_dir / "done.json", {})


def enliven(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Scores and boxes that depend on the image: an untrained network puts out nearly the same everywhere.

    BatchNorm gets the statistics of the images (those of noise would magnify rounding a hundredfold), class scores a
    bias of about 0.05 instead of 1e-5. The last convolution of a box is a quarter of itself: by that much less rounding
    moves boxes, which leaves every processor's sums room within the tolerance for trained networks.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean
    with torch.no_grad():
        model.train()(images)
        for name, parameter in model.named_parameters():
            if "one2one_cv3" in name and name.endswith(".2.bias"):
                parameter.fill_(-3.0)
            if "one2one_cv2" in name and name.endswith(".2.weight"):
                parameter.mul_(0.25)
