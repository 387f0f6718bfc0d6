"""Shapes of drawn datasets and their annotations in COCO's format: polygons, and crowds in run lengths."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

Box = tuple[float, float, float, float]  # x, y, width, height in px
Point = tuple[float, float]
Annotation = dict[str, Any]  # without id and image_id
# Outlines in a box of size 1 x 1.
TRIANGLE: list[Point] = [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
RECTANGLE: list[Point] = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
CROSS: list[Point] = [
    (0.3, 0.0), (0.7, 0.0), (0.7, 0.3), (1.0, 0.3), (1.0, 0.7), (0.7, 0.7),
    (0.7, 1.0), (0.3, 1.0), (0.3, 0.7), (0.0, 0.7), (0.0, 0.3), (0.3, 0.3),
]  # fmt: skip


def outline(shape: str, box: Box) -> np.ndarray:
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


def draw_polygon(pixels: np.ndarray, polygon: np.ndarray, colour: list[int], category_id: int) -> Annotation:
    """Fills a polygon, float [N,2] in px, in an image [H,W,3]; returns its annotation."""
    cv2.fillPoly(pixels, [np.round(polygon).astype(np.int32)], colour)
    left, top = polygon.min(axis=0)
    right, bottom = polygon.max(axis=0)
    return {
        "category_id": category_id,
        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
        "area": float(cv2.contourArea(polygon.astype(np.float32))),
        "segmentation": [[round(float(value), 2) for value in polygon.flatten()]],
        "iscrowd": 0,
    }


def draw_crowd(pixels: np.ndarray, rng: np.random.Generator) -> tuple[Annotation, Box]:
    """Draws a strip of many small ellipses along the top of the image.

    Returns:
        its annotation, as COCO has it for a crowd: one region in run lengths, iscrowd 1; and the strip.
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
    ys, xs = np.nonzero(mask)
    annotation = {
        "category_id": 1,
        "bbox": [float(xs.min()), float(ys.min()), float(np.ptp(xs) + 1), float(np.ptp(ys) + 1)],
        "area": float(mask.sum()),
        "segmentation": {"counts": _run_lengths(mask), "size": [height, width]},
        "iscrowd": 1,
    }
    return annotation, (0, 0, width, strip)


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE of a 0/1 mask: column by column, the lengths of alternating runs of 0 and 1.

    The first run is one of zeros, of length 0 if the mask begins with 1.
    """
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    return [0, *runs] if flat[0] else runs
