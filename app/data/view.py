"""The view of a dataset: links to its images, YOLO labels, and an index that says which images can be used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from app.coco.annotations import read_source
from app.coco.dataset import Source, Sources
from app.coco.entries import label_name
from app.coco.images import content_hash, fault
from app.coco.split import Split, agreed_names, doubts
from app.core.config import UserError
from app.core.environment import n_cores
from app.core.files import make_link, new_folder, write_text
from app.core.progress import track

log = logging.getLogger(__name__)
VIEW_VERSION = 7
N_THREADS = min(8, n_cores())
FILES_AT_ONCE = 1000
Entries = list[dict[str, Any]]  # entries of a view's index, one an image
Indices = dict[str, dict[str, Any]]  # by 'train' and 'val'; see read_index
Stamp = list[int] | None


@dataclass(frozen=True)
class Image:
    """One image of a split: its path in the view, its size in px as (height, width), and its labels.

    `labels` is float32 [n,5], a row an object: class index, then cx, cy, w, h as shares of the image's size.
    """

    path: str
    shape_hw: tuple[int, int]
    labels: np.ndarray


def view_dir(cache_dir: Path, sources: Sources, digests: dict[str, str]) -> Path:
    """Folder of the view; its name depends on the place of the images, what their splits are called, by which a view
    names its files, and the content of the annotations.

    `digests` are the SHA-256 of the annotation files, by 'train' and 'val'.
    """
    places = [[source.name, str(source.images_dir), source.part] for source in sources.values()]
    key = json.dumps([VIEW_VERSION, places, digests], sort_keys=True)
    return cache_dir / "views" / hashlib.sha256(key.encode()).hexdigest()[:16]


def make_current(view: Path, sources: Sources, digests: dict[str, str]) -> Indices:
    """Builds the view if it is not whole, else checks again every image whose file has changed since its last check."""
    indices = _whole_indices(view, sources)
    if indices is None:
        build_view(view, sources, digests)
        return read_indices(view, sources)
    for split, source in sources.items():
        _check_changed(view, source, indices[split])
    return indices


def _whole_indices(view: Path, sources: Sources) -> Indices | None:
    """The view's indices; None if it was deleted or spoiled, as can be seen without a look at every label file.

    None too if no file of a split was there when it was checked: then nobody knows where its names start.
    """
    try:
        indices = read_indices(view, sources)
    except (OSError, ValueError):
        return None
    for split, source in sources.items():
        folders = [view / "images" / source.name, view / "labels" / source.name]
        has_files = any(entry["stamp"] for entry in indices[split]["images"])
        if not has_files or not all(map(Path.is_dir, folders)):
            return None
    return indices


def build_view(target_dir: Path, sources: Sources, digests: dict[str, str]) -> None:
    """Checks every image once and writes links, labels and index; an existing view is replaced.

    Damaged images are recorded in the index and raise no error: each run decides whether to go on without them.

    Raises:
        UserError: an annotation file as a whole cannot be used, or train and val have other categories.
    """
    with new_folder(target_dir, replace=True) as root:
        (root / "images").mkdir()
        splits = {}
        for role, source in sources.items():
            log.info("data: reading the annotations of %s, writing its labels", source.name)
            splits[role] = read_source(source)
        names = agreed_names(splits["train"], splits["val"])
        for role, source in sources.items():
            index = _build_split(root, source, splits[role], names)
            _index_path(root, source.name).write_text(
                json.dumps({"annotation_sha256": digests[role], **index}), encoding="utf-8"
            )


def _build_split(root: Path, source: Source, split: Split, names: list[str]) -> dict[str, Any]:
    """Links the images, writes the labels and checks every image; returns the index of the split.

    `names` are the classes of the network in their order.
    """
    make_link(root / "images" / source.name, source.images_dir)
    label_dir = root / "labels" / source.name
    label_dir.mkdir(parents=True)
    listed = Counter(category["name"] for category in split.categories)
    ids = {category["name"]: category["id"] for category in split.categories}
    class_index = {ids[name]: index for index, name in enumerate(names)}
    entries = [_enter(label_dir, split, image, class_index) for image in split.images]
    to_check = [entry for entry in entries if not entry["problem"]]
    _check(to_check, source.images_dir, f"checking {source.name}")
    return {
        "names": names,
        "drawn": split.is_drawn,
        "left_out": list((listed - Counter(names)).elements()),  # Roboflow's supercategory of all others
        "is_official": split.is_official,
        "notes": dict(split.notes),
        "n_unlisted": len(split.unlisted),
        "unlisted": split.unlisted[:1],
        "doubts": doubts(split),
        "images": entries,
    }


def _enter(label_dir: Path, split: Split, image: dict[str, Any], class_index: dict[int, int]) -> dict[str, Any]:
    """Writes the label file of an image whose annotations can be used; returns its entry, without a look at its file.

    `problem` is what is wrong with the annotations; the file is not opened then, as its name may lead out of the
    folder. `fault` is why the image cannot be used, by its annotations or its file.
    """
    image_id, file_name = image["id"], image["file_name"]
    boxes = split.boxes[image_id]
    problem = split.problems.get(image_id)
    if problem is None:
        path = label_dir / label_name(file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yolo_rows(image, boxes, class_index), encoding="utf-8")
    return {
        "id": image_id,
        "file": file_name,
        "height": image["height"],
        "width": image["width"],
        "n_annotations": split.n_annotations[image_id],
        "n_crowd": split.n_crowd[image_id],
        "n_degenerate": split.n_degenerate[image_id],
        "n_clipped": split.n_clipped[image_id],
        "n_dropped": split.n_dropped[image_id],
        "n_boxes": len(boxes),
        "problem": problem,
        "fault": problem,
        "stamp": None,
        "content": None,
    }


def _check(entries: Entries, image_dir: Path, title: str) -> None:
    """Decodes the image of every entry, and enters what is wrong with it, its content's hash and the stamp of the file.

    The stamp is taken first: a file that changes in the meantime has another stamp, and is checked again.
    """

    def look(entry: dict[str, Any]) -> dict[str, Any]:
        path = image_dir / entry["file"]
        stamp = stamp_of(path)
        reason = fault(image_dir, entry["file"], entry["width"], entry["height"]) or None
        return {"stamp": stamp, "fault": reason, "content": None if reason else content_hash(path)}

    pool = ThreadPoolExecutor(N_THREADS)
    try:
        looks = track(pool.map(look, entries), title, len(entries))
        for entry, found in zip(entries, looks, strict=True):
            entry.update(found)
    finally:
        pool.shutdown(cancel_futures=True)  # without it an interrupted check goes on with all queued images


def _check_changed(view: Path, source: Source, index: dict[str, Any]) -> None:
    """Checks the images of a split again whose size or time of change is another than in `index`, and enters them."""
    image_dir, name = source.images_dir, source.name
    entries = [entry for entry in index["images"] if not entry["problem"]]

    def changed_among(start: int) -> Entries:
        part = entries[start : start + FILES_AT_ONCE]
        return [entry for entry in part if entry["stamp"] != stamp_of(f"{image_dir}/{entry['file']}")]

    with ThreadPoolExecutor(N_THREADS) as pool:
        parts = pool.map(changed_among, range(0, len(entries), FILES_AT_ONCE))
        changed = list(chain.from_iterable(parts))
    if not changed:
        return
    log.info("data: %s images of %s have changed since they were checked", f"{len(changed):,}", name)
    _check(changed, image_dir, f"checking {name}")
    write_text(_index_path(view, name), json.dumps(index))


def stamp_of(path: str | Path) -> Stamp:
    """Size in bytes and time of the last change in ns of a file, or of the file that a link leads to; None: no file."""
    try:
        status = os.stat(path)  # noqa: PTH116  of a Path it takes three times as long
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _index_path(view: Path, name: str) -> Path:
    return view / f"{name}.json"


def yolo_rows(image: dict[str, Any], boxes: list[list[float]], class_index: dict[int, int]) -> str:
    """COCO boxes [category_id, x, y, w, h] in px -> lines 'class cx cy w h', centre and size as shares of the image.

    `class_index` says which class of the network a category is.
    """
    width, height = image["width"], image["height"]
    lines = []
    for category_id, x, y, w, h in boxes:
        centre_x = (x + w / 2) / width
        centre_y = (y + h / 2) / height
        index = class_index[int(category_id)]
        lines.append(f"{index} {centre_x:.6f} {centre_y:.6f} {w / width:.6f} {h / height:.6f}\n")
    return "".join(lines)


def read_index(view: Path, name: str) -> dict[str, Any]:
    """The index of a split (train2017, val2017), as `_build_split` makes it; `images` are its Entries of all listed
    images, broken ones too, in the order of their ids."""
    return json.loads(_index_path(view, name).read_text(encoding="utf-8"))


def read_indices(view: Path, sources: Sources) -> Indices:
    return {split: read_index(view, source.name) for split, source in sources.items()}


def chosen(entries: Entries, image_ids: list[int] | None) -> Entries:
    """The entries of the images that a run has chosen, in their order; `image_ids` None means all that can be used."""
    if image_ids is None:
        return entries
    wanted = set(image_ids)
    return [entry for entry in entries if entry["id"] in wanted]


def read_split(provenance: dict[str, Any], split: str) -> list[Image]:
    """The images of a run's 'train' or 'val' with their labels, in the order of their ids; see prepare.prepared."""
    view = Path(provenance["view_dir"])
    name, image_ids = provenance["splits"][split]["name"], provenance["splits"][split]["image_ids"]
    image_dir, label_dir = f"{view}/images/{name}", f"{view}/labels/{name}"
    entries = chosen(read_index(view, name)["images"], image_ids)

    def images_from(start: int) -> list[Image]:
        images = []
        for entry in entries[start : start + FILES_AT_ONCE]:
            labels = _read_labels(f"{label_dir}/{label_name(entry['file'])}")
            images.append(Image(f"{image_dir}/{entry['file']}", (entry["height"], entry["width"]), labels))
        return images

    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(chain.from_iterable(pool.map(images_from, range(0, len(entries), FILES_AT_ONCE))))


def _read_labels(path: str) -> np.ndarray:
    """Lines 'class cx cy w h' -> float32 [n,5]."""
    try:
        with open(path, encoding="utf-8") as file:  # a Path of each file would take longer than reading it
            values = np.array(file.read().split(), dtype=np.float32)
        return values.reshape(-1, 5)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path} is missing or spoiled: run 'make data ARGS=--force'") from error
