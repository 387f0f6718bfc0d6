"""A scene with COCO's statistics, to rehearse a full run where COCO is not: sizes of images, boxes and files as there.

Measured on drawn images: docs/results.md. It says nothing about accuracy on COCO.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from app.coco.categories import CATEGORIES
from app.data.shapes import Annotation, draw_crowd, draw_polygon, outline

VERSION = 1
# Width and height at 640 px, and how many of 100 images have them: about COCO's.
SIZES_WH = (
    (640, 480, 36), (640, 427, 22), (480, 640, 13), (427, 640, 8), (500, 375, 6), (640, 360, 5), (375, 500, 4),
    (612, 612, 3), (640, 640, 2), (333, 500, 1),
)  # fmt: skip
BASE_PX = 640
SIDES_PX = range(64, 4097)  # of --size
# COCO train2017: 860,001 annotations on 118,287 images, 10,777 of them crowds, at most 93 on one; 1,021 images without.
MEAN_OBJECTS, MOST_OBJECTS = 7.26, 93  # of images that have some, without the crowds
EMPTY_SHARE, CROWD_SHARE, GREY_SHARE = 0.009, 0.09, 0.0025
# Areas in px^2 of small, medium and large objects: COCO's limits are 32^2 and 96^2. A third of the objects each.
LOWEST_AREAS = np.array([6.0**2, 32.0**2, 96.0**2])
HIGHEST_AREAS = np.array([32.0**2, 96.0**2, np.inf])
LARGEST_SHARE = 0.5  # of the image
WIDEST = 3.0  # width over height, or height over width
SHAPES = {"ellipse": 0.78, "box": 1.0, "triangle": 0.5, "cross": 0.64}  # and the share of its box that a shape fills
N_TEXTURES, TEXTURE_CELLS = 6, ((4, 40.0), (16, 25.0), (64, 15.0))  # cells a side, and how far they differ
GRAIN = 10.0  # sets the size of the JPEGs: 150 kB at 640 px, as COCO's
GREY = 128


@dataclass(frozen=True)
class CocoLike:
    """The scene: shapes of any size on one of a few textures; a class is a shape in a hue, the first ones are frequent.

    Most images have a long side of `size_px`; the first `n_classes` of COCO's categories are drawn and listed.
    """

    size_px: int
    n_classes: int
    name: str = "coco"
    version: int = VERSION
    jpeg_quality: int = 95

    @property
    def categories(self) -> list[dict[str, Any]]:
        return CATEGORIES[: self.n_classes]

    def draw(self, rng: np.random.Generator, position: int) -> tuple[np.ndarray, list[Annotation]]:
        pixels = _background(rng, self.size_px)
        objects: list[Annotation] = []
        if rng.random() >= EMPTY_SHARE:
            if rng.random() < CROWD_SHARE:
                objects.append(draw_crowd(pixels, rng)[0])
            objects += self._draw_objects(pixels, rng)
        height, width = pixels.shape[:2]
        grain = _part(_grain(self.size_px), rng, (width, height))
        pixels = cv2.addWeighted(pixels, 1.0, grain, 1.0, -GREY)
        if rng.random() < GREY_SHARE:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        return pixels, objects

    def _draw_objects(self, pixels: np.ndarray, rng: np.random.Generator) -> list[Annotation]:
        """Large ones first, so that they hide none of the small ones."""
        n = min(int(rng.geometric(1 / MEAN_OBJECTS)), MOST_OBJECTS)
        areas = np.sort(_areas(rng, n, pixels.shape[0] * pixels.shape[1]))[::-1]
        ratios = WIDEST ** rng.uniform(-1, 1, n)
        classes = rng.choice(self.n_classes, n, p=_frequencies(self.n_classes))
        objects = []
        for area, ratio, index in zip(areas, ratios, classes.tolist(), strict=True):
            shape = list(SHAPES)[index % len(SHAPES)]
            w, h = _sides(area / SHAPES[shape], ratio, pixels)
            x, y = rng.random(2) * (pixels.shape[1] - w, pixels.shape[0] - h)
            polygon = np.round(outline(shape, (x, y, w, h)), 2)
            colour = _colour(index, self.n_classes) + rng.integers(-12, 13, 3)
            objects.append(draw_polygon(pixels, polygon, colour.tolist(), CATEGORIES[index]["id"]))
        return objects


def _areas(rng: np.random.Generator, n: int, n_pixels: int) -> np.ndarray:
    """Areas in px^2 of n objects: small, medium or large by chance, and of all orders of magnitude within."""
    kinds = rng.integers(len(LOWEST_AREAS), size=n)
    largest = LARGEST_SHARE * n_pixels
    lowest = np.minimum(LOWEST_AREAS[kinds], largest)
    highest = np.minimum(HIGHEST_AREAS[kinds], largest)
    return lowest * (highest / lowest) ** rng.random(n)


def _sides(area: float, ratio: float, pixels: np.ndarray) -> tuple[float, float]:
    """Width and height in px of a box with an area, at most as wide and high as the image."""
    height, width = pixels.shape[:2]
    w = min(float(np.sqrt(area * ratio)), width)
    h = min(area / w, height)
    return min(area / h, width), h


@cache
def _frequencies(n_classes: int) -> np.ndarray:
    """Zipf's law: the n-th class is drawn 1 / n times as often as the first. A fifth of COCO's objects are persons."""
    shares = 1 / np.arange(1, n_classes + 1)
    return shares / shares.sum()


def _colour(index: int, n_classes: int) -> np.ndarray:
    """BGR of a class; its hue is that of the other classes only that differ in shape."""
    n_hues = -(-n_classes // len(SHAPES))
    rgb = colorsys.hsv_to_rgb(index // len(SHAPES) / n_hues, 0.75, 0.85)
    return np.array(rgb[::-1]) * 230 + 12


def _background(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """A part of a texture, uint8 [H,W,3], in one of COCO's sizes."""
    counts = np.array([count for _, _, count in SIZES_WH])
    width, height, _ = SIZES_WH[rng.choice(len(SIZES_WH), p=counts / counts.sum())]
    size = max(1, round(width * size_px / BASE_PX)), max(1, round(height * size_px / BASE_PX))
    texture = _textures(size_px)[int(rng.integers(N_TEXTURES))]
    return _part(texture, rng, size).copy()


def _part(image: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A part of width x height px at a random place."""
    width, height = size
    x = int(rng.integers(image.shape[1] - width + 1))
    y = int(rng.integers(image.shape[0] - height + 1))
    return image[y : y + height, x : x + width]


@cache
def _textures(size_px: int) -> list[np.ndarray]:
    """Smooth patterns, uint8 [side,side,3], twice as large as an image."""
    rng = np.random.default_rng(0)
    return [_texture(rng, 2 * size_px) for _ in range(N_TEXTURES)]


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    total = np.full((side, side, 3), GREY, np.float32)
    for n_cells, spread in TEXTURE_CELLS:
        cells = rng.normal(0, spread, (n_cells, n_cells, 3)).astype(np.float32)
        total += cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


@cache
def _grain(size_px: int) -> np.ndarray:
    """Noise around GREY, uint8 [side,side,3], that is added to an image: on objects and background alike."""
    rng, side = np.random.default_rng(1), 2 * size_px
    grain = np.empty((side, side, 3), np.uint8)
    for row in grain:  # as floats the whole takes gigabytes; the numbers are those of one call
        row[:] = np.clip(rng.normal(0, GRAIN, (side, 3)) + GREY, 0, 255)
    return grain
