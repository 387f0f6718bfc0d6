"""Draws the dataset `coco-subset`, shapes and no photos: COCO's layout and category ids, four kinds of large shapes on
noise.

It shows in minutes and on any machine that the whole job runs and that a training learns. It says nothing about COCO.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.coco.categories import CATEGORIES
from app.coco.dataset import SPLITS
from app.core.config import BUILTIN_DATASET
from app.core.files import new_folder
from app.data.shapes import Annotation, Box, draw_crowd, draw_polygon, outline
from app.data.shards import Drawing, draw_shard, is_whole, join, shards

VERSION = 1  # of the drawing; a part of the folder's name, so that a changed drawing gets its own folder
N_TRAIN, N_VAL = 256, 64
SIZES_HW = ((160, 160), (120, 160), (160, 120), (97, 161), (161, 97), (200, 199), (144, 160), (160, 133))
# Category id -> (shape, base colour BGR): both differ from class to class.
KINDS = {
    1: ("ellipse", (60, 60, 220)),  # person
    3: ("box", (220, 90, 40)),  # car
    18: ("triangle", (50, 190, 60)),  # dog
    59: ("cross", (40, 200, 220)),  # pizza
}
# Of every PERIOD images, the ones at these positions have a crowd region, no shapes, or no colour.
PERIOD, CROWD_AT, EMPTY_AT, GREY_AT = 16, 3, 7, 11
N_TRIES = 30  # to find a free place for a box


def draw_coco_subset(target_dir: Path, n_train: int = N_TRAIN, n_val: int = N_VAL, seed: int = 0) -> None:
    """Draws both splits into `target_dir` in COCO's layout; does nothing if it is there.

    The same arguments give the same annotations and, with the locked OpenCV, the same JPEG bytes. Several processes may
    draw the same dataset at the same time.
    """
    drawing = Drawing(CocoSubset(), n_train, n_val, seed)
    if is_whole(target_dir, drawing):
        return
    with new_folder(target_dir, replace=target_dir.exists()) as part_dir:
        for shard in shards(drawing, *SPLITS.values()):
            draw_shard(part_dir, drawing, shard)
        join(part_dir, drawing)


@dataclass(frozen=True)
class CocoSubset:
    """The scene: one to three shapes that do not overlap, in images of 97 to 200 px."""

    name: str = BUILTIN_DATASET
    version: int = VERSION
    jpeg_quality: int = 90

    @property
    def categories(self) -> list[dict[str, Any]]:
        return CATEGORIES

    def draw(self, rng: np.random.Generator, position: int) -> tuple[np.ndarray, list[Annotation]]:
        height, width = SIZES_HW[int(rng.integers(len(SIZES_HW)))]
        brightness = rng.uniform(70, 180)
        noise = rng.normal(brightness, 22, (height, width, 3))
        pixels = np.clip(noise, 0, 255).astype(np.uint8)
        taken: list[Box] = []
        objects = []
        if position % PERIOD == CROWD_AT:
            crowd, strip = draw_crowd(pixels, rng)
            objects.append(crowd)
            taken.append(strip)
        n_shapes = 0 if position % PERIOD == EMPTY_AT else int(rng.integers(1, 4))
        for _ in range(n_shapes):
            box = _free_box(rng, height, width, taken)
            if box is not None:
                objects.append(_draw_shape(pixels, rng, box))
        if position % PERIOD == GREY_AT:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        return pixels, objects


def _free_box(rng: np.random.Generator, height: int, width: int, taken: list[Box]) -> Box | None:
    """A box with sides of 25 to 60 % of the image's short side that overlaps none of `taken`, to which it is added.

    None if N_TRIES random boxes all overlap another one.
    """
    short_side = min(height, width)
    smallest, largest = short_side // 4, int(short_side * 0.6)
    for _ in range(N_TRIES):
        w, h = int(rng.integers(smallest, largest)), int(rng.integers(smallest, largest))
        box = (int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), w, h)
        if not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return box
    return None


def _overlap(first: Box, second: Box) -> bool:
    x, y, w, h = first
    left, top, width, height = second
    apart_in_x = x + w <= left or left + width <= x
    apart_in_y = y + h <= top or top + height <= y
    return not (apart_in_x or apart_in_y)


def _draw_shape(pixels: np.ndarray, rng: np.random.Generator, box: Box) -> Annotation:
    category = int(rng.choice(list(KINDS)))
    shape, base_colour = KINDS[category]
    colour = [int(np.clip(channel + rng.integers(-25, 26), 0, 255)) for channel in base_colour]
    return draw_polygon(pixels, outline(shape, box), colour, category)
