"""Images and annotations of an annotation file, which anybody may have written: checked, and mended in place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from app.core.config import UserError

IMAGE_KEYS = ("id", "file_name", "width", "height")
ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox")
BOX_TOLERANCE_PX = 1.0  # rounding may put an annotated box over the border of its image
LEAST_SIDE_PX = 1.0  # of what is left of a box that reaches farther
LEAST_SHARE = 1e-6  # of the image's side; smaller ones are 0 in a label file, which has six decimals
MAX_NAME_BYTES = 255  # of a file, and of the label file that is named after it
MAX_PATH_BYTES = 2000  # of a file name with its folders, which is put below the dataset's path and the view's
TRAIN_NAMES = ("train2017", "train", "Train", "training", "Training")
VAL_NAMES = ("val2017", "val", "valid", "Val", "Valid", "validation", "Validation", "test", "Test")
VAL_EVERY = 5  # one image in so many is val, where nothing says which are
N_TRIED = 20  # images whose files are looked for, to find out what stands before the names
LARGEST_ID = 2**53  # COCOeval keeps ids in float64 arrays, which do not hold larger integers exactly
MAX_SHOWN = 80  # characters of a value in a message
NOT_COCO = "give an instances file in COCO's format (docs/own-detector.md)"
Box = list[float]  # x, y, width, height in px


def shown(value: Any) -> str:
    """A value of the file for a message: short, and on one line."""
    try:
        return repr(value)[:MAX_SHOWN]
    except RecursionError:
        return "a deeply nested value"


def whole(value: Any) -> int | None:
    """The whole number from 0 to 2^53 that an int or a float is (NumPy and pandas write 7.0); None for all else."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int):
        return None
    return number if 0 <= number <= LARGEST_ID else None


def is_number(value: Any) -> bool:
    """Whether the value is a number of at most 2^53; Python's JSON reader accepts NaN and Infinity, this does not."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_ID


def check_image(file: Path, image: Any) -> dict[str, Any]:
    """The entry, with whole numbers for its id and size; raises a UserError if it cannot be used."""
    if not isinstance(image, dict) or not set(IMAGE_KEYS) <= set(image):
        raise UserError(f"{file}: an image entry lacks id, file_name, width or height: {shown(image)}")
    image_id = whole(image["id"])
    if image_id is None:
        raise UserError(f"{file}: image id {shown(image['id'])} is not a whole number from 0 to 2^53: {NOT_COCO}")
    name = image["file_name"]
    if not isinstance(name, str) or not name.isprintable() or not PurePosixPath(name).name:
        raise UserError(f"{file}: image id {image_id} has file name {shown(name)}: {NOT_COCO}")
    width, height = whole(image["width"]), whole(image["height"])
    if not width or not height:
        size = f"{shown(image['width'])} x {shown(image['height'])}"
        raise UserError(f"{file}: image {name} has size {size}: mend the annotations")
    image |= {"id": image_id, "width": width, "height": height}
    return image


def is_named_by_its_id(image: dict[str, Any]) -> bool:
    """Whether a file name that is a number is the image's id, as it is in COCO."""
    stem = PurePosixPath(image["file_name"]).stem
    return not stem.isdecimal() or (stem.lstrip("0") or "0") == str(image["id"])


def label_name(file_name: str) -> PurePosixPath:
    """The name of the label file of an image, in the folder of labels."""
    return PurePosixPath(file_name).with_suffix(".txt")


def name_fault(file_name: str) -> str:
    """Why no file of this name is looked for; '' if it is."""
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts:
        return "its file name leaves the image folder"
    lengths = [len(part.encode()) for part in (*path.parts, label_name(file_name).name)]
    if max(lengths) > MAX_NAME_BYTES or sum(lengths) > MAX_PATH_BYTES:
        return "its file name is too long"
    return ""


def check_annotation(file: Path, annotation: Any, number: int) -> dict[str, Any]:
    """The entry, with an id that is an int or a text, and with iscrowd; raises a UserError if it cannot be used.

    `number` is its position in the file, for the message about an annotation that has no id.
    """
    if not isinstance(annotation, dict) or not set(ANNOTATION_KEYS) <= set(annotation):
        raise UserError(f"{file}: annotation {number} lacks one of {', '.join(ANNOTATION_KEYS)}: {NOT_COCO}")
    key = annotation["id"]
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise UserError(f"{file}: annotation id {shown(key)} is neither a whole number nor a text: number them from 1")
    annotation["id"] = key
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
    if annotation["iscrowd"] not in (0, 1):
        raise UserError(
            f"{file}: annotation {shown(key)} has iscrowd {shown(annotation['iscrowd'])}, not 0 or 1: {NOT_COCO}"
        )
    return annotation


