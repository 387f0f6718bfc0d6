"""A dataset in COCO's format: where the files of a split lie, its title in reports, and `Dataset`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.coco.categories import NAMES
from app.core.config import UserError
from app.core.files import sha256
from app.core.shapes import PathText, Shape

SPLITS = {"train": "train2017", "val": "val2017"}  # role in a run -> folder of the images, as COCO has them
ANNOTATIONS = "annotations"
LAYOUT = f"{SPLITS['train']}/, {SPLITS['val']}/ and {ANNOTATIONS}/"
OFFICIAL_SIZES = {"train2017": 118_287, "val2017": 5_000}  # images that COCO 2017 lists
OFFICIAL_ANNOTATIONS = {"train2017": 860_001, "val2017": 36_781}  # of these images, with crowds

COCO_2017 = "COCO 2017"
OTHER_COCO = f"a COCO-format dataset, not {COCO_2017}"
BUILTIN_TITLE = "drawn shapes (not COCO)"
DRAWN_TITLE = "drawn images (not COCO)"
DRAWN = "drawn"  # first word of info.description in an annotation file that this program has drawn images for
PLACE_SHAPE: Shape = {"images?": PathText, "annotations?": PathText, "part?": str | None}


@dataclass(frozen=True)
class Source:
    """Where the images and annotations of a split lie.

    `part` is 'train' or 'val' where the annotation file lists the images of both, see app.coco.entries.
    """

    name: str
    images_dir: Path
    annotation_file: Path
    part: str | None = None

    def place(self, coco_dir: Path) -> dict[str, Any]:
        """JSON of the source: paths relative to the dataset's folder where they lie in it."""
        return {
            "images": _relative(self.images_dir, coco_dir),
            "annotations": _relative(self.annotation_file, coco_dir),
            "part": self.part,
        }


Sources = Mapping[str, Source]  # by 'train' and 'val'


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def official(coco_dir: Path, split: str) -> Source:
    """The split where COCO 2017 has it."""
    return Source(split, coco_dir / split, annotation_path(coco_dir, split))


def source_at(coco_dir: Path, name: str, facts: Mapping[str, Any]) -> Source:
    """The split of a JSON that has the entries of `Source.place`; one of an earlier version lies where COCO has it."""
    if "images" not in facts:
        return official(coco_dir, name)
    return Source(name, coco_dir / facts["images"], coco_dir / facts["annotations"], facts["part"])


@dataclass(frozen=True)
class Dataset:
    """Images and annotations of one split; `image_ids` None means all images that the annotation file lists.

    `at` says where its files lie; None: where COCO has them. `images_sha256` is the `hash_contents` that its images
    must have; None: it is not known.
    """

    coco_dir: Path
    split: str
    image_ids: list[int] | None
    title: str
    at: Source | None = None
    images_sha256: str | None = None

    @property
    def source(self) -> Source:
        return self.at or official(self.coco_dir, self.split)

    @property
    def images_dir(self) -> Path:
        return self.source.images_dir

    @property
    def annotation_file(self) -> Path:
        return self.source.annotation_file


def check_unchanged(dataset: Dataset, annotation_sha256: str) -> Dataset:
    """The dataset; raises a UserError if its annotation file is missing or has another hash."""
    file = dataset.annotation_file
    if not file.is_file() or sha256(file) != annotation_sha256:
        raise UserError(
            f"{file} is missing or has changed: run 'make data ARGS=--force'; "
            "if it is only not to be seen from here, as in a container, give the COCO_DIR=path that 'make data' had"
        )
    return dataset


def annotation_path(coco_dir: Path, split: str) -> Path:
    return coco_dir / ANNOTATIONS / f"instances_{split}.json"


def coco_title(listed: dict[str, tuple[int, int]]) -> str:
    """COCO_2017 if every split (train2017, val2017) lists as many images and annotations as the official one.

    Else OTHER_COCO: COCO's images under other labels are another dataset, whose scores compare with none of COCO's.
    `listed` has both counts by the name of the split.
    """
    for split, counts in listed.items():
        if counts != (OFFICIAL_SIZES.get(split), OFFICIAL_ANNOTATIONS.get(split)):
            return OTHER_COCO
    return COCO_2017


def title_of(names: list[str], listed: dict[str, tuple[int, int]], is_official: bool) -> str:
    """The title of a dataset by its classes, and by what its splits list (see coco_title); `is_official`: as COCO's."""
    if names != NAMES:
        return f"own dataset, {len(names):,} class{'es' if len(names) > 1 else ''}"
    return coco_title(listed) if is_official else OTHER_COCO


def mended_in(split: Mapping[str, Any]) -> dict[str, int]:
    """What a split's annotations had that was mended or left out, with how many, for a message.

    `split` is that of provenance.json; one of an earlier version says nothing of it.
    """
    counts = {
        "boxes clipped at the border": split.get("n_clipped", 0),
        "boxes dropped, less than a pixel inside": split.get("n_dropped", 0),
        "annotations of unlisted images left out": split.get("n_unlisted", 0),
        **split.get("notes", {}),
    }
    return {what: n for what, n in counts.items() if n}


def hash_ids(image_ids: Iterable[int]) -> str:
    """SHA-256 over the ids in ascending order, one a line."""
    return _hash_lines(map(str, sorted(image_ids)))


def hash_contents(contents: Mapping[int, str]) -> str:
    """SHA-256 over 'id content' of every image in the order of the ids, one a line: it stays where files are moved.

    `contents` has app.coco.images.content_hash by image id.
    """
    return _hash_lines(f"{image_id} {contents[image_id]}" for image_id in sorted(contents))


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
