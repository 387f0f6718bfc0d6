"""COCO 2017's 80 categories, and the reader of instances_*.json, which checks what it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from app.coco.dataset import COCO_2017, LAYOUT
from app.core.config import UserError

# Supercategory: official category ids and names, in the order of the ids. The n-th of them is class n of the network.
_OFFICIAL = {
    "person": "1 person",
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "outdoor": "10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench",
    "animal": "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe",
    "accessory": "27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase",
    "sports": "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball "
    "glove, 41 skateboard, 42 surfboard, 43 tennis racket",
    "kitchen": "44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "food": "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 "
    "pizza, 60 donut, 61 cake",
    "furniture": "62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet",
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator",
    "indoor": "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush",
}


def _categories() -> list[dict[str, Any]]:
    """The entries of `categories` in an official instances_*.json."""
    categories = []
    for supercategory, members in _OFFICIAL.items():
        for member in members.split(", "):
            category_id, name = member.split(" ", 1)
            categories.append({"supercategory": supercategory, "id": int(category_id), "name": name})
    return categories


CATEGORIES = _categories()
CATEGORY_IDS: list[int] = [category["id"] for category in CATEGORIES]
NAMES: list[str] = [category["name"] for category in CATEGORIES]
CLASS_INDEX = {category_id: index for index, category_id in enumerate(CATEGORY_IDS)}

ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
LARGEST_ID = 2**53  # COCOeval keeps ids in float64 arrays, which do not hold larger integers exactly
NOT_COCO = f"give an instances file of {COCO_2017}, or of a dataset in its layout and categories"
BOX_TOLERANCE_PX = 1.0  # rounding may put an annotated box over the border of its image
MAX_SHOWN = 80  # characters of a value in a message
LEAST_SHARE = 1e-6  # of the image's side; smaller ones are 0 in a label file, which has six decimals
MAX_NAME_BYTES = 255  # of a file, and of the label file that is named after it
MAX_PATH_BYTES = 2000  # of a file name with its folders, which is put below the dataset's path and the view's


@dataclass(frozen=True)
class Split:
    """A checked annotation file. `images` are its image entries in the order of their ids.

    The other fields are dicts by image id: `boxes` are rows [category_id, x, y, w, h] in px without crowds,
    `n_degenerate` counts boxes without area, `problems` says why an image cannot be used.
    """

    file: Path
    images: list[dict[str, Any]]
    boxes: dict[int, list[list[float]]]
    n_annotations: dict[int, int]
    n_crowd: dict[int, int]
    n_degenerate: dict[int, int]
    problems: dict[int, str]


def read_instances(file: Path) -> Split:
    """Reads and checks an annotation file in COCO's instances layout.

    Faults of single images (a box outside its image, a path that leaves the folder) are collected in `problems`. Boxes
    without area, of which the official train2017 has some, are counted and left out.

    Raises:
        UserError: the file as a whole cannot be used.
    """
    tree = _read_json(file)
    listed = _check_categories(file, tree["categories"])
    images = _check_images(file, tree["images"])
    split = Split(
        file=file,
        images=[images[image_id] for image_id in sorted(images)],
        boxes={image_id: [] for image_id in images},
        n_annotations=dict.fromkeys(images, 0),
        n_crowd=dict.fromkeys(images, 0),
        n_degenerate=dict.fromkeys(images, 0),
        problems={},
    )
    for image_id, image in images.items():
        if problem := _name_fault(image["file_name"]):
            split.problems[image_id] = problem
    annotation_ids: set[int] = set()
    for number, annotation in enumerate(tree["annotations"]):
        _check_annotation(file, annotation, number, images)
        _check_is_listed(file, annotation, listed)
        if annotation["id"] in annotation_ids:
            raise UserError(f"{file}: annotation id {annotation['id']} is given twice: number the annotations from 1")
        annotation_ids.add(annotation["id"])
        _add_annotation(split, images[annotation["image_id"]], annotation)
    if not listed:
        raise UserError(f"{file} lists no categories: {NOT_COCO}")
    return split


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():  # a pipe is waited for without an end
            raise UserError(f"{file} is no file: COCO_DIR must hold {LAYOUT}")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: COCO_DIR must hold {LAYOUT}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is not readable JSON ({error}): unpack the official annotations again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise UserError(f"{file} has no list '{key}': {NOT_COCO}")
    if not tree["images"]:
        raise UserError(f"{file} lists no images: {NOT_COCO}")
    return tree


def _check_categories(file: Path, categories: list[Any]) -> set[int]:
    """The ids. Refuses unknown ids, and known ids with other names: their boxes would train the wrong class."""
    for category in categories:
        category_id = category.get("id") if isinstance(category, dict) else None
        if not _is_id(category_id) or category_id not in CLASS_INDEX:
            shown = _shown(category_id)
            raise UserError(f"{file}: category id {shown} is not among the 80 official COCO ids: {NOT_COCO}")
        name, official = category.get("name"), NAMES[CLASS_INDEX[category_id]]
        if name != official:
            raise UserError(f"{file}: category {category_id} is {_shown(name)}, in COCO it is '{official}': {NOT_COCO}")
    return {category["id"] for category in categories}


def _check_images(file: Path, entries: list[Any]) -> dict[int, dict[str, Any]]:
    """The checked entries by image id, in the order of the file.

    Raises:
        UserError: an entry cannot be used, or two entries have the same id or would share a label file.
    """
    images: dict[int, dict[str, Any]] = {}
    label_names: set[PurePosixPath] = set()
    for image in entries:
        _check_image(file, image)
        label_name = _label_name(image["file_name"])  # a.jpg and a.png would share a label file
        if image["id"] in images or label_name in label_names:
            raise UserError(
                f"{file}: image id {image['id']} or file name {image['file_name']} is listed twice: "
                "mend the annotations"
            )
        images[image["id"]] = image
        label_names.add(label_name)
    for image in images.values():
        folders = PurePosixPath(image["file_name"]).parents
        if shared := label_names.intersection(folders):
            raise UserError(f"{file}: the folder {shared.pop()}/ has the name of an image's label file: rename it")
    return images


def _label_name(file_name: str) -> PurePosixPath:
    """The name of the label file of an image, in the folder of labels."""
    return PurePosixPath(file_name).with_suffix(".txt")


def _name_fault(file_name: str) -> str:
    """Why no file of this name is looked for; '' if it is."""
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts:
        return "its file name leaves the image folder"
    lengths = [len(part.encode()) for part in (*path.parts, _label_name(file_name).name)]
    if max(lengths) > MAX_NAME_BYTES or sum(lengths) > MAX_PATH_BYTES:
        return "its file name is too long"
    return ""


def _check_image(file: Path, image: Any) -> None:
    if not isinstance(image, dict) or not {"id", "file_name", "width", "height"} <= set(image):
        raise UserError(f"{file}: an image entry lacks id, file_name, width or height: {_shown(image)}")
    if not _is_id(image["id"]):
        raise UserError(f"{file}: image id {_shown(image['id'])} is not a whole number from 0 to 2^53: {NOT_COCO}")
    name = image["file_name"]
    if not isinstance(name, str) or not name.isprintable() or not PurePosixPath(name).name:
        raise UserError(f"{file}: image id {image['id']} has file name {_shown(name)}: {NOT_COCO}")
    for side in (image["width"], image["height"]):
        if not _is_id(side) or side == 0:
            size = f"{_shown(image['width'])} x {_shown(image['height'])}"
            raise UserError(f"{file}: image {name} has size {size}: mend the annotations")
    # Ultralytics and others read the id from a file name that is a number, so it must be this id.
    stem = PurePosixPath(name).stem
    if stem.isdecimal() and (stem.lstrip("0") or "0") != str(image["id"]):
        raise UserError(f"{file}: image id {image['id']} has the file name {name}: mend the ids")


def _shown(value: Any) -> str:
    """A value of the file for a message: short, and on one line."""
    try:
        return repr(value)[:MAX_SHOWN]
    except RecursionError:
        return "a deeply nested value"


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID


def _check_annotation(file: Path, annotation: Any, number: int, images: dict[int, dict[str, Any]]) -> None:
    """`number` is the annotation's position in the file, for the message about an annotation that has no id."""
    if not isinstance(annotation, dict) or not set(ANNOTATION_KEYS) <= set(annotation):
        raise UserError(f"{file}: annotation {number} lacks one of {', '.join(ANNOTATION_KEYS)}: {NOT_COCO}")
    key, image_id, category = annotation["id"], annotation["image_id"], annotation["category_id"]
    if not _is_id(key) or key == 0:  # COCOeval (pycocotools 2.0.11) marks a match by this id and reads 0 as none
        raise UserError(f"{file}: annotation id {_shown(key)} is not a whole number from 1 to 2^53: number them from 1")
    if not _is_id(image_id) or image_id not in images:
        raise UserError(f"{file}: annotation {key} is for unknown image id {_shown(image_id)}: {NOT_COCO}")
    if not _is_id(category) or category not in CLASS_INDEX:
        raise UserError(f"{file}: annotation {key} has unknown category id {_shown(category)}: {NOT_COCO}")
    if annotation["iscrowd"] not in (0, 1):
        raise UserError(f"{file}: annotation {key} has iscrowd {_shown(annotation['iscrowd'])}, not 0 or 1: {NOT_COCO}")


