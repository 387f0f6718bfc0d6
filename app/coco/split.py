"""A checked annotation file; what train and val have to agree on, and what in it is hardly meant."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.coco.categories import CATEGORIES, Categories, listed_names, without_placeholder
from app.coco.entries import is_named_by_its_id
from app.core.config import UserError

Image = dict[str, Any]  # an entry of `images`
Boxes = list[list[float]]  # of one image: category id, x, y, w, h in px
# A few doubtful boxes stand in good datasets too; a mistake in the making of a file hits many.
LEAST_SHARE = 0.01
FEW = 3  # boxes without area: COCO has some, and they are a large share of a set of ten images
MOST_CROWDS = 0.5
# What many boxes may have in common; {} is the first image that has one.
IN_SHARES = "have no number above 1 (first: {}): COCO's are x, y, w, h in px, not shares of the image; multiply them"
OVER_BORDER = (
    "reach over the border of their image (first: {}) and were clipped to it: check that they are x, y, width, height "
    "in px of this size"
)
NO_AREA = "have no area (first: {}): they are not learnt, and each counts as an object not found; delete them"
REPEATED = (
    "repeat another of their image and class exactly (first: {}), and only one of two can be found: delete the copies"
)


@dataclass(frozen=True)
class Split:
    """A checked annotation file. `images` are its image entries in the order of their ids.

    `boxes`, the counts and `problems` go by image id: `boxes` are rows [category_id, x, y, w, h] in px without crowds,
    `n_degenerate` counts boxes without area, `n_clipped` and `n_dropped` those that reached over the border, `problems`
    says why an image cannot be used. Of the whole file: `is_drawn` says that the draw stage made the images, `used` are
    the category ids of its annotations, `notes` counts what was written otherwise than in COCO, `unlisted` names
    annotations of images that it lacks.
    """

    file: Path
    images: list[Image]
    categories: Categories
    boxes: dict[int, Boxes]
    is_drawn: bool
    n_annotations: Counter[int] = field(default_factory=Counter)
    n_crowd: Counter[int] = field(default_factory=Counter)
    n_degenerate: Counter[int] = field(default_factory=Counter)
    n_clipped: Counter[int] = field(default_factory=Counter)
    n_dropped: Counter[int] = field(default_factory=Counter)
    problems: dict[int, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)
    unlisted: list[str] = field(default_factory=list)

    @property
    def is_official(self) -> bool:
        """Whether everything but the number of images is as in COCO 2017: categories, ids, and nothing to mend."""
        is_as_written = not (self.notes or self.unlisted or self.n_clipped or self.n_dropped)
        return is_as_written and self.categories == CATEGORIES and all(map(is_named_by_its_id, self.images))


def agreed_names(train: Split, val: Split) -> list[str]:
    """The names of the classes, in the order of the ids in `train`; raises a UserError if `val` has others."""
    names, others = _class_names(train, val), _class_names(val, train)
    differences = []
    for split, mine, theirs in ((train, names, others), (val, others, names)):
        if only := [name for name in mine if name not in theirs]:
            differences.append(f"only {split.file.parent.name}/{split.file.name} has {listed_names(only)}")
    if differences:
        raise UserError(
            f"{train.file} and {val.file} list different categories ({'; '.join(differences)}): list the same in both"
        )
    return names


def _class_names(split: Split, other: Split) -> list[str]:
    """The names of a split's categories; its placeholder is one only if an annotation is of it, here or in `other`."""
    listed = [category["name"] for category in split.categories]
    names = [category["name"] for category in without_placeholder(split.categories, split.used)]
    used_there = {category["name"] for category in other.categories if category["id"] in other.used}
    if len(names) < len(listed) and listed[0] not in names and listed[0] in used_there:
        return listed
    return names


def unlisted_line(file: Path, n: int, first: str) -> str:
    """The message about annotations of images that the file does not list."""
    return (
        f"{file}: {n:,} annotations are of images that it does not list (first: {first}): list them, or go on without "
        "these annotations with --set data.skip_broken=true"
    )


def doubts(split: Split) -> list[str]:
    """A line for each mistake that many annotations share, with their number and the first; empty for a sound file."""
    n_annotations, n_crowds = split.n_annotations.total(), split.n_crowd.total()
    n_boxes = sum(map(len, split.boxes.values()))
    lines = []
    if n_crowds > MOST_CROWDS * n_annotations:
        lines.append(
            f"{n_crowds:,} of {n_annotations:,} annotations have iscrowd=1 (first: {_first(split, split.n_crowd)}); "
            "crowds are neither learnt nor scored: set iscrowd to 0 where an annotation is one object"
        )
    if n_annotations == 0:
        lines.append("it lists no annotations, so there is nothing to learn: check the export")
    in_shares, repeated = Counter[int](), Counter[int]()
    for image in split.images:
        boxes = split.boxes[image["id"]]
        if min(image["width"], image["height"]) > 1:  # else such a box is no corner of it
            in_shares[image["id"]] = sum(max(box[1:]) <= 1 for box in boxes)
        repeated[image["id"]] = len(boxes) - len(set(map(tuple, boxes)))
    degenerate = split.n_degenerate if split.n_degenerate.total() > FEW else Counter[int]()
    mistakes = (
        (IN_SHARES, in_shares, n_boxes),
        (OVER_BORDER, split.n_clipped + split.n_dropped, n_annotations),
        (NO_AREA, degenerate, n_annotations),
        (REPEATED, repeated, n_boxes),
    )
    for sentence, counts, n_all in mistakes:
        if counts.total() > LEAST_SHARE * n_boxes:
            lines.append(f"{counts.total():,} of {n_all:,} boxes {sentence.format(_first(split, counts))}")
    return [f"{split.file}: {line}" for line in lines]


def _first(split: Split, counts: Counter[int]) -> str:
    """File name of the first image that has one."""
    return next(image["file_name"] for image in split.images if counts[image["id"]])
