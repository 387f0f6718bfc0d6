"""Image file -> pixels -> input of the network, and boxes back: one rule for all stages."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from app.core.config import UserError

PAD_VALUE = 114
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
MARKER, START_OF_SCAN = 0xFF, 0xDA  # first byte of every JPEG marker, and the second byte of this one


@dataclass(frozen=True)
class Placement:
    """Where an image of width x height px lies inside the square input: its new size and the left and top padding."""

    width: int
    height: int
    new_width: int
    new_height: int
    left: int
    top: int


def fault(image_dir: Path, file_name: str, width: int, height: int) -> str:
    """What is wrong with an image file of a dataset, or ''. The file is decoded: a header says nothing of the pixels.

    width and height in px are those of the annotations; they mean the decoded image, after any EXIF rotation.
    A whole folder may be a link that the user made; a single file that leads elsewhere came with the dataset.
    """
    path = image_dir / file_name
    roots = [os.path.realpath(folder) for folder in (image_dir, image_dir.parent)]
    if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
        return "is a link out of the dataset"
    pixels = _decode(path)
    if isinstance(pixels, str):
        return pixels
    if pixels.shape[:2] != (height, width):
        return f"has {pixels.shape[1]} x {pixels.shape[0]} px, the annotations say {width} x {height}"
    return ""


def read_image(path: Path) -> np.ndarray:
    """Image file -> uint8 [H,W,3] BGR, rotated as its EXIF says (COCO's sizes are those after the rotation).

    Raises:
        UserError: missing, unreadable, or not whole.
    """
    pixels = _decode(path)
    if isinstance(pixels, str):
        raise UserError(f"image {path} {pixels}: restore the file")
    return pixels


def _decode(path: Path) -> np.ndarray | str:
    """The pixels of an image file, or what is wrong with the file. Its content decides, never its suffix.

    OpenCV decodes from memory: there a file that ends too early is an error, while cv2.imread fills the rest of a JPEG
    with grey (opencv 5.0.0).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not data:
        return "is empty"
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # for example more pixels than OpenCV takes
        return "cannot be decoded"
    if data.startswith(JPEG_START) and (pixels is None or not _has_end(data)):
        return "is cut off or damaged"
    return "cannot be decoded" if pixels is None else pixels


def _has_end(jpeg: bytes) -> bool:
    """Whether the end marker follows the start of the scan; OpenCV does not ask for it.

    It is missing where a broken download left zeros, which decode as grey blocks. The segments before the scan are
    stepped over, because a thumbnail in them has an end marker of its own.
    """
    position = 2  # of the first segment: a marker of two bytes, then two bytes that count themselves and the content
    while position + 4 <= len(jpeg) and jpeg[position] == MARKER and jpeg[position + 1] != START_OF_SCAN:
        n_content = int.from_bytes(jpeg[position + 2 : position + 4])
        position += 1 if jpeg[position + 1] == MARKER else 2 + n_content  # a marker may have fill bytes before it
    return jpeg.rfind(JPEG_END, position) >= 0


def place(width: int, height: int, imgsz: int) -> Placement:
    """The long side becomes imgsz, small images are scaled up and centred; an odd px of padding goes right or below.

    The rounding is that of Ultralytics 8.4.190 in validation (data/base.py load_image, then LetterBox with
    scaleup=False in data/augment.py): sizes round up, so no side vanishes.
    """
    ratio = imgsz / max(width, height)
    new_width = min(math.ceil(width * ratio), imgsz)
    new_height = min(math.ceil(height * ratio), imgsz)
    left, top = (imgsz - new_width) // 2, (imgsz - new_height) // 2
    return Placement(width, height, new_width, new_height, left, top)


def letterbox(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Placement]:
    """uint8 [H,W,3] BGR -> network input float32 [3,imgsz,imgsz] RGB 0..1, and where the image lies in it."""
    height, width = image.shape[:2]
    placement = place(width, height, imgsz)
    new_size = placement.new_width, placement.new_height
    if new_size != (width, height):
        image = cv2.resize(image, new_size, interpolation=cv2.INTER_LINEAR)
    array = np.full((3, imgsz, imgsz), PAD_VALUE / np.float32(255), np.float32)
    right, bottom = placement.left + placement.new_width, placement.top + placement.new_height
    inside = array[:, placement.top : bottom, placement.left : right]
    for channel in range(3):
        np.divide(image[:, :, 2 - channel], np.float32(255), out=inside[channel])
    return array, placement


def undo(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes [n,4] x1,y1,x2,y2 in input px -> x,y,w,h in image px, clipped to the image, float64."""
    size = np.array([placement.width, placement.height])
    gain = np.array([placement.new_width, placement.new_height]) / size
    offset = np.array([placement.left, placement.top])
    corners = (boxes.astype(np.float64) - np.tile(offset, 2)) / np.tile(gain, 2)
    corners = corners.clip(0, np.tile(size, 2))
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
