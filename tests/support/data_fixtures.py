"""A tiny COCO folder built in code: two training images and one for validation, for the tests of the data stage."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.coco.categories import CATEGORIES
from app.core.config import CONF_DIR, Config, load
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare

SIZES_WH = {1: (40, 30), 2: (24, 32), 3: (32, 24)}  # image id -> px


def image(image_id: int) -> dict[str, Any]:
    width, height = SIZES_WH[image_id]
    return {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height}


def annotation(key: int, image_id: int, category_id: int, bbox: list[float], iscrowd: int = 0) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    return {
        "id": key, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": area, "iscrowd": iscrowd
    }  # fmt: skip


def write_dataset(coco_dir: Path) -> Path:
    """Image 1: a person and a toothbrush; image 2: a crowd and a box without area; image 3: a pizza."""
    train = [
        annotation(1, 1, 1, [4, 3, 10, 6]),
        annotation(2, 1, 90, [20, 15, 20, 15.5]),
        annotation(3, 2, 1, [0, 0, 24, 8], iscrowd=1),
        annotation(4, 2, 3, [5, 5, 0, 7]),
    ]
    for split, ids, entries in (
        ("train2017", [1, 2], train),
        ("val2017", [3], [annotation(1, 3, 59, [8, 6, 16, 12])]),
    ):
        (coco_dir / split).mkdir(parents=True)
        for image_id in ids:
            write_image(coco_dir / split / image(image_id)["file_name"], SIZES_WH[image_id])
        tree = {"images": [image(key) for key in ids], "annotations": entries, "categories": CATEGORIES}
        write_tree(coco_dir, split, tree)
    return coco_dir


def write_image(path: Path, size_wh: tuple[int, int]) -> None:
    width, height = size_wh
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def claiming_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def annotation_file(coco_dir: Path, split: str = "train2017") -> Path:
    return coco_dir / "annotations" / f"instances_{split}.json"


def write_tree(coco_dir: Path, split: str, tree: Any) -> None:
    annotation_file(coco_dir, split).parent.mkdir(exist_ok=True)
    annotation_file(coco_dir, split).write_text(json.dumps(tree), encoding="utf-8")


def edit(coco_dir: Path, change: Callable[[dict[str, Any]], object], split: str = "train2017") -> None:
    """Lets `change` alter the tree of an annotation file in place."""
    tree = json.loads(annotation_file(coco_dir, split).read_text(encoding="utf-8"))
    change(tree)
    write_tree(coco_dir, split, tree)


def config_for(coco_dir: Path | str, *sets: str) -> Config:
    return load("qat", [CONF_DIR / "smoke.yaml"], [f"data.coco_dir={coco_dir}", *sets])


def run_data(run: RunRoot, coco_dir: Path | str, *sets: str, force: bool = False) -> None:
    prepare(config_for(coco_dir, *sets), run, force)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder and the folder itself, with size and time of the last change in ns."""
    stats = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def provenance_of(run: RunRoot) -> dict[str, Any]:
    return read_json(run.provenance, "data")
