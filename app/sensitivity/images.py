"""The images of the stage: val images to search on, others to score a proposal on, train images for BatchNorm."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.coco.images import Placement, letterbox, read_image
from app.core.config import Config, UserError
from app.core.run import RunRoot
from app.data.view import Image, read_split
from app.train.ptq import bn_images


@dataclass(frozen=True)
class Batch:
    """Images float32 [N,3,S,S] RGB 0..1 in a square letterbox, and their labels as Ultralytics' loss takes them."""

    images: torch.Tensor
    labels: dict[str, torch.Tensor]
    placements: list[Placement]


@dataclass(frozen=True)
class Chosen:
    """Places in the val split, in the order of use: images to search on, and others that the search does not see."""

    search: list[int]
    held_out: list[int]


def choose(n_val: int, n_wanted: int, seed: int) -> Chosen:
    """A seeded choice of `n_wanted` images each, or of half the split each where it is smaller.

    Raises:
        UserError: too few images to divide them.
    """
    if n_val < 4:
        raise UserError(
            f"sensitivity: {n_val} val image(s) are too few: half of them are kept for the proposal, take 4"
        )
    order = list(range(n_val))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible choice, no secret
    n = min(n_wanted, n_val // 2)
    return Chosen(order[:n], order[n : 2 * n])


class ValImages:
    """The val split of a run, read in batches.

    Args:
        provenance: of the run, whose view is there (prepare.prepared).
        names: the network's classes, in its order.
        imgsz: side of the network's input in px.
        device: where batches are put.

    Raises:
        UserError: the network lacks a class of the run.
    """

    def __init__(self, provenance: dict[str, Any], names: list[str], imgsz: int, device: torch.device) -> None:
        self.provenance, self.names = provenance, names
        self.class_numbers = class_numbers(provenance["names"], names)
        self.all: list[Image] = read_split(provenance, "val")
        self.imgsz, self.device = imgsz, device

    def read(self, places: list[int]) -> Batch:
        """Raises: UserError: a file has gone or was damaged since the data stage looked at it."""
        arrays, rows, placements = [], [], []
        for number, place in enumerate(places):
            image = self.all[place]
            array, placement = letterbox(read_image(Path(image.path)), self.imgsz)
            arrays.append(array)
            placements.append(placement)
            rows.append(label_rows(number, image.labels, placement, self.imgsz))
            rows[-1][:, 1] = self.class_numbers[rows[-1][:, 1].astype(int)]
        labels = torch.from_numpy(np.concatenate(rows))
        columns = {"batch_idx": labels[:, 0], "cls": labels[:, 1:2], "bboxes": labels[:, 2:]}
        moved = {name: column.to(self.device) for name, column in columns.items()}
        return Batch(on_device(torch.from_numpy(np.stack(arrays)), self.device), moved, placements)


def class_numbers(of_run: list[str], of_network: list[str]) -> np.ndarray:
    """The network's number of every class of the run, float32 [n]: imported weights may have another order."""
    if missing := [name for name in of_run if name not in of_network]:
        raise UserError(
            f"sensitivity: the FP16 weights know no class '{missing[0]}', which the dataset has: measure weights that "
            "were trained on it, for example with train.weights"
        )
    return np.array([of_network.index(name) for name in of_run], np.float32)


def label_rows(number: int, labels: np.ndarray, placement: Placement, imgsz: int) -> np.ndarray:
    """Labels of an image [n,5], with boxes as shares of its sides -> float32 [n,6] with shares of the square input.

    Columns: `number`, class, centre x, y, width and height.
    """
    size = np.array([placement.new_width, placement.new_height], np.float32)
    offset = np.array([placement.left, placement.top], np.float32)
    centres = (labels[:, 1:3] * size + offset) / imgsz
    sides = labels[:, 3:5] * size / imgsz
    numbers = np.full((len(labels), 1), number, np.float32)
    return np.concatenate([numbers, labels[:, :1], centres, sides], axis=1, dtype=np.float32)


def on_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same numbers in the layout in which convolutions are fastest, on a CPU too."""
    return images.to(device).contiguous(memory_format=torch.channels_last)


def batches_of(places: list[int], size: int) -> list[list[int]]:
    return [places[first : first + size] for first in range(0, len(places), size)]


def bn_batches(trained: Config, run: RunRoot, epoch: int, device: torch.device) -> list[torch.Tensor]:
    """Train images [N,3,S,S] for BatchNorm, augmented as in the training after `epoch` (from 0).

    They are drawn as those of ptq, but sensitivity.bn_images of them in batches of sensitivity.batch_images.
    """
    settings, train = trained.sensitivity, trained.train
    n_batches = -(-settings.bn_images // settings.batch_images)
    fewer = train.model_copy(update={"batch": settings.batch_images, "bn_batches": n_batches})
    drawn = bn_images(trained.model_copy(update={"train": fewer}), run, workers=0).after(epoch)
    return [on_device(images, device).float() / 255 for images in drawn]
