"""Draws the built-in dataset `coco-subset`: COCO's layout and category ids, four kinds of large shapes on noise.

It is for showing that the whole job runs and learns, on any machine, in minutes; it says nothing about COCO.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.coco.annotations import CATEGORIES
from app.coco.dataset import SPLITS, annotation_path
from app.core.files import new_folder

VERSION = 1  # of the drawing; part of the folder's name, so that another drawing never passes for this one
SIZES_HW = ((160, 160), (120, 160), (160, 120), (97, 161), (161, 97), (200, 199), (144, 160), (160, 133))
Box = tuple[int, int, int, int]  # x, y, width, height in px
# Category id -> (shape, base colour BGR): shape and colour both tell the classes apart.
KINDS = {
    1: ("ellipse", (60, 60, 220)),  # person
    3: ("box", (220, 90, 40)),  # car
    18: ("triangle", (50, 190, 60)),  # dog
    59: ("cross", (40, 200, 220)),  # pizza
}
CROWD_EVERY, EMPTY_EVERY, GREY_EVERY = 16, 16, 16  # one image in so many has a crowd region, no object, no colour
N_TRIES = 30  # to find a free place for a box


def draw_coco_subset(target_dir: Path, n_train: int = 256, n_val: int = 64, seed: int = 0) -> None:
    """Draws both splits into `target_dir`, in COCO's layout, or leaves a finished drawing alone.

    The same arguments give the same annotations and, with the locked OpenCV, the same JPEG bytes. A process that draws
    the same dataset at the same time does no harm.
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
        # Not cv2.imwrite: on a full disk it only returns False.
        jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
        (image_dir / file_name).write_bytes(jpeg.tobytes())
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
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


def _draw_image(rng: np.random.Generator, position: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image, uint8 [H,W,3] or [H,W], and its annotations without ids."""
    height, width = SIZES_HW[int(rng.integers(len(SIZES_HW)))]
    noise = rng.normal(rng.uniform(70, 180), 22, (height, width, 3))
    pixels = np.clip(noise, 0, 255).astype(np.uint8)
    taken: list[Box] = []
    objects = []
    if position % CROWD_EVERY == 3:
        objects.append(_draw_crowd(pixels, rng, taken))
    n_shapes = 0 if position % EMPTY_EVERY == 7 else int(rng.integers(1, 4))
    for _ in range(n_shapes):
        if (box := _free_box(rng, height, width, taken)) is not None:
            objects.append(_draw_shape(pixels, rng, box))
    if position % GREY_EVERY == 11:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    return pixels, objects


def _free_box(rng: np.random.Generator, height: int, width: int, taken: list[Box]) -> Box | None:
    """A box of 25 to 60 % of the short side that overlaps no other one; None where N_TRIES find none."""
    short = min(height, width)
    smallest, largest = short // 4, int(short * 0.6)
    for _ in range(N_TRIES):
        w, h = int(rng.integers(smallest, largest)), int(rng.integers(smallest, largest))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
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
    shape, colour = KINDS[category]
    polygon = _outline(shape, box)
    shade = [int(np.clip(channel + rng.integers(-25, 26), 0, 255)) for channel in colour]
    cv2.fillPoly(pixels, [np.round(polygon).astype(np.int32)], shade)
    (left, top), (right, bottom) = polygon.min(axis=0), polygon.max(axis=0)
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
        unit = np.array([(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)])
    elif shape == "cross":
        a, b = 0.3, 0.7
        corners = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        unit = np.array(corners, dtype=float)
    else:
        unit = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
    return unit * (w, h) + (x, y)


def _draw_crowd(pixels: np.ndarray, rng: np.random.Generator, taken: list[Box]) -> dict[str, Any]:
    """A strip of many small ellipses along the top, annotated as COCO does: one region, run lengths, iscrowd 1."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    strip = height // 5
    for x in range(4, width - 4, 9):
        colour = rng.integers(40, 220, 3).tolist()
        for image, value in ((pixels, colour), (mask, 1)):
            cv2.ellipse(image, (x, strip // 2), (3, strip // 2 - 1), 0, 0, 360, value, -1)
    taken.append((0, 0, width, strip))
    ys, xs = np.nonzero(mask)
    box = [float(xs.min()), float(ys.min()), float(np.ptp(xs) + 1), float(np.ptp(ys) + 1)]
    segmentation = {"counts": _run_lengths(mask), "size": [height, width]}
    return {"category_id": 1, "bbox": box, "area": float(mask.sum()), "segmentation": segmentation, "iscrowd": 1}


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: column by column, lengths of runs of 0, 1, 0, ... beginning with zeros."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
