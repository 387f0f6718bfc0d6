"""Trainings whose data, losses and validation scores a test gives, and a record of what they read and scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from app.coco.categories import CATEGORIES
from app.quant.model import load_checkpoint
from app.train.nonfinite import Watch
from app.train.validator import HeldOut, Validator

SIZE_WH = (64, 32)  # px of every image; letterboxed to 64 x 64 it has 16 rows of padding above and below
# Without augmentation, learning-rate warm-up and EMA ramp; an optimizer step a batch.
PLAIN: dict[str, Any] = {
    "hyp.warmup_epochs": 0, "hyp.nbs": 1, "hyp.mosaic": 0, "hyp.close_mosaic": 0, "hyp.hsv_h": 0, "hyp.hsv_s": 0,
    "hyp.hsv_v": 0, "hyp.translate": 0, "hyp.scale": 0, "hyp.fliplr": 0,
}  # fmt: skip
LOSS_NAMES = ("box_loss", "cls_loss", "dfl_loss")
Losses = Callable[[list[int]], tuple[float, float, float]]  # numbers of a batch's images -> box, class and DFL loss
State = dict[str, torch.Tensor]


# --- data ------------------------------------------------------------------------------------------------------------


def solid(level: int) -> np.ndarray:
    """An image of one grey level, 0..255."""
    return np.full((SIZE_WH[1], SIZE_WH[0], 3), level, np.uint8)


def box_of(number: int) -> list[float]:
    """The one box of an image, x, y, w, h in px."""
    return [4 + 2 * (number % 7), 6, 16 + 2 * (number % 5), 20]


def write_coco(coco_dir: Path, train: list[np.ndarray], val: list[np.ndarray]) -> Path:
    """A COCO folder of PNG files. Images are numbered from 0, val after train; image n has one object of class n."""
    first = 0
    (coco_dir / "annotations").mkdir(parents=True)
    for split, images in (("train2017", train), ("val2017", val)):
        (coco_dir / split).mkdir()
        numbers = range(first, first + len(images))
        for number, pixels in zip(numbers, images, strict=True):
            cv2.imwrite(str(coco_dir / split / f"{number:012d}.png"), pixels)
        tree = {
            "images": [image_entry(number) for number in numbers],
            "annotations": [annotation_entry(number) for number in numbers],
            "categories": CATEGORIES,
        }
        (coco_dir / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree), encoding="utf-8")
        first += len(images)
    return coco_dir


def image_entry(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.png", "width": SIZE_WH[0], "height": SIZE_WH[1]}


def annotation_entry(number: int) -> dict[str, Any]:
    box = box_of(number)
    return {
        "id": number + 1, "image_id": number, "category_id": CATEGORIES[number]["id"], "bbox": box,
        "area": box[2] * box[3], "iscrowd": 0,
    }  # fmt: skip


def number_of(file: str) -> int:
    return int(Path(file).stem)


# --- losses, and what is read ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch as the loss gets it: image numbers, pixels 0..1 [N,3,H,W], and class and box of every object."""

    numbers: list[int]
    images: torch.Tensor
    classes: list[int]
    boxes: list[list[float]]
    weights: torch.Tensor  # of the first convolution


@contextmanager
def reading(losses: Losses | None = None, pull: float = 0.0) -> Iterator[list[Batch]]:
    """Lists the train batches in order. With `losses` they are the loss of a batch, in training and in validation,
    and the gradient of every weight of the first convolution is `pull` for every image, that of the others 0."""
    read: list[Batch] = []
    loss_of = DetectionModel.loss

    def loss(self: Any, batch: dict[str, Any], preds: Any = None) -> Any:
        if torch.is_grad_enabled():
            read.append(batch_of(batch, self.model[0].conv.weight))
        if losses is None:
            return loss_of(self, batch, preds)
        numbers = [number_of(file) for file in batch["im_file"]]
        items = torch.tensor(losses(numbers))
        total = items * len(numbers) + pull * len(numbers) * self.model[0].conv.weight.sum() / len(items)
        return total, dict(zip(LOSS_NAMES, items, strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionModel, "loss", loss)
        yield read


def batch_of(batch: dict[str, Any], weights: torch.Tensor) -> Batch:
    return Batch(
        [number_of(file) for file in batch["im_file"]], batch["img"].clone(), batch["cls"].flatten().int().tolist(),
        batch["bboxes"].tolist(), weights.detach().clone(),
    )  # fmt: skip


def spoil_images(patch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Images of these batches are not finite, as from a decoder gone wrong; the loader gives bytes otherwise."""
    next_batch = Watch.next

    def spoil(self: Watch, number: int, batch: dict[str, Any]) -> None:
        if number in bad:
            batch["img"] = torch.full(batch["img"].shape, float("nan"))
        next_batch(self, number, batch)

    patch.setattr(Watch, "next", spoil)


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(ap: float, loss: float | None = None) -> dict[str, float]:
    """Eight different numbers of a validation: AP50 is AP + 0.05; the box loss is AP + 1 or `loss`, the class loss
    AP + 20, the DFL loss AP + 300."""
    return {
        "metrics/precision(B)": ap + 0.01, "metrics/recall(B)": ap + 0.02, "metrics/mAP50(B)": ap + 0.05,
        "metrics/mAP50-95(B)": ap, "fitness": ap + 0.03, "val/box_loss": ap + 1 if loss is None else loss,
        "val/cls_loss": ap + 20, "val/dfl_loss": ap + 300,
    }  # fmt: skip


@dataclass(frozen=True)
class Validation:
    """A scored network, the numbers of the images it was scored on, and the epochs that best.pt and health.json were
    of when the validation began, 0 without such a file."""

    state: State
    numbers: list[int]
    best_epoch: int
    health_epoch: int


@contextmanager
def scripted(results: list[dict[str, float]]) -> Iterator[list[Validation]]:
    """Every state of a validation gets the next one of `results`; more states than results are an error."""
    left = iter(results)
    done: list[Validation] = []

    def score(self: Any, held_out: HeldOut, after_batch: Any) -> dict[str, dict[str, float]]:
        batches = list(self.dataloader)
        numbers = [number_of(file) for batch in batches for file in batch["im_file"]]
        self.names, self.first_batch = held_out.names, (detections(batches[0]), {**batches[0]})
        folder = Path(self.save_dir)
        given = {}
        for name in held_out.set_names:
            held_out.take(name)
            done.append(Validation(copy_of(held_out.model), numbers, best_epoch(folder), health_epoch(folder)))
            given[name] = dict(next(left))
        return given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "score", score)
        yield done
    assert next(left, None) is None, "fewer validations than results"


def detections(batch: dict[str, Any]) -> list[State]:
    """One detection for each image of a batch, for the pictures in TensorBoard."""
    one = {"conf": torch.ones(1), "cls": torch.zeros(1), "bboxes": torch.tensor([[8.0, 20.0, 40.0, 40.0]])}
    return [one for _ in batch["im_file"]]


def copy_of(network: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def best_epoch(folder: Path) -> int:
    """Epoch of best.pt, from 1; 0 where there is none."""
    path = folder / "weights" / "best.pt"
    return load_checkpoint(path)["epoch"] + 1 if path.exists() else 0


def health_epoch(folder: Path) -> int:
    path = folder / "health.json"
    return json.loads(path.read_text(encoding="utf-8"))["epoch"] if path.exists() else 0


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
