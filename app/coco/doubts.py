"""Annotations that can be read and are hardly meant: mistakes that many make, each counted and shown once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.coco.split import Split

# A few such boxes stand in good datasets too; a mistake in the making of a file hits many.
LEAST_SHARE = 0.01
FEW = 3  # boxes without area: COCO has some, and they are a large share of a set of ten images
MOST_CROWDS = 0.5

Boxes = list[list[float]]  # of one image: category id, x, y, w, h in px
Image = dict[str, Any]  # an entry of the annotation file's list of images


def doubts(split: Split) -> list[str]:
    """One line for each kind of mistake, with its count and its first example; empty for a sound file."""
    n_annotations, n_crowds = sum(split.n_annotations.values()), sum(split.n_crowd.values())
    n_boxes = sum(len(boxes) for boxes in split.boxes.values())
    lines = []
    if n_crowds > MOST_CROWDS * n_annotations:
        lines.append(
            f"{n_crowds:,} of {n_annotations:,} annotations have iscrowd=1 (first: {_first(split, split.n_crowd)}); "
            "crowds are neither learnt nor scored: set iscrowd to 0 where an annotation is one object"
        )
    if n_annotations == 0:
        lines.append("it lists no annotations, so there is nothing to learn: check the export")
    in_shares = _counts(split, n_in_shares)
    if _are_many(in_shares, n_boxes):
        lines.append(
            f"{sum(in_shares.values()):,} of {n_boxes:,} boxes have no number above 1 (first: "
            f"{_first(split, in_shares)}): COCO's are x, y, w, h in px, not shares of the image; multiply them"
        )
    over = {image_id: split.n_clipped[image_id] + split.n_dropped[image_id] for image_id in split.boxes}
    if _are_many(over, n_boxes):
        lines.append(
            f"{sum(over.values()):,} of {n_annotations:,} boxes reach over the border of their image (first: "
            f"{_first(split, over)}) and were clipped to it: check that they are x, y, width, height in px of this size"
        )
    if _are_many(split.n_degenerate, n_boxes) and sum(split.n_degenerate.values()) > FEW:
        lines.append(
            f"{sum(split.n_degenerate.values()):,} of {n_annotations:,} boxes have no area (first: "
            f"{_first(split, split.n_degenerate)}): they are not learnt, and each counts as an object not found; "
            "delete them"
        )
    repeated = _counts(split, n_repeated)
    if _are_many(repeated, n_boxes):
        lines.append(
            f"{sum(repeated.values()):,} of {n_boxes:,} boxes repeat another of their image and class exactly (first: "
            f"{_first(split, repeated)}), and only one of two can be found: delete the copies"
        )
    return [f"{split.file}: {line}" for line in lines]


def n_in_shares(image: Image, boxes: Boxes) -> int:
    """Boxes whose numbers are all at most 1, in an image where such a box would be a corner of it."""
    if min(image["width"], image["height"]) == 1:
        return 0
    return sum(max(box[1:]) <= 1 for box in boxes)


def n_repeated(image: Image, boxes: Boxes) -> int:
    """Boxes less distinct boxes."""
    return len(boxes) - len(set(map(tuple, boxes)))


def _counts(split: Split, count: Callable[[Image, Boxes], int]) -> dict[int, int]:
    return {image["id"]: count(image, split.boxes[image["id"]]) for image in split.images}


def _are_many(counts: dict[int, int], n_boxes: int) -> bool:
    return sum(counts.values()) > LEAST_SHARE * n_boxes


def _first(split: Split, counts: dict[int, int]) -> str:
    """File name of the first image that has one."""
    return next(image["file_name"] for image in split.images if counts[image["id"]])