def box_fault(bbox: Any, area: Any) -> str:
    """What is wrong with an annotation's box x,y,w,h in px or its area in px^2 (None: not given); '' if nothing is."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        return f"bbox {shown(bbox)} is not four finite numbers"
    if area is not None and (not is_number(area) or area < 0):
        return f"area {shown(area)} is not a finite number from 0 on"
    if bbox[2] < 0 or bbox[3] < 0:
        return f"bbox {shown(bbox)} has a negative size"
    return ""


def reaches_over(bbox: Box, image: dict[str, Any]) -> bool:
    """Whether a box reaches over the border of its image by more than rounding."""
    x, y, w, h = bbox
    least, width, height = -BOX_TOLERANCE_PX, image["width"], image["height"]
    return min(x, y) < least or x + w > width - least or y + h > height - least


def could_be_corners(bbox: Box, image: dict[str, Any]) -> bool:
    """Whether the numbers could be x1, y1, x2, y2 of a box inside the image."""
    x1, y1, x2, y2 = bbox
    return x1 < x2 <= image["width"] + BOX_TOLERANCE_PX and y1 < y2 <= image["height"] + BOX_TOLERANCE_PX


def inside(bbox: Box, image: dict[str, Any]) -> Box:
    """The part of a box that lies in its image; its width or height is not above 0 where none does."""
    x, y, w, h = map(float, bbox)
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, image["width"]), min(y + h, image["height"])
    return [left, top, right - left, bottom - top]


def clip_to_image(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Clips box and area of an annotation in place; False if less than a pixel is left of the width or the height."""
    bbox = inside(annotation["bbox"], image)
    if min(bbox[2:]) < LEAST_SIDE_PX:
        return False
    annotation |= {"bbox": bbox, "area": min(annotation["area"], bbox[2] * bbox[3])}
    return True


def labelled(bbox: Box, image: dict[str, Any]) -> Box | None:
    """The part of a box inside its image, for a label file; None if that part has no area, or next to none."""
    clipped = inside(bbox, image)
    if clipped[2] < LEAST_SHARE * image["width"] or clipped[3] < LEAST_SHARE * image["height"]:
        return None
    return clipped


def mend_names(images: list[dict[str, Any]], images_dir: Path | None) -> int:
    """Makes the file names paths below the image folder, in place, and returns how many have changed.

    A slash takes the place of a backslash, but in the name of a file that is there. Folders before the names that are
    not in `images_dir` go; None: it is not looked into.
    """
    n_changed = 0
    for image in images:
        name = image["file_name"]
        with_slashes = name.replace("\\", "/")
        is_path = with_slashes != name and PurePosixPath(with_slashes).name != ""
        if is_path and not (images_dir and _is_there(images_dir, name)):
            image["file_name"] = with_slashes
            n_changed += 1
    prefix = _prefix(images, images_dir) if images_dir else ()
    for image in images if prefix else []:
        parts = PurePosixPath(image["file_name"]).parts
        if parts[: len(prefix)] == prefix and len(parts) > len(prefix):
            image["file_name"] = "/".join(parts[len(prefix) :])
            n_changed += 1
    return n_changed


def _is_there(images_dir: Path, name: str) -> bool:
    return os.path.exists(f"{images_dir}/{name}")  # noqa: PTH110  of Path it raises an error for a name that is too long


def _prefix(images: list[dict[str, Any]], images_dir: Path) -> tuple[str, ...]:
    """The folders that stand before a name and are not in the image folder, as the first image shows that is found."""
    for image in images[:N_TRIED]:
        name = image["file_name"]
        parts = PurePosixPath(name).parts
        if name_fault(name):
            continue
        if _is_there(images_dir, name):
            return ()
        for n_leading in range(1, len(parts)):
            if _is_there(images_dir, "/".join(parts[n_leading:])):
                return parts[:n_leading]
    return ()


def ids_of_part(images: list[dict[str, Any]], part: str) -> set[int]:
    """The ids of 'train' or 'val' among images that one file lists.

    The first folder of the names says it, if it does for all; else the hash of a name, which stays whatever is added.
    Beside a val/, test/ is of neither.
    """
    folders = {PurePosixPath(image["file_name"]).parts[0] for image in images}
    if folders <= {*TRAIN_NAMES, *VAL_NAMES}:
        names = TRAIN_NAMES if part == "train" else [name for name in VAL_NAMES if name in folders][:1]
        return {image["id"] for image in images if PurePosixPath(image["file_name"]).parts[0] in names}
    ids = set()
    for image in images:
        digest = hashlib.sha256(image["file_name"].encode()).hexdigest()
        if (int(digest, 16) % VAL_EVERY == 0) == (part == "val"):
            ids.add(image["id"])
    return ids
