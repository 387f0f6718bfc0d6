"""Finds images and annotations in a dataset's folder, in the layouts of COCO, Roboflow, CVAT and Label Studio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from app.coco.dataset import ANNOTATIONS, COCO_2017, LAYOUT, SPLITS, Source, Sources, annotation_path, official
from app.coco.entries import TRAIN_NAMES, VAL_NAMES
from app.coco.images import dead_link
from app.core.config import Data, UserError
from app.core.mounts import only_seen

FOLDER_NAMES = {"train": TRAIN_NAMES, "val": VAL_NAMES}  # folders of a split, in the order in which they are looked for
CVAT = "instances_default.json"
# {} is the name of the split. The first annotation file that is there is taken, and the first folder of images.
ANNOTATION_FILES = (
    "annotations/instances_{}.json", "{}/_annotations.coco.json", "{}/annotations/" + CVAT, "{}/" + CVAT,
    "annotations/{}/" + CVAT, "{}/annotations/instances_{}.json", "{}/result.json", "annotations/{}.json",
)  # fmt: skip
IMAGE_FOLDERS = ("{}/images/default", "{}/images/{}", "{}/images", "{}", "images/{}", "images/default", "images")
# One file for all images.
SHARED_FILES = (f"annotations/{CVAT}", CVAT, "_annotations.coco.json", "result.json", "annotations/instances.json")
SHARED_FOLDERS = ("images/default", "images", ".")
ALL = "all"  # the split of an evaluation: every image of the one file
KNOWN = (
    f"{LAYOUT} as {COCO_2017} does, train/ and valid/ with _annotations.coco.json (Roboflow), or train/ and val/ with "
    f"annotations/{CVAT} (CVAT)"
)
SAY = "say where they are with data.train_images, data.train_annotations, data.val_images and data.val_annotations"
ANOTHER_LINK = "make the link anew, or give another COCO_DIR=path"


def find_sources(coco_dir: Path, data: Data) -> Sources:
    """Where train and val lie: as the configuration says, or in a layout that is known.

    Raises:
        UserError: there is no such folder or layout, or a part of it is missing.
    """
    said = {role: source for role in SPLITS if (source := said_source(coco_dir, data, role))}
    if len(said) < len(SPLITS):
        said = {**_found(coco_dir), **said}
    for source in said.values():
        for path in (source.images_dir, source.annotation_file):
            if reason := dead_link(path):
                raise UserError(f"{path} {reason}: {ANOTHER_LINK}")
        if not source.images_dir.is_dir():
            raise UserError(f"{source.images_dir} is no folder: it must hold the images of {source.name}")
        if not source.annotation_file.is_file():
            raise UserError(f"{source.annotation_file} is missing: it must list the images of {source.name}")
    train, val = (said[role] for role in SPLITS)
    if (train.annotation_file, train.part) == (val.annotation_file, val.part):
        raise UserError(
            f"train and val have the same annotations, {val.annotation_file}: AP would be that of images trained on; "
            "name a file of other images with data.val_images and data.val_annotations"
        )
    return {role: said[role] for role in SPLITS}


def said_source(coco_dir: Path, data: Data, role: str) -> Source | None:
    """The split as data.<role>_images and data.<role>_annotations name it; None if neither does.

    Raises a UserError if only one of the two is given.
    """
    images, annotations = data.train_images, data.train_annotations
    if role == "val":
        images, annotations = data.val_images, data.val_annotations
    if images is None and annotations is None:
        return None
    if images is None or annotations is None:
        given, other = ("annotations", "images") if images is None else ("images", "annotations")
        raise UserError(f"data.{role}_{given} is given without data.{role}_{other}: give both")
    return Source(role, (coco_dir / images).resolve(), (coco_dir / annotations).resolve())


def find_split(coco_dir: Path, split: str | None, data: Data | None = None) -> Source:
    """The split of an evaluation without a run: that of the name, else val. Raises a UserError if it is not there."""
    said = said_source(coco_dir, data, "val") if data and split is None else None
    source = said or _named(coco_dir, split) or _shared(coco_dir, None if split == ALL else "val")
    if source is None and split is None:
        raise UserError(f"{coco_dir} has no val split in a known layout: it must hold {KNOWN}")
    if source is None or not source.images_dir.is_dir():
        folder = source.images_dir if source else coco_dir / str(split)
        wanted = f"COCO_DIR=path or --coco-dir must hold {split or SPLITS['val']}/ and annotations/"
        raise UserError(f"{folder} is no folder: {wanted}{only_seen()}")
    return source


def _named(coco_dir: Path, split: str | None) -> Source | None:
    for name in [split] if split else FOLDER_NAMES["val"]:
        if source := _matching(coco_dir, name):
            return source
        if (coco_dir / name).is_dir() and (split or name == SPLITS["val"]):
            return official(coco_dir, name)  # its annotations are missing, which the reader says
    return None


def _found(coco_dir: Path) -> dict[str, Source]:
    if not coco_dir.is_dir():
        raise UserError(f"no COCO folder at {coco_dir}: give COCO_DIR=path, or run 'make download-coco'")
    folders = [coco_dir / name for name in SPLITS.values()]
    files = [annotation_path(coco_dir, name) for name in SPLITS.values()]
    if any(path.exists() or path.is_symlink() for path in (*folders, *files)):  # a missing part is said by its name
        return _coco_sources(coco_dir)
    found: dict[str, Source] = {}
    for role, names in FOLDER_NAMES.items():
        matches = (source for name in names if (source := _matching(coco_dir, name)))
        if source := next(matches, None):
            found[role] = source
    if len(found) == 1:
        (role,), (other,) = found, set(SPLITS) - set(found)
        raise UserError(
            f"{coco_dir} has {role} images ({describe_source(found[role], coco_dir)}) and no {other} images: export "
            f"them too, or {SAY}"
        )
    shared = {role: source for role in SPLITS if not found and (source := _shared(coco_dir, role))}
    if not found and not shared:
        raise UserError(
            f"{coco_dir} holds no dataset in a known layout: it must hold {KNOWN}; {SAY}, give another COCO_DIR=path, "
            "or run 'make download-coco'"
        )
    return found or shared


def _coco_sources(coco_dir: Path) -> dict[str, Source]:
    """The two splits as COCO has them, in train2017/ or images/train2017/; raises a UserError if a part is missing."""
    images = {}
    for role, name in SPLITS.items():
        below = coco_dir / "images" / name
        images[role] = below if below.is_dir() and not (coco_dir / name).exists() else coco_dir / name
    for folder in (*images.values(), coco_dir / ANNOTATIONS):
        if reason := dead_link(folder):
            raise UserError(f"{folder} {reason}: {ANOTHER_LINK}")
        if not folder.is_dir():
            raise UserError(
                f"{coco_dir} has no {folder.name}/: it must hold {LAYOUT} as {COCO_2017} does; "
                "give COCO_DIR=path, or run 'make download-coco'"
            )
    for name in SPLITS.values():
        file = annotation_path(coco_dir, name)
        if not file.is_file() and not dead_link(file):
            raise UserError(f"{file} is missing: unpack annotations_trainval2017.zip into {coco_dir}")
    return {role: Source(name, images[role], annotation_path(coco_dir, name)) for role, name in SPLITS.items()}


def _matching(coco_dir: Path, name: str) -> Source | None:
    """The split of this name in the first layout whose annotation file and images are there."""
    file = next(_existing(coco_dir, ANNOTATION_FILES, name), None)
    folder = next((path for path in _existing(coco_dir, IMAGE_FOLDERS, name) if path.is_dir()), None)
    return Source(name, folder, file) if file and folder else None


def _existing(coco_dir: Path, patterns: tuple[str, ...], name: str) -> Iterator[Path]:
    for pattern in patterns:
        path = coco_dir / pattern.replace("{}", name)
        if path.exists():
            yield path


def _shared(coco_dir: Path, part: str | None) -> Source | None:
    """A part of the images that one file lists together; None: there is no such file."""
    file = next(_existing(coco_dir, SHARED_FILES, ""), None)
    folder = next((path for path in _existing(coco_dir, SHARED_FOLDERS, "") if path.is_dir()), None)
    return Source(part or ALL, folder, file, part) if file and folder else None


def describe_source(source: Source, coco_dir: Path) -> str:
    """'train/ with train/_annotations.coco.json'."""
    place = source.place(coco_dir)
    folder = "" if place["images"] == "." else f"{place['images']}/ with "
    by = f", its {source.part} part" if source.part else ""
    return f"{folder}{place['annotations']}{by}"
