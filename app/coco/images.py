"""Reads image files, makes the network's input from them and maps its boxes back: the same code for all stages."""

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
    """What is wrong with an image file of a dataset, or ''. The whole file is decoded, because a header can be intact
    while the pixels are damaged.

    A file must not lead out of the dataset by a link. The image folder itself may be a link, which the user has made.

    Args:
        width, height: size in px from the annotations, which is that of the decoded image after its EXIF rotation.
    """
    path = image_dir / file_name
    target = Path(os.path.realpath(path))
    in_folder = target.is_relative_to(os.path.realpath(image_dir))
    in_dataset = target.is_relative_to(os.path.realpath(image_dir.parent))
    if not (in_folder or in_dataset):
        return "is a link out of the dataset"
    pixels = _decode(path)
    if isinstance(pixels, str):
        return pixels
    file_height, file_width = pixels.shape[:2]
    if (file_width, file_height) != (width, height):
        return f"has {file_width} x {file_height} px, the annotations say {width} x {height}"
    return ""


def read_image(path: Path) -> np.ndarray:
    """Image file -> uint8 [H,W,3] BGR, rotated as its EXIF says (COCO's sizes are those after the rotation).

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    pixels = _decode(path)
    if isinstance(pixels, str):
        raise UserError(f"image {path} {pixels}: restore the file")
    return pixels


def _decode(path: Path) -> np.ndarray | str:
    """The pixels of an image file, or what is wrong with the file. The format follows from its content, not its suffix.

    cv2.imdecode fails on a file that ends too early; cv2.imread fills the rest of a JPEG with grey (opencv 5.0.0).
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
    """Whether a JPEG has an end marker after the start of its scan; OpenCV decodes files without one.

    A broken download can leave zeros, which decode as grey blocks, instead of the end. The segments before the scan are
    skipped, because a thumbnail in one of them has an end marker too.
    """
    # A segment is a marker of two bytes, then two bytes with its length, which counts them and the content.
    position = 2  # after the marker that starts the file
    while position + 4 <= len(jpeg) and jpeg[position] == MARKER and jpeg[position + 1] != START_OF_SCAN:
        if jpeg[position + 1] == MARKER:  # a fill byte before the marker
            position += 1
        else:
            position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return jpeg.rfind(JPEG_END, position) >= 0


def place(width: int, height: int, imgsz: int) -> Placement:
    """Scales the long side to imgsz, up or down, and centres the image; an odd px of padding goes right or below.

    The rounding is that of Ultralytics 8.4.190 in validation (data/base.py load_image, then LetterBox with
    scaleup=False in data/augment.py): sizes round up, so no side becomes 0.
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
    rows = slice(placement.top, placement.top + placement.new_height)
    columns = slice(placement.left, placement.left + placement.new_width)
    inside = array[:, rows, columns]
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
    top_left, bottom_right = corners[:, :2], corners[:, 2:]
    return np.concatenate([top_left, bottom_right - top_left], axis=1)
