"""A dataset in COCO's layout: the paths of its files, its title in reports, and `Dataset`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.core.config import UserError
from app.core.files import sha256

SPLITS = {"train": "train2017", "val": "val2017"}  # role in a run -> folder of the images
ANNOTATIONS = "annotations"
LAYOUT = f"{SPLITS['train']}/, {SPLITS['val']}/ and {ANNOTATIONS}/"
OFFICIAL_SIZES = {"train2017": 118_287, "val2017": 5_000}  # images that COCO 2017 lists

COCO_2017 = "COCO 2017"
OTHER_COCO = f"a COCO-format dataset, not {COCO_2017}"
BUILTIN_TITLE = "drawn shapes (not COCO)"


@dataclass(frozen=True)
class Dataset:
    """Images and annotations of one split; `image_ids` None means all images that the annotation file lists."""

    coco_dir: Path
    split: str
    image_ids: list[int] | None
    title: str

    @property
    def images_dir(self) -> Path:
        return self.coco_dir / self.split

    @property
    def annotation_file(self) -> Path:
        return annotation_path(self.coco_dir, self.split)


def open_dataset(
    coco_dir: Path, split: str, image_ids: list[int] | None, title: str, annotation_sha256: str | None = None
) -> Dataset:
    """The split of a COCO folder. With `annotation_sha256` the annotation file must have this hash.

    Raises:
        UserError: the annotation file is missing or has another hash.
    """
    dataset = Dataset(coco_dir, split, image_ids, title)
    file = dataset.annotation_file
    if annotation_sha256 is not None and (not file.is_file() or sha256(file) != annotation_sha256):
        raise UserError(
            f"{file} is missing or has changed: run 'make data ARGS=--force'; "
            "if it is only not to be seen from here, as in a container, give the COCO_DIR=path that 'make data' had"
        )
    return dataset


def annotation_path(coco_dir: Path, split: str) -> Path:
    return coco_dir / ANNOTATIONS / f"instances_{split}.json"


def coco_title(n_listed: dict[str, int]) -> str:
    """COCO_2017 if every split (train2017, val2017) lists as many images as the official one, else OTHER_COCO."""
    official = all(OFFICIAL_SIZES.get(split) == n_images for split, n_images in n_listed.items())
    return COCO_2017 if official else OTHER_COCO


def hash_ids(image_ids: Iterable[int]) -> str:
    """SHA-256 over the ids in ascending order, one a line."""
    lines = "\n".join(map(str, sorted(image_ids)))
    return hashlib.sha256(lines.encode()).hexdigest()
