"""The part of the table of bad inputs where an annotation file as a whole is refused; see bad_input_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.data_fixtures import annotation_file, edit, write_tree

NOT_COCO = "give an instances file in COCO's format (docs/own-detector.md)"
TRAIN_JSON = "COCO/annotations/instances_train2017.json"
VAL_JSON = "COCO/annotations/instances_val2017.json"


@dataclass(frozen=True)
class Case:
    """One way to spoil the folder of data_fixtures, the line expected, and settings that go with it."""

    name: str
    spoil: Callable[[Path], object]
    line: str
    sets: tuple[str, ...] = ()


def text(content: str) -> Callable[[Path], object]:
    return lambda coco_dir: annotation_file(coco_dir).write_text(content)


def tree(content: Any) -> Callable[[Path], object]:
    return lambda coco_dir: write_tree(coco_dir, "train2017", content)


def first(kind: str, **changes: Any) -> Callable[[Path], object]:
    """Changes keys of the first image, annotation or category of train2017."""
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind][0].update(changes))


def without(kind: str, key: str) -> Callable[[Path], object]:
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind][0].pop(key))


def twice(kind: str, **changes: Any) -> Callable[[Path], object]:
    """Lists the first entry once more, with other values for some keys."""
    return lambda coco_dir: edit(coco_dir, lambda found: found[kind].append(found[kind][0] | changes))


JSON = [
    Case(
        "annotation file empty", text(""),
        f"{TRAIN_JSON} is not readable JSON (Expecting value: line 1 column 1 (char 0)): "
        "unpack or export the annotations again",
    ),
    Case(
        "annotation file cut off", text('{"images": [{"id": 1'),
        f"{TRAIN_JSON} is not readable JSON (Expecting ',' delimiter: line 1 column 21 (char 20)): "
        "unpack or export the annotations again",
    ),
    Case(
        "annotation file is not UTF-8", lambda coco: annotation_file(coco).write_bytes(b'{"images": "\xff"}'),
        f"{TRAIN_JSON} is not readable JSON ('utf-8' codec can't decode byte 0xff in position 12: invalid start byte): "
        "unpack or export the annotations again",
    ),
    Case("JSON of another kind", tree([1, 2]), f"{TRAIN_JSON} has no list 'images': {NOT_COCO}"),
    Case(
        "captions instead of instances", tree({"images": [{}], "annotations": []}),
        f"{TRAIN_JSON} has no list 'categories': {NOT_COCO}",
    ),
    Case(
        "annotations are no list", tree({"images": [{}], "annotations": {}, "categories": []}),
        f"{TRAIN_JSON} has no list 'annotations': {NOT_COCO}",
    ),
    Case(
        "no images listed", tree({"images": [], "annotations": [], "categories": []}),
        f"{TRAIN_JSON} lists no images: {NOT_COCO}",
    ),
]  # fmt: skip

CATEGORIES = [
    Case(
        "category under another id", first("categories", id=12),
        f"{TRAIN_JSON}: annotation 1 has category 1, which 'categories' does not list: list it there",
    ),
    Case(
        "category id is text", first("categories", id="1"),
        f"{TRAIN_JSON}: category id '1' is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "category id is no whole number", first("categories", id=1.5),
        f"{TRAIN_JSON}: category id 1.5 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "category id listed twice", twice("categories", name="robot"),
        f"{TRAIN_JSON}: category id 1 is listed twice: mend the categories",
    ),
    Case(
        "category with another name in val", first("categories", name="pedestrian"),
        f"{TRAIN_JSON} and {VAL_JSON} list different categories (only annotations/instances_train2017.json has "
        "'pedestrian'; only annotations/instances_val2017.json has 'person'): list the same in both",
    ),
    Case(
        "category that only val lists", lambda coco: edit(
            coco, lambda found: found["categories"].append({"id": 91, "name": "hat"}), "val2017"
        ),
        f"{TRAIN_JSON} and {VAL_JSON} list different categories (only annotations/instances_val2017.json has 'hat'): "
        "list the same in both",
    ),
    Case(
        "two categories of one name", first("categories", name="car"),
        f"{TRAIN_JSON}: categories 1 and 3 are both 'car': rename one",
    ),
    Case(
        "category without a name", without("categories", "name"),
        f"{TRAIN_JSON}: category 1 is named None: give it 1 to 200 letters",
    ),
    Case(
        "annotation of an unknown category", first("annotations", category_id=12),
        f"{TRAIN_JSON}: annotation 1 has category 12, which 'categories' does not list: list it there",
    ),
    Case(
        "annotation whose category is no whole number", first("annotations", category_id=1.5),
        f"{TRAIN_JSON}: annotation 1 has category 1.5, which 'categories' does not list: list it there",
    ),
    Case(
        "annotation of a category that is not listed", lambda coco: edit(
            coco, lambda found: found.update(categories=found["categories"][:3])
        ),
        f"{TRAIN_JSON}: annotation 2 has category 90, which 'categories' does not list: list it there",
    ),
    Case(
        "no category is listed", lambda coco: edit(coco, lambda found: found.update(categories=[])),
        f"{TRAIN_JSON}: annotation 1 has category 1, which 'categories' does not list: list it there",
    ),
    Case(
        "neither categories nor annotations", lambda coco: edit(
            coco, lambda found: found.update(categories=[], annotations=[])
        ),
        f"{TRAIN_JSON} lists no categories: {NOT_COCO}",
    ),
]  # fmt: skip

IDS = [
    Case(
        "image id listed twice", twice("images", file_name="x.jpg"),
        f"{TRAIN_JSON}: image id 1 or file name x.jpg is listed twice: mend the annotations",
    ),
    Case(
        "file name listed twice", lambda coco: edit(coco, lambda found: [
            found["images"][0].update(file_name="same.jpg"), found["images"][1].update(file_name="same.jpg")
        ]),
        f"{TRAIN_JSON}: image id 2 or file name same.jpg is listed twice: mend the annotations",
    ),
    Case(
        "file names that differ in their suffix", lambda coco: edit(coco, lambda found: [
            found["images"][0].update(file_name="same.jpg"), found["images"][1].update(file_name="same.png")
        ]),
        f"{TRAIN_JSON}: same.jpg and same.png differ in their suffix alone and would share a label file: rename one of "
        "them, here and in the folder",
    ),
    Case(
        "image id too large for a float", first("images", id=2**53 + 1),
        f"{TRAIN_JSON}: image id 9007199254740993 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is a float", first("images", id=1.5),
        f"{TRAIN_JSON}: image id 1.5 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is true", first("images", id=True),
        f"{TRAIN_JSON}: image id True is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is text", first("images", id="1"),
        f"{TRAIN_JSON}: image id '1' is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "image id is negative", first("images", id=-1),
        f"{TRAIN_JSON}: image id -1 is not a whole number from 0 to 2^53: {NOT_COCO}",
    ),
    Case(
        "annotation of an unknown image", first("annotations", image_id=77),
        f"{TRAIN_JSON}: 1 annotations are of images that it does not list (first: annotation 1, image id 77): list "
        "them, or go on without these annotations with --set data.skip_broken=true",
    ),
    Case(
        "annotation id given twice", twice("annotations"),
        f"{TRAIN_JSON}: annotation id 1 is given twice: number the annotations from 1",
    ),
    Case(
        "annotation id is no whole number", first("annotations", id=0.5),
        f"{TRAIN_JSON}: annotation id 0.5 is neither a whole number nor a text: number them from 1",
    ),
    Case(
        "annotation without a box", without("annotations", "bbox"),
        f"{TRAIN_JSON}: annotation 0 lacks one of id, image_id, category_id, bbox: {NOT_COCO}",
    ),
    Case(
        "iscrowd is neither 0 nor 1", first("annotations", iscrowd="no"),
        f"{TRAIN_JSON}: annotation 1 has iscrowd 'no', not 0 or 1: {NOT_COCO}",
    ),
    Case(
        "image entry without a size", without("images", "width"),
        f"{TRAIN_JSON}: an image entry lacks id, file_name, width or height: "
        "{'id': 1, 'file_name': '000000000001.jpg', 'height': 30}",
    ),
    Case(
        "image of no width", first("images", width=0),
        f"{TRAIN_JSON}: image 000000000001.jpg has size 0 x 30: mend the annotations",
    ),
    Case(
        "line break in a file name", first("images", file_name="a\nb.jpg"),
        f"{TRAIN_JSON}: image id 1 has file name 'a\\nb.jpg': {NOT_COCO}",
    ),
]  # fmt: skip
