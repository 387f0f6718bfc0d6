"""Image file -> pixels -> input of the network, and boxes back: one rule for all stages."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from app.core.config import UserError

JPEG_SUFFIXES, JPEG_END = (".jpg", ".jpeg"), b"\xff\xd9"


def fault(image_dir: Path, file_name: str, width: int, height: int) -> str:
    """What is wrong with an image file, or ''. It is decoded in full: a header says nothing of the pixels.

    width and height in px are those of the annotations; they mean the decoded image, after any EXIF rotation.
    A whole folder may be a link, of the user's making; a single file that leads elsewhere came with the dataset.
    """
    path = image_dir / file_name
    roots = [os.path.realpath(folder) for folder in (image_dir, image_dir.parent)]
    if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
        return "is a link out of the dataset"
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not data:
        return "is empty"
    # OpenCV decodes a cut JPEG without an error and fills the rest with grey.
    if path.suffix.lower() in JPEG_SUFFIXES and not data.rstrip(b"\0").endswith(JPEG_END):
        return "is cut off or damaged (a JPEG must end in FF D9)"
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # for example more pixels than OpenCV takes
        pixels = None
    if pixels is None:
        return "cannot be decoded"
    if pixels.shape[:2] != (height, width):
        return f"has {pixels.shape[1]} x {pixels.shape[0]} px, the annotations say {width} x {height}"
    return ""


PAD_VALUE = 114
JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class Placement:
    """Where an image of width x height px lies inside the square input: its new size and the left and top padding."""

    width: int
    height: int
    new_width: int
    new_height: int
    left: int
    top: int


def read_image(path: Path) -> np.ndarray:
    """Image file -> uint8 [H,W,3] BGR, rotated as its EXIF says (COCO's sizes are those after the rotation).

    Raises:
        UserError: missing, unreadable or truncated (OpenCV would fill the missing part of a JPEG with grey).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror}): restore the file") from error
    truncated = path.suffix.lower() in (".jpg", ".jpeg") and JPEG_END not in data[-64:]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data and not truncated else None
    if image is None:
        raise UserError(f"image {path} {'is truncated' if truncated else 'cannot be decoded'}: restore the file")
    return image


def place(width: int, height: int, imgsz: int) -> Placement:
    """Long side to imgsz, small images scaled up, centred; an odd pixel of padding goes right or below.

    The rounding is that of Ultralytics 8.4.190 in validation (data/base.py load_image, then LetterBox with
    scaleup=False in data/augment.py): sizes round up, so no side vanishes.
    """
    ratio = imgsz / max(width, height)
    new_width, new_height = min(math.ceil(width * ratio), imgsz), min(math.ceil(height * ratio), imgsz)
    return Placement(width, height, new_width, new_height, (imgsz - new_width) // 2, (imgsz - new_height) // 2)


def letterbox(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Placement]:
    """uint8 [H,W,3] BGR -> network input float32 [3,imgsz,imgsz] RGB 0..1, and where the image lies in it."""
    height, width = image.shape[:2]
    p = place(width, height, imgsz)
    if (p.new_width, p.new_height) != (width, height):
        image = cv2.resize(image, (p.new_width, p.new_height), interpolation=cv2.INTER_LINEAR)
    array = np.full((3, imgsz, imgsz), PAD_VALUE / np.float32(255), np.float32)
    inside = array[:, p.top : p.top + p.new_height, p.left : p.left + p.new_width]
    for channel in range(3):
        np.divide(image[:, :, 2 - channel], np.float32(255), out=inside[channel])
    return array, p


def undo(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes [n,4] x1,y1,x2,y2 in input px -> x,y,w,h in image px, clipped to the image, float64."""
    p = placement
    gain = np.array([p.new_width / p.width, p.new_height / p.height] * 2)
    corners = (boxes.astype(np.float64) - [p.left, p.top, p.left, p.top]) / gain
    corners = corners.clip(0, [p.width, p.height, p.width, p.height])
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
