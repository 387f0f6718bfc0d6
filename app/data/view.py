"""The view of a dataset: links to its images, YOLO labels, and an index that says which images can be used."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.coco.annotations import CLASS_INDEX, Split, read_instances
from app.coco.dataset import SPLITS, annotation_path
from app.coco.images import fault
from app.core.files import new_folder
from app.core.progress import track

VIEW_VERSION = 3
N_THREADS = min(8, os.cpu_count() or 1)
Entries = list[dict[str, Any]]  # entries of a view's index, one an image


@dataclass(frozen=True)
class Image:
    """One image of a split: its path in the view, its size in px as (height, width), and its labels.

    `labels` is float32 [n,5], a row an object: class index, then cx, cy, w, h as shares of the image's size.
    """

    path: str
    shape_hw: tuple[int, int]
    labels: np.ndarray


def view_dir(cache_dir: Path, coco_dir: Path, annotation_sha256: dict[str, str]) -> Path:
    """Folder of the view; its name depends on the place of the dataset and the content of its annotations."""
    key = json.dumps([VIEW_VERSION, str(coco_dir), annotation_sha256], sort_keys=True)
    return cache_dir / "views" / hashlib.sha256(key.encode()).hexdigest()[:16]


def is_current(view: Path, coco_dir: Path) -> bool:
    """Whether the view exists and no image has been repaired since: an image damaged then must still be damaged."""
    if not view.exists():
        return False
    for split, name in SPLITS.items():
        damaged = [entry for entry in read_index(view, split) if entry["damaged"]]
        for entry in damaged:
            if not fault(coco_dir / name, entry["file"], entry["width"], entry["height"]):
                return False
    return True


def build_view(target_dir: Path, coco_dir: Path, annotation_sha256: dict[str, str]) -> None:
    """Checks every image once and writes links, labels and index; an existing view is replaced.

    Damaged images are recorded in the index and raise no error: each run decides whether to go on without them.
    """
    with new_folder(target_dir, replace=True) as root:
        (root / "images").mkdir()
        for name in SPLITS.values():
            _build_split(root, coco_dir, name, annotation_sha256[name])


def _build_split(root: Path, coco_dir: Path, name: str, annotation_sha256: str) -> None:
    split = read_instances(annotation_path(coco_dir, name))
    (root / "images" / name).symlink_to(coco_dir / name)
    label_dir = root / "labels" / name
    label_dir.mkdir(parents=True)
    entries = []
    pool = ThreadPoolExecutor(N_THREADS)
    try:
        file_faults = pool.map(partial(_file_fault, coco_dir / name, split), split.images)
        checked = zip(split.images, file_faults, strict=True)
        for image, file_fault in track(checked, f"checking {name}", len(split.images)):
            entries.append(_enter(label_dir, split, image, file_fault))
    finally:
        pool.shutdown(cancel_futures=True)  # without it an interrupted check goes on with all queued images
    index = {"annotation_sha256": annotation_sha256, "images": entries}
    (root / f"{name}.json").write_text(json.dumps(index), encoding="utf-8")


def _file_fault(image_dir: Path, split: Split, image: dict[str, Any]) -> str:
    """Fault of the image file, or ''.

    Also '' if the image's annotations are at fault: the file is not opened, as its name may lead out of the folder.
    """
    if image["id"] in split.problems:
        return ""
    return fault(image_dir, image["file_name"], image["width"], image["height"])


def _enter(label_dir: Path, split: Split, image: dict[str, Any], file_fault: str) -> dict[str, Any]:
    """Writes the label file of an image if the image can be used; returns the image's entry in the index."""
    image_id, file_name = image["id"], image["file_name"]
    boxes = split.boxes[image_id]
    reason = split.problems.get(image_id) or file_fault or None
    if reason is None:
        path = _label_path(label_dir, file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yolo_rows(image, boxes), encoding="utf-8")
    return {
        "id": image_id,
        "file": file_name,
        "height": image["height"],
        "width": image["width"],
        "n_annotations": split.n_annotations[image_id],
        "n_crowd": split.n_crowd[image_id],
        "n_degenerate": split.n_degenerate[image_id],
        "n_boxes": len(boxes),
        "fault": reason,
        "damaged": bool(file_fault),
    }


def _label_path(label_dir: Path, file_name: str) -> Path:
    return (label_dir / file_name).with_suffix(".txt")


def yolo_rows(image: dict[str, Any], boxes: list[list[float]]) -> str:
    """COCO boxes [category_id, x, y, w, h] in px -> lines 'class cx cy w h', centre and size as shares of the image."""
    width, height = image["width"], image["height"]
    lines = []
    for category_id, x, y, w, h in boxes:
        centre_x = (x + w / 2) / width
        centre_y = (y + h / 2) / height
        class_index = CLASS_INDEX[int(category_id)]
        lines.append(f"{class_index} {centre_x:.6f} {centre_y:.6f} {w / width:.6f} {h / height:.6f}\n")
    return "".join(lines)


def read_index(view: Path, split: str) -> Entries:
    """Entries of all listed images of 'train' or 'val', broken ones too, in the order of their ids."""
    index_path = view / f"{SPLITS[split]}.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    return index["images"]


def read_chosen(view: Path, split: str, image_ids: list[int] | None) -> Entries:
    """Entries of the images that a run has chosen, in the order of their ids; `image_ids` None means all images."""
    entries = read_index(view, split)
    if image_ids is None:
        return entries
    chosen = set(image_ids)
    return [entry for entry in entries if entry["id"] in chosen]


def read_split(provenance: dict[str, Any], split: str) -> list[Image]:
    """The images of a run's 'train' or 'val' with their labels, in the order of their ids."""
    view = Path(provenance["view_dir"])
    image_dir = view / "images" / SPLITS[split]
    label_dir = view / "labels" / SPLITS[split]
    entries = read_chosen(view, split, provenance["splits"][split]["image_ids"])
    label_paths = [_label_path(label_dir, entry["file"]) for entry in entries]
    images = []
    with ThreadPoolExecutor(N_THREADS) as pool:
        for entry, labels in zip(entries, pool.map(_read_labels, label_paths), strict=True):
            path = str(image_dir / entry["file"])
            images.append(Image(path, (entry["height"], entry["width"]), labels))
    return images


def _read_labels(path: Path) -> np.ndarray:
    """Lines 'class cx cy w h' -> float32 [n,5]."""
    values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float32)
    return values.reshape(-1, 5)
