from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.coco.annotations import CLASS_INDEX, Split, read_instances
from app.coco.images import fault
from app.core.progress import track

VIEW_VERSION = 3
SPLITS = {"train": "train2017", "val": "val2017"}
N_THREADS = min(8, os.cpu_count() or 1)


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
    entries = [(coco_dir / name, entry) for split, name in SPLITS.items() for entry in read_index(view, split)]
    return not any(
        entry["damaged"] and not fault(folder, entry["file"], entry["width"], entry["height"])
        for folder, entry in entries
    )


def build_view(target_dir: Path, coco_dir: Path, annotation_sha256: dict[str, str]) -> None:
    """Checks every image once and writes links, labels and index; a view that is there is replaced.

    Damaged images are recorded, not refused: whether to go on without them is the run's decision.
    """
    part_dir = target_dir.with_name(f".{target_dir.name}.{os.getpid()}.part")
    old_dir = target_dir.with_name(f".{target_dir.name}.{os.getpid()}.old")
    try:
        for name in SPLITS.values():
            split = read_instances(coco_dir / "annotations" / f"instances_{name}.json")
            _build_split(part_dir, coco_dir, name, split, annotation_sha256[name])
        with contextlib.suppress(FileNotFoundError):
            target_dir.rename(old_dir)
        try:
            part_dir.rename(target_dir)
        except OSError:
            if not target_dir.exists():  # else another process was faster, with the same view
                raise
    finally:
        shutil.rmtree(part_dir, ignore_errors=True)
        shutil.rmtree(old_dir, ignore_errors=True)


def _build_split(root: Path, coco_dir: Path, name: str, split: Split, annotation_sha256: str) -> None:
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "images" / name).symlink_to(coco_dir / name)
    label_dir = root / "labels" / name
    label_dir.mkdir(parents=True)
    index: dict[str, Any] = {"annotation_sha256": annotation_sha256, "images": []}
    pool = ThreadPoolExecutor(N_THREADS)
    try:
        faults = pool.map(lambda image: _fault_in(coco_dir / name, image, split.problems), split.images)
        for image, found in track(zip(split.images, faults, strict=True), f"checking {name}", len(split.images)):
            key = image["id"]
            problem = split.problems.get(key)
            index["images"].append({
                "id": key, "file": image["file_name"], "height": image["height"], "width": image["width"],
                "n_annotations": split.n_annotations[key], "n_crowd": split.n_crowd[key],
                "n_degenerate": split.n_degenerate[key], "n_boxes": len(split.boxes[key]),
                "fault": problem or found or None, "damaged": bool(found),
            })  # fmt: skip
            if not problem and not found:
                label_path = (label_dir / image["file_name"]).with_suffix(".txt")
                label_path.parent.mkdir(parents=True, exist_ok=True)
                label_path.write_text(yolo_rows(image, split.boxes[key]), encoding="utf-8")
    finally:
        pool.shutdown(cancel_futures=True)  # else an interrupted pass would first read all the other images
    (root / f"{name}.json").write_text(json.dumps(index), encoding="utf-8")


def _fault_in(image_dir: Path, image: dict[str, Any], problems: dict[int, str]) -> str:
    """Fault of the image file; '' too where the annotations are at fault already: such a name may lead anywhere."""
    return "" if image["id"] in problems else fault(image_dir, image["file_name"], image["width"], image["height"])


def yolo_rows(image: dict[str, Any], boxes: list[list[float]]) -> str:
    """COCO boxes [category_id, x, y, w, h] in px -> lines 'class cx cy w h', centre and size as shares of the image."""
    width, height = image["width"], image["height"]
    rows = [
        (CLASS_INDEX[int(category)], (x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        for category, x, y, w, h in boxes
    ]
    return "".join(f"{c} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}\n" for c, cx, cy, w, h in rows)


def read_index(view: Path, split: str) -> list[dict[str, Any]]:
    """Entries of all listed images of 'train' or 'val', broken ones too, in the order of their ids."""
    return json.loads((view / f"{SPLITS[split]}.json").read_text(encoding="utf-8"))["images"]


def read_split(provenance: dict[str, Any], split: str) -> list[Image]:
    """The images of a run's 'train' or 'val' with their labels, in the order of their ids."""
    view = Path(provenance["view_dir"])
    name = SPLITS[split]
    chosen = provenance["splits"][split]["image_ids"]
    wanted = None if chosen is None else set(chosen)
    entries = [entry for entry in read_index(view, split) if wanted is None or entry["id"] in wanted]
    with ThreadPoolExecutor(N_THREADS) as pool:
        labels = pool.map(
            lambda entry: _read_labels((view / "labels" / name / entry["file"]).with_suffix(".txt")), entries
        )
        return [
            Image(str(view / "images" / name / entry["file"]), (entry["height"], entry["width"]), rows)
            for entry, rows in zip(entries, labels, strict=True)
        ]


def _read_labels(path: Path) -> np.ndarray:
    values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float32)
    return values.reshape(-1, 5)
