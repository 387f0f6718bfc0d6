"""File names as tools write them, and annotation files that list the images of train and val together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from app.coco.entries import name_fault

TRAIN_NAMES = ("train2017", "train", "Train", "training", "Training")
VAL_NAMES = ("val2017", "val", "valid", "Val", "Valid", "validation", "Validation", "test", "Test")
VAL_EVERY = 5  # one image in so many is val, where nothing says which are
N_TRIED = 20  # images whose files are looked for, to find out what stands before the names

Images = Iterable[dict[str, Any]]


def mend_names(images: list[dict[str, Any]], images_dir: Path | None) -> int:
    """Makes the file names paths below the image folder, in place: / for \\, and without folders that lead to it.

    `images_dir` None: the folder is not looked into. A file whose name holds a backslash keeps it.

    Returns:
        how many names have changed.
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


def _prefix(images: Images, images_dir: Path) -> tuple[str, ...]:
    """The folders that stand before a name and are not in the image folder, as the first image shows that is found."""
    for image in islice(images, N_TRIED):
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
    return {image["id"] for image in images if is_val(image["file_name"]) == (part == "val")}


def is_val(file_name: str) -> bool:
    """Whether an image is val by the hash of its name."""
    return int(hashlib.sha256(file_name.encode()).hexdigest(), 16) % VAL_EVERY == 0
