"""Reads image files, makes the network's input from them and maps its boxes back: the same code for all stages."""

from __future__ import annotations

import hashlib
import io
import math
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from app.core.config import UserError

PAD_VALUE = 114
InputSize = int | tuple[int, int]  # of the network's input in px: side of a square, or height and width
MAX_PIXELS = 178_956_970  # Pillow's limit: 0.5 GB once decoded, in each of several threads
TOO_LARGE = f"has more pixels than the {MAX_PIXELS:,} that are decoded: shrink it"
FEW_PIXELS = 2**24  # decoded before the sizes are compared: 50 MB
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
MARKER, START_OF_SCAN = 0xFF, 0xDA  # first byte of every JPEG marker, and the second byte of this one
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segments with the size of a JPEG

WidthHeight = tuple[int, int]  # of an image in px
warnings.filterwarnings("ignore", module=r"PIL\.")  # of headers: what is wrong with a file is said by its fault


@dataclass(frozen=True)
class Placement:
    """Where an image of width x height px lies in the network's input: its new size and the left and top padding."""

    width: int
    height: int
    new_width: int
    new_height: int
    left: int
    top: int


def fault(image_dir: Path, file_name: str, width: int, height: int) -> str:
    """What is wrong with an image file of a dataset, or ''; `width` and `height` are those after its EXIF rotation.

    The whole file is decoded, because a header can be intact while the pixels are damaged.
    """
    pixels = _decode(image_dir / file_name, (width, height))
    if isinstance(pixels, str):
        return pixels
    file_height, file_width = pixels.shape[:2]
    if (file_width, file_height) != (width, height):
        return _other_size((file_width, file_height), (width, height))
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


def content_hash(path: Path) -> str:
    """SHA-256 (first 16 hex digits) of an image file; raises a UserError if it is missing or unreadable."""
    data = _read(path)
    if isinstance(data, str):
        raise UserError(f"image {path} {data}: restore the file")
    return hashlib.sha256(data).hexdigest()[:16]


def dead_link(path: Path) -> str:
    """What to say of a link to a file or folder that is not there; '' if `path` is something else."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"is a link to {path.readlink()}, which is not there (a container sees nothing outside the dataset)"


def _decode(path: Path, expected: WidthHeight | None = None) -> np.ndarray | str:
    """The pixels of an image file, or what is wrong with the file. The format follows from its content, not its suffix.

    The header is looked at first: a small file can claim gigabytes of pixels. cv2.imdecode fails on a file that ends
    too early; cv2.imread fills the rest of a JPEG with grey (opencv 5.0.0).

    Args:
        expected: a large image that cannot have this size is not decoded.
    """
    data = _read(path)
    if isinstance(data, str):
        return data
    is_jpeg = data.startswith(JPEG_START)
    try:
        size, scan = _jpeg_header(data) if is_jpeg else (_size(data), 0)
        if size and (reason := _too_large(size, expected)):
            return reason
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except Image.DecompressionBombError:
        return TOO_LARGE
    except cv2.error:
        return "cannot be decoded"
    # A broken download can leave zeros, which OpenCV decodes as grey blocks, in place of the end marker.
    if is_jpeg and (pixels is None or data.rfind(JPEG_END, scan) < 0):
        return "is cut off or damaged"
    return "cannot be decoded" if pixels is None else pixels


def _read(path: Path) -> bytes | str:
    """The content of a file, or why there is none. Reading a pipe would wait for ever, a device never end."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "is a pipe, socket or device, not a file"
        return path.read_bytes() or "is empty"
    except FileNotFoundError as error:
        return dead_link(path) or f"cannot be read ({error.strerror})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _too_large(size: WidthHeight, expected: WidthHeight | None) -> str:
    """Why an image is not decoded, or ''. Its header does not know of EXIF, so sides may be swapped."""
    n_pixels = size[0] * size[1]
    if n_pixels > MAX_PIXELS:
        return TOO_LARGE
    if expected and n_pixels > FEW_PIXELS and sorted(size) != sorted(expected):
        return _other_size(size, expected)
    return ""


def _other_size(size: WidthHeight, expected: WidthHeight) -> str:
    return f"has {size[0]} x {size[1]} px, the annotations say {expected[0]} x {expected[1]}"


def _size(data: bytes) -> WidthHeight | None:
    """Width and height in the header of an image that is no JPEG; None where Pillow does not know the format.

    Raises:
        DecompressionBombError: more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    # What damaged headers give; the last where Ultralytics has been imported, whose Image.open looks for a plugin.
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, struct.error, ImportError):
        return None


def _jpeg_header(jpeg: bytes) -> tuple[WidthHeight | None, int]:
    """Width and height in the header of a JPEG, if it has them, and where its scan starts.

    The segments before the scan are walked, because a thumbnail in one of them has a size and an end of its own.
    """
    # A segment is a marker of two bytes, then two bytes with its length, which counts them and the content.
    size, position = None, 2  # after the marker that starts the file
    while position + 4 <= len(jpeg) and jpeg[position] == MARKER and jpeg[position + 1] != START_OF_SCAN:
        if jpeg[position + 1] == MARKER:  # a fill byte before the marker
            position += 1
            continue
        if jpeg[position + 1] in START_OF_FRAME and position + 9 <= len(jpeg):
            height, width = struct.unpack_from(">HH", jpeg, position + 5)
            size = (width, height)
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return size, position


def place(width: int, height: int, imgsz: InputSize) -> Placement:
    """Scales the image, up or down, until it fills the input, and centres it; an odd px of padding goes right or below.

    The rounding is that of Ultralytics 8.4.190 in validation (data/base.py load_image, then LetterBox with
    scaleup=False in data/augment.py): sizes round up, so no side becomes 0.
    """
    rows, columns = height_width(imgsz)
    ratio = min(rows / height, columns / width)
    new_width = min(math.ceil(width * ratio), columns)
    new_height = min(math.ceil(height * ratio), rows)
    left, top = (columns - new_width) // 2, (rows - new_height) // 2
    return Placement(width, height, new_width, new_height, left, top)


def height_width(imgsz: InputSize) -> tuple[int, int]:
    return (imgsz, imgsz) if isinstance(imgsz, int) else imgsz


def letterbox(image: np.ndarray, imgsz: InputSize) -> tuple[np.ndarray, Placement]:
    """uint8 [H,W,3] BGR -> network input float32 [3,*imgsz] RGB 0..1, and where the image lies in it."""
    height, width = image.shape[:2]
    placement = place(width, height, imgsz)
    new_size = placement.new_width, placement.new_height
    if new_size != (width, height):
        image = cv2.resize(image, new_size, interpolation=cv2.INTER_LINEAR)
    array = np.full((3, *height_width(imgsz)), PAD_VALUE / np.float32(255), np.float32)
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
