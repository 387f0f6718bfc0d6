"""Writes a drawn dataset in COCO's layout, shard by shard, so that processes share the work and a killed one goes on.

An image depends on nothing but the scene, the seed, its id and its place in the split.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import cv2
import numpy as np

from app.coco.dataset import DRAWN, SPLITS, annotation_path
from app.core.files import write_atomic, write_text
from app.data.shapes import Annotation

N_IMAGES = 250  # of a shard: what a killed process draws again at most
RECORDS = "shards"  # folder of the records beside the images; gone when the dataset is whole


class Scene(Protocol):
    """What is drawn. A frozen dataclass, so that another process gets an equal one."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int:
        """Of the drawing: another number where the same seed gives other bytes."""
        ...

    @property
    def jpeg_quality(self) -> int: ...
    @property
    def categories(self) -> list[dict[str, Any]]: ...
    def draw(self, rng: np.random.Generator, position: int) -> tuple[np.ndarray, list[Annotation]]:
        """The image at `position` of its split, uint8 [H,W,3] BGR or [H,W], and its annotations."""
        ...


@dataclass(frozen=True)
class Drawing:
    """A dataset to draw. The ids of val follow those of train."""

    scene: Scene
    n_train: int
    n_val: int
    seed: int

    def image_ids(self, split: str) -> range:
        last_train = 1 + self.n_train
        return range(1, last_train) if split == SPLITS["train"] else range(last_train, last_train + self.n_val)


@dataclass(frozen=True)
class Shard:
    """A part of a split; the first of its images stands at `first_position` of the split."""

    split: str
    image_ids: range
    first_position: int


def shards(drawing: Drawing, *splits: str) -> list[Shard]:
    """The shards of some splits, in the order of the image ids."""
    parts = []
    for split in splits:
        ids = drawing.image_ids(split)
        for start in range(0, len(ids), N_IMAGES):
            parts.append(Shard(split, ids[start : start + N_IMAGES], start))
    return parts


def draw_shard(root: Path, drawing: Drawing, shard: Shard) -> int:
    """Writes the images of a shard, then its record; returns the number of its images.

    The record holds the text of its images' and annotations' entries, and the size of each file.
    """
    image_dir = root / shard.split
    image_dir.mkdir(parents=True, exist_ok=True)
    images, annotations, sizes = [], [], []
    for position, image_id in enumerate(shard.image_ids, start=shard.first_position):
        pixels, objects = draw_image(drawing, image_id, position)
        height, width = pixels.shape[:2]
        file_name = name_of(image_id)
        # Not cv2.imwrite, which only returns False on a full disk.
        sizes.append((image_dir / file_name).write_bytes(encode(pixels, drawing.scene.jpeg_quality)))
        entry = {"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1}
        images.append(json.dumps(entry))
        annotations += [json.dumps({"image_id": image_id, **annotation}) for annotation in objects]
    record = {"sizes": sizes, "images": ", ".join(images), "annotations": annotations}
    write_text(record_path(root, shard), json.dumps(record))
    return len(images)


def draw_image(drawing: Drawing, image_id: int, position: int) -> tuple[np.ndarray, list[Annotation]]:
    return drawing.scene.draw(np.random.default_rng([drawing.seed, image_id]), position)


def encode(pixels: np.ndarray, quality: int) -> bytes:
    _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return jpeg.tobytes()


def name_of(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def record_path(root: Path, shard: Shard) -> Path:
    return root / RECORDS / f"{shard.split}-{shard.image_ids.start}.json"


def is_drawn(root: Path, shard: Shard) -> bool:
    """Whether the shard has a record, and every file the size that it had then: a power failure may cut files off."""
    try:
        sizes = json.loads(record_path(root, shard).read_text(encoding="utf-8"))["sizes"]
        paths = [root / shard.split / name_of(image_id) for image_id in shard.image_ids]
        return sizes == [path.stat().st_size for path in paths]
    except FileNotFoundError:
        return False


def has_images(root: Path, drawing: Drawing, split: str) -> bool:
    """Whether every image of a split has a file; what others have put beside them does not matter."""
    folder = root / split
    return folder.is_dir() and set(map(name_of, drawing.image_ids(split))) <= set(os.listdir(folder))


def is_whole(root: Path, drawing: Drawing) -> bool:
    """Whether every file of a drawing is there."""
    return all(annotation_path(root, split).is_file() and has_images(root, drawing, split) for split in SPLITS.values())


def join(root: Path, drawing: Drawing) -> None:
    """Writes the annotation files from the records of all shards, and removes the records."""
    for split in SPLITS.values():
        write = partial(_write_instances, root=root, drawing=drawing, split=split)
        write_atomic(annotation_path(root, split), write)
    shutil.rmtree(root / RECORDS)


def _write_instances(file: Path, root: Path, drawing: Drawing, split: str) -> None:
    """Writes what json.dumps gives for the whole, of which only one shard at a time is in memory."""
    scene = drawing.scene
    head = {
        "info": {"description": f"{DRAWN} {scene.name}, not COCO", "version": str(scene.version), "year": 2026},
        "licenses": [{"id": 1, "name": "drawn by this program", "url": ""}],
    }
    parts = shards(drawing, split)
    with open(file, "w", encoding="utf-8") as out:
        out.write(json.dumps(head)[:-1] + ', "images": [')
        _write_list(out, (record["images"] for record in _records(root, parts)))
        out.write('], "annotations": [')
        texts = chain.from_iterable(record["annotations"] for record in _records(root, parts))
        _write_list(out, (f'{{"id": {number}, {text[1:]}' for number, text in enumerate(texts, start=1)))
        out.write(f'], "categories": {json.dumps(scene.categories)}' + "}")


def _records(root: Path, parts: list[Shard]) -> Iterator[dict[str, Any]]:
    for shard in parts:
        yield json.loads(record_path(root, shard).read_text(encoding="utf-8"))


def _write_list(out: IO[str], texts: Iterator[str]) -> None:
    for number, text in enumerate(texts):
        out.write(f", {text}" if number else text)
