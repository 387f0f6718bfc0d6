"""Ultralytics' augmentation of a training sample (data/augment.py v8_transforms, Format, 8.4.190) in less time.

Every byte of the image and every bit of the boxes is what Ultralytics' own transforms give, as
tests/component/test_augment.py shows. What costs less:
- The canvas has a fourth channel of no meaning: on four channels cv2.warpAffine takes 0.4 of its time on three (OpenCV
  5.0.0), with equal values in the others.
- Only what the warp reads of the canvas is written, and the canvas stays: new memory costs more than what is written
  to it.
- The boxes of a mosaic are one array, without Ultralytics' Instances.
- The colours may be left to a GPU (app/train/colours.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from ultralytics.data.augment import RandomPerspective
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh

from app.coco.images import PAD_VALUE

N_PARTNERS = 3  # of a mosaic of 2 x 2
BORDER = (PAD_VALUE,) * 4
FILTER_PX = 2  # the warp reads one px beyond the place it needs; another for rounding
SMALLEST_AREA = 0.1  # share of its area that a box must keep
N_LEVELS = 256
HUES = 180  # cv2's hue is half of the angle


class Boxes:
    """Boxes of all images in one array each: classes float32 [n,1], corners x1,y1,x2,y2 as shares float32 [n,4]."""

    def __init__(self, labels: list[dict[str, Any]]) -> None:
        """`labels` as Ultralytics' datasets have them, a dict an image."""
        counts = [len(label["cls"]) for label in labels]
        self.end = np.cumsum(counts)
        self.classes = np.concatenate([label["cls"] for label in labels])
        self.corners = xywh2xyxy(np.concatenate([label["bboxes"] for label in labels]))

    def of(self, image: int) -> slice:
        """Rows of an image."""
        return slice(self.end[image - 1] if image else 0, self.end[image])


class Patch(NamedTuple):
    """An image on the canvas: its number, its pixels [H,W,3] BGR, and the column and row of its corner."""

    image: int
    pixels: np.ndarray
    left: int
    top: int


@dataclass(frozen=True)
class Sample:
    """What belongs to the pixels of a sample.

    Attributes:
        image: number of the image, of a mosaic its first one.
        classes, boxes: float32 [n,1], and cx,cy,w,h as shares float32 [n,4].
        colours: uint8 [3,256], new hue, saturation and value for each old one, where somebody else has to apply them.
    """

    image: int
    classes: np.ndarray
    boxes: np.ndarray
    colours: np.ndarray | None


