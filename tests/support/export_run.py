"""A run of two untrained networks at 96 px on a few drawn images, ready for the export stage: YOLOv10n, or one of the
small ones inside `network`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.config import Config, dump, load
from app.core.files import write_json, write_text
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.data.synthetic import draw_coco_subset
from app.export.trace import parity_images
from app.quant.model import build, cpu_state_dict, save_checkpoint

IMGSZ = 96
SETS = [
    "model=yolov10n.yaml",
    f"train.imgsz={IMGSZ}",
    "eval.provider=cpu",
    "eval.latency_warmup=0",
    "eval.latency_runs=1",
]
# Two parity images, and for ptq as many train batches.
TINY_SETS = ("data.n_val=2", "train.batch=2", "train.bn_batches=2")
# Three levels, so that raw and end2end outputs have the shapes of YOLOv10's.
TINY = {
    "nc": 80,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [[[2, 3, 4], 1, "v10Detect", ["nc"]]],
}
N_TINY = 29  # its convolutions with one head, without DFL's
# Every kind of block of YOLOv10 once, and as small as the attention allows: it has heads of 64 channels.
EVERY_BLOCK = {
    "nc": 80,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "SCDown", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "SPPF", [128, 5]],
        [-1, 1, "PSA", [128]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "C2fCIB", [16, True, True]],
        [[3, 10, 7], 1, "v10Detect", ["nc"]],
    ],
}


@contextmanager
def network(layers: dict[str, Any]) -> Iterator[None]:
    """Inside, Ultralytics reads `layers` from every architecture file."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("nn.tasks", "engine.model"):
            patch.setattr(f"ultralytics.{module}.yaml_model_load", lambda path: deepcopy(layers))
        yield


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


def copy_of(run: RunRoot, runs_dir: Path, *without: str) -> RunRoot:
    """The same run elsewhere, for a test that changes it, `without` these folders; it reads the same images."""
    other = RunRoot(runs_dir, run.name)
    shutil.copytree(run.root, other.root, ignore=shutil.ignore_patterns(*without))
    return other


def write_checkpoint(run: RunRoot, config: Config, variant_dir: Path) -> None:
    model, _ = build(config)
    enliven(model, torch.from_numpy(parity_images(run, config.train.imgsz)))
    entries: dict[str, Any] = {"scored": cpu_state_dict(model), "epoch": 0}
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
