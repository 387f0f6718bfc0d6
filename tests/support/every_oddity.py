"""A small COCO folder that holds at once every oddity of images, names and annotations that people's datasets have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Name, mode, size in px: formats and colour modes, from one pixel to very long, names that shells and pages trip on.
IMAGES = (
    ("plain.jpg", "RGB", (96, 64)), ("LOUD.JPG", "RGB", (64, 96)), ("grey.jpg", "L", (96, 64)),
    ("cmyk.jpg", "CMYK", (96, 64)), ("web.webp", "RGB", (96, 64)), ("bit.bmp", "RGB", (96, 64)),
    ("tag.tif", "RGB", (96, 64)), ("deep.png", "I;16", (96, 64)), ("glass.png", "RGBA", (96, 64)),
    ("one.png", "1", (96, 64)), ("palette.gif", "P", (96, 64)), ("wave.jp2", "RGB", (96, 64)),
    ("next.avif", "RGB", (96, 64)), ("pixel.png", "RGB", (1, 1)), ("long.jpg", "RGB", (9000, 120)),
    ("straße é 中.png", "RGB", (96, 64)), ("<b>bold &amp;.png", "RGB", (96, 64)), ("$(id) `id`.png", "RGB", (96, 64)),
    ("a|b;c&d.png", "RGB", (96, 64)), ("it's \"quoted\".png", "RGB", (96, 64)), ("blank name.png", "RGB", (96, 64)),
)  # fmt: skip
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]  # two of the 80


def draw_every_oddity(folder: Path) -> None:
    """Both splits hold every image; the folder's name has a blank, an apostrophe, a colon and an accent."""
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for image_id, (name, mode, size) in enumerate(IMAGES, 1):
            _save(folder / split / name, mode, rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
            annotations += _annotations(image_id, size)
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        tree = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        file = folder / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(tree), encoding="utf-8")


def _save(path: Path, mode: str, pixels: np.ndarray) -> None:
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    image.save(path)


def _annotations(image_id: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """An object of each category, and in every third image a crowd as RLE; `iscrowd` is a number or a boolean."""
    width, height = size
    if width < 8:
        return []
    box = [2, 3, width // 2, height // 2]
    rows: list[dict[str, Any]] = []
    for category, crowd in ((1, 0), (90, False)):
        rows.append({"category_id": category, "bbox": box, "iscrowd": crowd, "area": box[2] * box[3]})
    if image_id % 3 == 0:
        mask = {"counts": [0, width * height], "size": [height, width]}
        crowd_row = {"category_id": 1, "bbox": [0, 0, width, height], "iscrowd": True, "area": width * height}
        rows.append(crowd_row | {"segmentation": mask})
    return [row | {"image_id": image_id} for row in rows]
