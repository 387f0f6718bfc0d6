"""The reader of annotation files in COCO's instances format, which checks what it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from app.coco.categories import check_categories, check_names, without_placeholder
from app.coco.dataset import DRAWN, LAYOUT, Source
from app.coco.entries import (
    NOT_COCO,
    box_fault,
    check_annotation,
    check_image,
    clip_to_image,
    could_be_corners,
    ids_of_part,
    label_name,
    labelled,
    mend_names,
    name_fault,
    reaches_over,
    shown,
    whole,
)
from app.coco.split import Image, Split
from app.core.config import UserError
from app.core.shapes import value_at

NUMBERED, AREAS, NAMES_CUT = "annotation ids numbered anew", "areas taken from boxes", "file names shortened"
UNUSED = "images of neither train nor val left out"
MIN_CORNERS = 10  # boxes that all look like corners are no chance
Tree = dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """What a file holds: its checked Split, and its tree with the annotations that count, mended."""

    split: Split
    tree: Tree


def read_instances(file: Path, images_dir: Path | None = None, part: str | None = None) -> Split:
    """Reads and checks an annotation file in COCO's instances format.

    Faults of single images (a box of negative size, a path that leaves the folder) are collected in `problems`. Boxes
    without area, of which the official train2017 has some, are counted and left out; so are those of which less than a
    pixel is left inside the image.

    Args:
        images_dir: folder of the images, which is asked where file names start; None: the names are taken as they are.
        part: 'train' or 'val', of a file that lists both.

    Raises:
        UserError: the file as a whole cannot be used.
    """
    return parse_instances(file, images_dir, part).split


def read_source(source: Source) -> Split:
    """`read_instances` of a split."""
    return read_instances(source.annotation_file, source.images_dir, source.part)


def parse_instances(file: Path, images_dir: Path | None = None, part: str | None = None) -> Parsed:
    """As `read_instances`, and the tree for COCOeval: boxes inside their images, areas, and ids from 1."""
    tree = _read_json(file)
    categories = check_categories(file, tree["categories"])
    entries = [check_image(file, image) for image in tree["images"]]
    n_changed = mend_names(entries, images_dir)
    images = _by_id(file, entries)
    others = set(images) - ids_of_part(entries, part) if part else set()
    kept = [image_id for image_id in sorted(images) if image_id not in others]
    if not kept:
        raise UserError(f"{file} lists no images of {part}: give data.{part}_images and data.{part}_annotations")
    listed = {image_id: images[image_id] for image_id in kept}
    is_drawn = str(value_at(tree, "info.description")).startswith(f"{DRAWN} ")
    split = Split(file, list(listed.values()), categories, {image_id: [] for image_id in kept}, is_drawn)
    if n_changed:
        split.notes[NAMES_CUT] = n_changed
    if part == "val" and (n_unused := len(others - ids_of_part(entries, "train"))):
        split.notes[UNUSED] = n_unused
    for image in split.images:
        if problem := name_fault(image["file_name"]):
            split.problems[image["id"]] = problem
    tree["annotations"] = _Annotations(split, listed, others).read(tree["annotations"])
    tree["images"] = split.images
    tree["categories"] = without_placeholder(categories, split.used)
    if not categories:
        raise UserError(f"{file} lists no categories: {NOT_COCO}")
    check_names(file, tree["categories"])
    return Parsed(split, tree)


def _read_json(file: Path) -> Tree:
    try:
        if file.exists() and not file.is_file():  # a pipe is waited for without an end
            raise UserError(f"{file} is no file: COCO_DIR must hold {LAYOUT}")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: COCO_DIR must hold {LAYOUT}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is not readable JSON ({error}): unpack or export the annotations again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise UserError(f"{file} has no list '{key}': {NOT_COCO}")
    if not tree["images"]:
        raise UserError(f"{file} lists no images: {NOT_COCO}")
    return tree


def _by_id(file: Path, entries: list[Image]) -> dict[int, Image]:
    """The entries by image id; raises a UserError if two of them have the same id or would share a label file."""
    images: dict[int, Image] = {}
    of_label: dict[PurePosixPath, str] = {}
    for image in entries:
        label, name = label_name(image["file_name"]), image["file_name"]
        if image["id"] in images or of_label.get(label) == name:
            raise UserError(f"{file}: image id {image['id']} or file name {name} is listed twice: mend the annotations")
        if label in of_label:
            raise UserError(
                f"{file}: {of_label[label]} and {name} differ in their suffix alone and would share a label file: "
                "rename one of them, here and in the folder"
            )
        images[image["id"]] = image
        of_label[label] = name
    for image in images.values():
        folders = set(PurePosixPath(image["file_name"]).parents)
        if shared := of_label.keys() & folders:
            raise UserError(f"{file}: the folder {shared.pop()}/ has the name of an image's label file: rename it")
    return images


class _Annotations:
    """Reads annotations into the Split; `images` are its entries by id, `others` ids of images of another part."""

    def __init__(self, split: Split, images: dict[int, Image], others: set[int]) -> None:
        self.split, self.images, self.others = split, images, others
        self.listed = {category["id"] for category in split.categories}
        self.keys: set[int | str] = set()
        self.n_over = self.n_corners = self.n_boxes = 0
        self.has_areas = True

    def read(self, entries: list[Any]) -> list[dict[str, Any]]:
        """The annotations that count, mended; raises a UserError if one of them, or all together, cannot be used."""
        file = self.split.file
        # A tool that knows no areas may write 0 for all; a single one is COCO's own.
        self.has_areas = any(entry.get("area") for entry in entries if isinstance(entry, dict))
        kept = []
        for number, entry in enumerate(entries):
            annotation = check_annotation(file, entry, number)
            key = annotation["id"]
            image = self._image_of(annotation)
            self._check_category(annotation)
            if key in self.keys:
                raise UserError(f"{file}: annotation id {shown(key)} is given twice: number the annotations from 1")
            self.keys.add(key)
            if image is not None and self._add(image, annotation):
                kept.append(annotation)
        self._refuse_corners()
        # COCOeval (pycocotools 2.0.11) marks a match by the annotation's id and reads 0 as none.
        if not all(isinstance(key, int) and whole(key) for key in self.keys):
            self.split.notes[NUMBERED] = len(self.keys)
            for number, annotation in enumerate(kept, start=1):
                annotation["id"] = number
        return kept

    def _image_of(self, annotation: dict[str, Any]) -> Image | None:
        """The entry of its image; None if it counts in no image of this split."""
        image_id = whole(annotation["image_id"])
        if image_id in self.others:
            return None
        if image_id is None or image_id not in self.images:
            self.split.unlisted.append(
                f"annotation {shown(annotation['id'])}, image id {shown(annotation['image_id'])}"
            )
            return None
        annotation["image_id"] = image_id
        return self.images[image_id]

    def _check_category(self, annotation: dict[str, Any]) -> None:
        """Refuses a category that is not listed: its boxes would be learnt, and COCOeval would never score them."""
        given = annotation["category_id"]
        category_id = whole(given)
        if category_id is None or category_id not in self.listed:
            what = f"annotation {shown(annotation['id'])} has category {shown(given)}"
            raise UserError(f"{self.split.file}: {what}, which 'categories' does not list: list it there")
        annotation["category_id"] = category_id

    def _add(self, image: Image, annotation: dict[str, Any]) -> bool:
        """Counts one annotation and keeps its box, clipped to the image; False if nothing of it lies in the image."""
        split, image_id = self.split, image["id"]
        split.n_annotations[image_id] += 1
        split.used.add(annotation["category_id"])
        if annotation["iscrowd"]:
            split.n_crowd[image_id] += 1
        if fault := box_fault(annotation["bbox"], annotation.get("area")):
            split.problems.setdefault(image_id, f"annotation {shown(annotation['id'])}: {fault}")
            return True
        if annotation.get("area") is None or not self.has_areas:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            split.notes[AREAS] += 1
        if not self._mend_border(image, annotation):
            return False
        if annotation["iscrowd"]:
            return True
        if box := labelled(annotation["bbox"], image):
            split.boxes[image_id].append([annotation["category_id"], *box])
        else:
            split.n_degenerate[image_id] += 1
        return True

    def _mend_border(self, image: Image, annotation: dict[str, Any]) -> bool:
        """Clips a box that reaches over the border; False if less than a pixel of it is left."""
        bbox = annotation["bbox"]
        self.n_boxes += 1
        self.n_corners += could_be_corners(bbox, image)
        if not reaches_over(bbox, image):
            return True
        self.n_over += 1
        is_kept = clip_to_image(annotation, image)
        counts = self.split.n_clipped if is_kept else self.split.n_dropped
        counts[image["id"]] += 1
        return is_kept

    def _refuse_corners(self) -> None:
        """Refuses boxes written as two corners: read as COCO's, the farther ones reach over the border."""
        if self.n_over and self.n_corners == self.n_boxes >= MIN_CORNERS:
            raise UserError(
                f"{self.split.file}: {self.n_over:,} of {self.n_boxes:,} boxes reach over the border of their images, "
                "and all could be x1, y1, x2, y2: COCO's are x, y, width, height in px, write them so"
            )
