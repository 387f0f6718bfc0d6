"""Draws the dataset `coco-subset`, shapes and no photos: COCO's layout and category ids, four kinds of large shapes on
noise.

It shows in minutes and on any machine that the whole job runs and that a training learns. It says nothing about COCO.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.coco.categories import CATEGORIES
from app.coco.dataset import SPLITS, annotation_path
from app.core.files import new_folder

VERSION = 1  # of the drawing; a part of the folder's name, so that a changed drawing gets its own folder
SIZES_HW = ((160, 160), (120, 160), (160, 120), (97, 161), (161, 97), (200, 199), (144, 160), (160, 133))
Box = tuple[int, int, int, int]  # x, y, width, height in px
Point = tuple[float, float]
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
# Outlines in a box of size 1 x 1.
TRIANGLE: list[Point] = [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
RECTANGLE: list[Point] = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
CROSS: list[Point] = [
    (0.3, 0.0), (0.7, 0.0), (0.7, 0.3), (1.0, 0.3), (1.0, 0.7), (0.7, 0.7),
    (0.7, 1.0), (0.3, 1.0), (0.3, 0.7), (0.0, 0.7), (0.0, 0.3), (0.3, 0.3),
]  # fmt: skip


def draw_coco_subset(target_dir: Path, n_train: int = 256, n_val: int = 64, seed: int = 0) -> None:
    """Draws both splits into `target_dir` in COCO's layout; does nothing if the folder exists.

    The same arguments give the same annotations and, with the locked OpenCV, the same JPEG bytes. Several processes may
    draw the same dataset at the same time.
    """
    if target_dir.exists():
        return
    with new_folder(target_dir) as part_dir:
        _draw_split(part_dir, SPLITS["train"], range(1, n_train + 1), seed)
        _draw_split(part_dir, SPLITS["val"], range(n_train + 1, n_train + n_val + 1), seed)


def _draw_split(root: Path, split: str, image_ids: range, seed: int) -> None:
    image_dir = root / split
    image_dir.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position, image_id in enumerate(image_ids):
        rng = np.random.default_rng([seed, image_id])
        pixels, objects = _draw_image(rng, position)
        file_name = f"{image_id:012d}.jpg"
        _write_jpeg(image_dir / file_name, pixels)
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    instances = {
        "info": {"description": "drawn coco-subset, not COCO", "version": str(VERSION), "year": 2026},
        "licenses": [{"id": 1, "name": "drawn by this program", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    file = annotation_path(root, split)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(instances), encoding="utf-8")


def _write_jpeg(path: Path, pixels: np.ndarray) -> None:
    # Not cv2.imwrite, which only returns False on a full disk.
    _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    path.write_bytes(jpeg.tobytes())


def _draw_image(rng: np.random.Generator, position: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The image at `position` of its split, uint8 [H,W,3] or [H,W], and its annotations without ids."""
    height, width = SIZES_HW[int(rng.integers(len(SIZES_HW)))]
    brightness = rng.uniform(70, 180)
    noise = rng.normal(brightness, 22, (height, width, 3))
    pixels = np.clip(noise, 0, 255).astype(np.uint8)
    taken: list[Box] = []
    objects = []
    if position % PERIOD == CROWD_AT:
        objects.append(_draw_crowd(pixels, rng, taken))
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

    Returns:
        None if N_TRIES random boxes all overlap another one.
    """
    short_side = min(height, width)
    smallest, largest = short_side // 4, int(short_side * 0.6)
    for _ in range(N_TRIES):
        w = int(rng.integers(smallest, largest))
        h = int(rng.integers(smallest, largest))
        x = int(rng.integers(0, width - w))
        y = int(rng.integers(0, height - h))
        box = (x, y, w, h)
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


def _draw_shape(pixels: np.ndarray, rng: np.random.Generator, box: Box) -> dict[str, Any]:
    """Draws one object; returns its annotation without ids."""
    category = int(rng.choice(list(KINDS)))
    shape, base_colour = KINDS[category]
    polygon = _outline(shape, box)
    colour = []
    for channel in base_colour:
        shade = channel + rng.integers(-25, 26)
        colour.append(int(np.clip(shade, 0, 255)))
    cv2.fillPoly(pixels, [np.round(polygon).astype(np.int32)], colour)
    left, top = polygon.min(axis=0)
    right, bottom = polygon.max(axis=0)
    return {
        "category_id": category,
        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
        "area": float(cv2.contourArea(polygon.astype(np.float32))),
        "segmentation": [[round(float(value), 2) for value in polygon.flatten()]],
        "iscrowd": 0,
    }


def _outline(shape: str, box: Box) -> np.ndarray:
    """Corners of a shape that fills its box: float [N,2] in pixels."""
    x, y, w, h = box
    if shape == "ellipse":
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        unit = 0.5 + 0.5 * circle
    elif shape == "triangle":
        unit = np.array(TRIANGLE)
    elif shape == "cross":
        unit = np.array(CROSS)
    else:
        unit = np.array(RECTANGLE)
    return unit * (w, h) + (x, y)


def _draw_crowd(pixels: np.ndarray, rng: np.random.Generator, taken: list[Box]) -> dict[str, Any]:
    """Draws a strip of many small ellipses along the top of the image, and adds the strip to `taken`.

    Returns:
        its annotation without ids, as COCO has it for a crowd: one region in run lengths, iscrowd 1.
    """
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    strip = height // 5
    axes = (3, strip // 2 - 1)
    for x in range(4, width - 4, 9):
        centre = (x, strip // 2)
        colour = rng.integers(40, 220, 3).tolist()
        cv2.ellipse(pixels, centre, axes, 0, 0, 360, colour, -1)
        cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, -1)
    taken.append((0, 0, width, strip))
    ys, xs = np.nonzero(mask)
    return {
        "category_id": 1,
        "bbox": [float(xs.min()), float(ys.min()), float(np.ptp(xs) + 1), float(np.ptp(ys) + 1)],
        "area": float(mask.sum()),
        "segmentation": {"counts": _run_lengths(mask), "size": [height, width]},
        "iscrowd": 1,
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE of a 0/1 mask: column by column, the lengths of alternating runs of 0 and 1.

    The first run is one of zeros, of length 0 if the mask begins with 1.
    """
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    return [0, *runs] if flat[0] else runs
