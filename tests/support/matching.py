"""Objects and detections that a validation matches, and Ultralytics' own matching of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.cfg import get_cfg
from ultralytics.utils.ops import xyxy2xywh

from app.train.match import match, targets_of
from app.train.validator import Validator

SIDE_PX, CONFIDENCE = 64, 0.001
NAMES = {0: "a", 1: "b", 2: "c"}
SETS = ["raw", "ema"]


def new_validator(kind: type[Validator]) -> Any:
    args = get_cfg(overrides={"plots": False, "conf": CONFIDENCE})
    validator: Any = kind(SimpleNamespace(dataset=[]), save_dir=Path(tempfile.gettempdir()), args=args)
    validator.device, validator.data = torch.device("cpu"), {}
    validator.init_metrics(SimpleNamespace(names=NAMES, set_names=SETS, end2end=True))
    return validator


def labels_of(boxes: list[list[tuple[float, ...]]]) -> dict[str, torch.Tensor]:
    """Labels as a loader gives them for class and corners in px of the objects of each image."""
    rows = [(image, *row) for image, rows in enumerate(boxes) for row in rows]
    table = torch.tensor(rows).view(-1, 6)
    return {"batch_idx": table[:, 0], "cls": table[:, 1:2], "bboxes": xyxy2xywh(table[:, 2:]) / SIDE_PX}


def detections_of(rows: list[list[tuple[float, ...]]], n_detections: int) -> torch.Tensor:
    """Detections [N,n_detections,6], without confidence where `rows` has none."""
    out = torch.zeros(len(rows), n_detections, 6)
    for image, own in zip(out, rows, strict=True):
        for row, values in zip(image, own, strict=False):
            row.copy_(torch.tensor(values))
    return out


def bits_by_kernel(labels: dict[str, torch.Tensor], detections: torch.Tensor) -> list[list[int]]:
    """The kernel's bits, on the device of the detections."""
    targets = targets_of(labels, len(detections), (SIDE_PX, SIDE_PX))
    assert targets
    thresholds = torch.linspace(0.5, 0.95, 10).to(detections.device)
    return match(detections, targets.to(detections.device), thresholds, CONFIDENCE).tolist()


def bits_by_ultralytics(labels: dict[str, torch.Tensor], detections: torch.Tensor) -> list[list[int]]:
    """The matching of Ultralytics' validator, image by image, as bits; 0 for what its confidence rules out."""
    validator = new_validator(Validator)
    bits = []
    for number, own in enumerate(detections):
        pred = {"bboxes": own[:, :4], "conf": own[:, 4], "cls": own[:, 5]}
        kept = own[:, 4] > CONFIDENCE
        pred = {key: value[kept] for key, value in pred.items()}
        image = labels["batch_idx"] == number
        target = targets_of(
            {key: value[image] * (key != "batch_idx") for key, value in labels.items()}, 1, (SIDE_PX,) * 2
        )
        assert target
        prepared = {"cls": target.table[:, 0], "bboxes": target.table[:, 1:]}
        right = np.zeros((len(own), 10), bool)
        right[kept.numpy()] = validator._process_batch(pred, prepared)["tp"]
        bits.append((right << np.arange(10)).sum(1).tolist())
    return bits


def scene(
    generator: torch.Generator, counts: list[int], n_detections: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random objects of few classes and sizes, and detections near them, some equal, in the order of confidence."""
    objects = []
    for count in counts:
        corners = torch.randint(0, 6, (count, 2), generator=generator) * 4.0
        sides = torch.randint(2, 6, (count, 2), generator=generator) * 4.0
        classes = torch.randint(0, len(NAMES), (count, 1), generator=generator).float()
        objects.append([tuple(row) for row in torch.cat([classes, corners, corners + sides], 1).tolist()])
    detections = torch.zeros(len(counts), n_detections, 6)
    for own, rows in zip(detections, objects, strict=True):
        for at in range(n_detections):
            if rows:
                pick = int(torch.randint(0, len(rows), (), generator=generator))
                shift = torch.randint(-1, 2, (4,), generator=generator) * 1.5
                own[at, :4] = torch.tensor(rows[pick][1:]) + shift
                own[at, 5] = rows[pick][0]
        own[:, 4] = torch.rand(n_detections, generator=generator).sort(descending=True).values - 0.1
    return labels_of(objects), detections
