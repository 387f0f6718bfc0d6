"""A checked annotation file, and what train and val have to agree on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.coco.categories import CATEGORIES, Categories, listed_names, without_placeholder
from app.coco.entries import is_named_by_its_id
from app.core.config import UserError

Image = dict[str, Any]  # an entry of `images`


@dataclass(frozen=True)
class Split:
    """A checked annotation file. `images` are its image entries in the order of their ids.

    `boxes`, the counts and `problems` are dicts by image id: `boxes` are rows [category_id, x, y, w, h] in px without
    crowds, `n_degenerate` counts boxes without area, `n_clipped` and `n_dropped` those that reached over the border,
    `problems` says why an image cannot be used. Of the whole file: `used` are the category ids of its annotations,
    `notes` counts what was written otherwise than in COCO, `unlisted` names annotations of images that it lacks,
    `is_drawn` says that the draw stage made the images.
    """

    file: Path
    images: list[Image]
    categories: Categories
    boxes: dict[int, list[list[float]]]
    n_annotations: dict[int, int]
    n_crowd: dict[int, int]
    n_degenerate: dict[int, int]
    n_clipped: dict[int, int]
    n_dropped: dict[int, int]
    problems: dict[int, str]
    is_drawn: bool = False
    used: set[int] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)
    unlisted: list[str] = field(default_factory=list)

    @property
    def is_official(self) -> bool:
        """Whether everything but the number of images is as in COCO 2017: categories, ids, and nothing to mend."""
        is_as_written = not (
            self.notes or self.unlisted or any(self.n_clipped.values()) or any(self.n_dropped.values())
        )
        return is_as_written and self.categories == CATEGORIES and all(map(is_named_by_its_id, self.images))


def agreed_names(train: Split, val: Split) -> list[str]:
    """The names of the classes, in the order of the ids in `train`; ids may differ between the two.

    Raises:
        UserError: the two do not list the same names.
    """
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
