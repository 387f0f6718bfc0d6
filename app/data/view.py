"""The view of a dataset: YOLO labels, links to the images, and an index that says which images can be used."""

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
Entries = list[dict[str, Any]]  # of a view's index: one an image


@dataclass(frozen=True)
class Image:
    """One image of a split: path through the view, size in px as (height, width), labels float32 [n,5] with rows
    class index, then cx, cy, w, h as shares of the image."""

    path: str
    shape_hw: tuple[int, int]
    labels: np.ndarray


def view_dir(cache_dir: Path, coco_dir: Path, annotation_sha256: dict[str, str]) -> Path:
    """Folder of the view of exactly this dataset at exactly this place."""
    key = json.dumps([VIEW_VERSION, str(coco_dir), annotation_sha256], sort_keys=True)
    return cache_dir / "views" / hashlib.sha256(key.encode()).hexdigest()[:16]


def is_current(view: Path, coco_dir: Path) -> bool:
    """Whether the view is there and its damaged images are still damaged: a repaired one asks for a new view."""
    if not view.exists():
        return False
    for split, name in SPLITS.items():
        damaged = [entry for entry in read_index(view, split) if entry["damaged"]]
        for entry in damaged:
            if not fault(coco_dir / name, entry["file"], entry["width"], entry["height"]):
                return False
    return True


def build_view(target_dir: Path, coco_dir: Path, annotation_sha256: dict[str, str]) -> None:
    """Checks every image once and writes links, labels and index; a view that is there is replaced.

    Damaged images are recorded, not refused: whether to go on without them is the run's decision.
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
    pool = ThreadPoolExecutor(N_THREADS)
    try:
        reasons = pool.map(partial(_file_fault, coco_dir / name, split), split.images)
        checked = track(zip(split.images, reasons, strict=True), f"checking {name}", len(split.images))
        entries = [_enter(label_dir, split, image, reason) for image, reason in checked]
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupted pass would first read all the other images
    index = {"annotation_sha256": annotation_sha256, "images": entries}
    (root / f"{name}.json").write_text(json.dumps(index), encoding="utf-8")


def _file_fault(image_dir: Path, split: Split, image: dict[str, Any]) -> str:
    """Fault of the image file; '' too where the annotations are at fault already: such a name may lead anywhere."""
    if image["id"] in split.problems:
        return ""
    return fault(image_dir, image["file_name"], image["width"], image["height"])


def _enter(label_dir: Path, split: Split, image: dict[str, Any], file_fault: str) -> dict[str, Any]:
    """Writes the labels of an image that can be used; returns the image's entry of the index."""
    key = image["id"]
    boxes = split.boxes[key]
    reason = split.problems.get(key) or file_fault or None
    if reason is None:
        path = _label_path(label_dir, image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yolo_rows(image, boxes), encoding="utf-8")
    return {
        "id": key, "file": image["file_name"], "height": image["height"], "width": image["width"],
        "n_annotations": split.n_annotations[key], "n_crowd": split.n_crowd[key],
        "n_degenerate": split.n_degenerate[key], "n_boxes": len(boxes), "fault": reason, "damaged": bool(file_fault),
    }  # fmt: skip


def _label_path(label_dir: Path, file_name: str) -> Path:
    return (label_dir / file_name).with_suffix(".txt")


def yolo_rows(image: dict[str, Any], boxes: list[list[float]]) -> str:
    """COCO boxes [category_id, x, y, w, h] in px -> lines 'class cx cy w h', centre and size as shares of the image."""
    width, height = image["width"], image["height"]
    lines = []
    for category, x, y, w, h in boxes:
        centre = (x + w / 2) / width, (y + h / 2) / height
        numbers = (*centre, w / width, h / height)
        shares = " ".join(f"{number:.6f}" for number in numbers)
        lines.append(f"{CLASS_INDEX[int(category)]} {shares}\n")
    return "".join(lines)


def read_index(view: Path, split: str) -> Entries:
    """Entries of all listed images of 'train' or 'val', broken ones too, in the order of their ids."""
    return json.loads((view / f"{SPLITS[split]}.json").read_text(encoding="utf-8"))["images"]


def read_chosen(view: Path, split: str, image_ids: list[int] | None) -> Entries:
    """Entries of the images that a run has chosen, in the order of their ids; None means all images."""
    entries = read_index(view, split)
    if image_ids is None:
        return entries
    chosen = set(image_ids)
    return [entry for entry in entries if entry["id"] in chosen]


def read_split(provenance: dict[str, Any], split: str) -> list[Image]:
    """The images of a run's 'train' or 'val' with their labels, in the order of their ids."""
    view, name = Path(provenance["view_dir"]), SPLITS[split]
    image_dir, label_dir = view / "images" / name, view / "labels" / name
    entries = read_chosen(view, split, provenance["splits"][split]["image_ids"])
    label_paths = [_label_path(label_dir, entry["file"]) for entry in entries]
    with ThreadPoolExecutor(N_THREADS) as pool:
        labels = list(pool.map(_read_labels, label_paths))
    return [
        Image(str(image_dir / entry["file"]), (entry["height"], entry["width"]), rows)
        for entry, rows in zip(entries, labels, strict=True)
    ]


def _read_labels(path: Path) -> np.ndarray:
    """Lines 'class cx cy w h' -> float32 [n,5]."""
    values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float32)
    return values.reshape(-1, 5)