class Augmentation:
    """Makes samples: mosaic, affine warp, colours, flips.

    Args:
        imgsz: side of a sample in px.
        hyp: Ultralytics' arguments, for which `takes` is true.
        boxes: of all images.
        load: image number -> pixels [H,W,3] BGR, no side longer than imgsz.
        colours_later: the colours are not applied, but go with the sample.
    """

    def __init__(
        self, imgsz: int, hyp: Any, boxes: Boxes, load: Callable[[int], np.ndarray], colours_later: bool
    ) -> None:
        self.imgsz, self.hyp, self.boxes, self.load, self.colours_later = imgsz, hyp, boxes, load, colours_later
        self.affine = RandomPerspective(hyp.degrees, hyp.translate, hyp.scale, size=(imgsz, imgsz))
        self.gains = [hyp.hsv_h, hyp.hsv_s, hyp.hsv_v]
        self.canvas = np.empty((2 * imgsz, 2 * imgsz, 4), np.uint8)
        self.warped, self.flipped = np.empty((2, imgsz, imgsz, 4), np.uint8)
        self.hsv, self.rgb = np.empty((2, imgsz, imgsz, 3), np.uint8)

    def __call__(self, image: int, partners: Callable[[], list[int]], out: np.ndarray) -> Sample:
        """The sample that the states of `random` and NumPy decide. Numbers are drawn in Ultralytics' order.

        Args:
            image: its number.
            partners: draws the images that mosaic puts beside it.
            out: uint8 [3,imgsz,imgsz], gets the image, RGB.
        """
        patches, canvas = self._patches(image, partners)
        params = self.affine.get_params({"img": canvas})
        for _ in ("mixup", "cutmix"):
            random.random()  # whether there is
        colours = self._colours() if any(self.gains) else None
        flips_rows, flips_columns = random.random() < self.hyp.flipud, random.random() < self.hyp.fliplr
        matrix = params["M"]
        self._paste(patches, canvas, _visible(matrix, canvas.shape, self.imgsz))
        cv2.warpAffine(canvas, matrix[:2], (self.imgsz, self.imgsz), dst=self.warped, borderValue=BORDER)
        pixels = self.warped
        if flips_rows or flips_columns:
            code = -1 if flips_rows and flips_columns else int(flips_columns)
            pixels = cv2.flip(self.warped, code, dst=self.flipped)
        cv2.split(self._rgb(pixels, None if self.colours_later else colours), list(out))
        classes, boxes = self._labels(patches, canvas.shape, params)
        if flips_rows:
            boxes[:, 1] = self.imgsz - boxes[:, 1]
        if flips_columns:
            boxes[:, 0] = self.imgsz - boxes[:, 0]
        boxes /= self.imgsz
        return Sample(image, classes, boxes, colours if self.colours_later else None)

    def _patches(self, image: int, partners: Callable[[], list[int]]) -> tuple[list[Patch], np.ndarray]:
        """What lies on the canvas, and the canvas: that of a mosaic, or one of the image's own size."""
        pixels = self.load(image)
        if random.random() > self.hyp.mosaic:
            height, width = pixels.shape[:2]
            return [Patch(image, pixels, 0, 0)], self.canvas[:height, :width]
        others = [(number, self.load(number)) for number in partners()]
        half, most = self.imgsz / 2, 2 * self.imgsz - self.imgsz / 2
        centre_y, centre_x = int(random.uniform(half, most)), int(random.uniform(half, most))
        patches = []
        for quarter, (number, part) in enumerate([(image, pixels), *others]):
            height, width = part.shape[:2]
            left = centre_x if quarter % 2 else centre_x - width
            top = centre_y if quarter // 2 else centre_y - height
            patches.append(Patch(number, part, left, top))
        return patches, self.canvas

    def _paste(self, patches: list[Patch], canvas: np.ndarray, visible: tuple[slice, slice]) -> None:
        """Writes what lies in the visible part of the canvas; the rest of it is what it was."""
        rows, columns = visible
        if len(patches) > 1:
            canvas[visible] = PAD_VALUE
        for _, pixels, left, top in patches:
            height, width = pixels.shape[:2]
            y1, y2 = max(top, rows.start), min(top + height, rows.stop)
            x1, x2 = max(left, columns.start), min(left + width, columns.stop)
            if y1 < y2 and x1 < x2:
                part = pixels[y1 - top : y2 - top, x1 - left : x2 - left]
                cv2.cvtColor(part, cv2.COLOR_BGR2BGRA, dst=canvas[y1:y2, x1:x2])

    def _rgb(self, pixels: np.ndarray, colours: np.ndarray | None) -> np.ndarray:
        """uint8 [S,S,4] BGR and one more -> [S,S,3] RGB with new colours."""
        if colours is None:
            return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB, dst=self.rgb)
        hsv = cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV, dst=self.hsv)
        cv2.LUT(hsv, colours.T.copy()[None], dst=hsv)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=self.rgb)

    def _colours(self) -> np.ndarray:
        """Draws `Sample.colours`. Black and grey stay without colour."""
        hue, saturation, value = np.random.uniform(-1, 1, 3) * self.gains
        levels = np.arange(N_LEVELS, dtype=np.float64)
        tables = np.empty((3, N_LEVELS), np.uint8)
        tables[0] = ((levels + hue * HUES) % HUES).astype(np.uint8)
        tables[1] = np.clip(levels * (saturation + 1), 0, N_LEVELS - 1).astype(np.uint8)
        tables[2] = np.clip(levels * (value + 1), 0, N_LEVELS - 1).astype(np.uint8)
        tables[1, 0] = 0
        return tables

    def _labels(
        self, patches: list[Patch], canvas_shape: tuple[int, ...], params: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classes float32 [n,1] of what is left of the boxes, and those in px of the sample, cx,cy,w,h."""
        rows = [self.boxes.of(patch.image) for patch in patches]
        classes = np.concatenate([self.boxes.classes[of_image] for of_image in rows])
        parts = []
        for of_image, (_, pixels, left, top) in zip(rows, patches, strict=True):
            height, width = pixels.shape[:2]
            size = np.array([width, height, width, height], np.float32)
            corner = np.array([left, top, left, top], np.float32)
            parts.append(self.boxes.corners[of_image] * size + corner)
        corners = np.concatenate(parts)
        if len(patches) > 1:
            corners = corners.clip(0, canvas_shape[0])
            is_left = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]) > 0
            classes, corners = classes[is_left], corners[is_left]
        moved = self.affine.apply_bboxes(corners, params["M"]).clip(0, self.imgsz)
        scaled = corners * np.float32(params["scale"])
        kept = self.affine.box_candidates(scaled.T, moved.T, area_thr=SMALLEST_AREA)
        return classes[kept], cast(np.ndarray, xyxy2xywh(moved[kept]))


def takes(hyp: Any) -> bool:
    """Whether an Augmentation does all that Ultralytics would do for these arguments, where the labels are boxes.

    Albumentations take part wherever the package is installed.
    """
    others = hyp.mixup or hyp.cutmix or hyp.shear or hyp.perspective or hyp.bgr
    return not others and find_spec("albumentations") is None


def _visible(matrix: np.ndarray, canvas_shape: tuple[int, ...], side: int) -> tuple[slice, slice]:
    """Rows and columns of a canvas that a warp by `matrix` [3,3] to a square of `side` px can read."""
    (a, b, c), (d, e, f) = matrix[:2].tolist()
    determinant = a * e - b * d
    places = []
    for x, y in ((0, 0), (side, 0), (0, side), (side, side)):
        places.append(((e * (x - c) - b * (y - f)) / determinant, (a * (y - f) - d * (x - c)) / determinant))
    columns, rows = ([place[axis] for place in places] for axis in (0, 1))
    return _within(rows, canvas_shape[0]), _within(columns, canvas_shape[1])


def _within(places: list[float], length: int) -> slice:
    start = max(math.floor(min(places)) - FILTER_PX, 0)
    return slice(start, max(min(math.ceil(max(places)) + FILTER_PX, length), start))