def _check_is_listed(file: Path, annotation: dict[str, Any], listed: set[int]) -> None:
    """Refuses a category that `categories` lacks: its boxes would be learnt, and COCOeval would never score them."""
    key, category = annotation["id"], annotation["category_id"]
    if category not in listed:
        what = f"annotation {key} has category {category} ({NAMES[CLASS_INDEX[category]]})"
        raise UserError(f"{file}: {what}, which 'categories' does not list: list it there")


def _add_annotation(split: Split, image: dict[str, Any], annotation: dict[str, Any]) -> None:
    """Counts one annotation and keeps its box, clipped to the image."""
    image_id, width, height = image["id"], image["width"], image["height"]
    split.n_annotations[image_id] += 1
    if annotation["iscrowd"]:
        split.n_crowd[image_id] += 1
    fault = _box_fault(annotation["bbox"], annotation["area"], width, height)
    if fault:
        split.problems.setdefault(image_id, f"annotation {annotation['id']}: {fault}")
        return
    if annotation["iscrowd"]:
        return
    box = _clip(annotation["bbox"], width, height)
    if box is None:
        split.n_degenerate[image_id] += 1
    else:
        split.boxes[image_id].append([annotation["category_id"], *box])


def _box_fault(bbox: Any, area: Any, width: int, height: int) -> str:
    """What is wrong with an annotation's box x,y,w,h in px or its area in px^2; '' if nothing is."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"bbox {_shown(bbox)} is not four finite numbers"
    if not _is_number(area) or area < 0:
        return f"area {_shown(area)} is not a finite number from 0 on"
    x, y, w, h = bbox
    if w < 0 or h < 0:
        return f"bbox {_shown(bbox)} has a negative size"
    tolerance = BOX_TOLERANCE_PX
    if min(x, y) < -tolerance or x + w > width + tolerance or y + h > height + tolerance:
        return f"bbox {_shown(bbox)} lies outside its image of {width} x {height}"
    return ""


def _is_number(value: Any) -> bool:
    """Whether the value is a number of at most 2^53; Python's JSON reader accepts NaN and Infinity, this does not."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_ID


def _clip(bbox: list[float], width: int, height: int) -> list[float] | None:
    """The part of a box x,y,w,h (px) inside its image; None if that part has no area, or next to none."""
    x, y, w, h = map(float, bbox)
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, width), min(y + h, height)
    if right - left < LEAST_SHARE * width or bottom - top < LEAST_SHARE * height:
        return None
    return [left, top, right - left, bottom - top]
