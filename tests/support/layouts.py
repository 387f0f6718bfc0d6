"""One drawn dataset of five classes of its own, in the four layouts that tools export: the same images and boxes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.data import synthetic

# What is drawn: the shapes of the built-in dataset, and a fifth in a colour of its own.
KINDS = {
    1: ("ellipse", (60, 60, 220)), 3: ("box", (220, 90, 40)), 18: ("triangle", (50, 190, 60)),
    59: ("cross", (40, 200, 220)), 62: ("box", (200, 60, 200)),
}  # fmt: skip
NAMES = ["hex bolt", "nut", "washer <b>|$M_5$", "Öse 中", "o-ring"]  # in the order of the ids above
Tree = dict[str, Any]


def draw_base(folder: Path, n_train: int, n_val: int) -> Path:
    """The dataset in COCO's layout with ids that have gaps, names that pages trip on and no word that it is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "KINDS", KINDS)
        synthetic.draw_coco_subset(folder, n_train=n_train, n_val=n_val)
    names = dict(zip(KINDS, NAMES, strict=True))
    for file in (folder / "annotations").iterdir():
        tree = json.loads(file.read_text())
        del tree["info"]
        tree["categories"] = [{"id": key, "name": name, "supercategory": "part"} for key, name in names.items()]
        file.write_text(json.dumps(tree))
    return folder


def trees(base: Path) -> dict[str, Tree]:
    """The annotation files by 'train' and 'val'."""
    files = {split: base / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
    return {split: json.loads(file.read_text()) for split, file in files.items()}


def write(file: Path, tree: Tree) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


def coco(base: Path, folder: Path) -> None:
    """As it is, with images/ above the folders of images."""
    shutil.copytree(base, folder)
    (folder / "images").mkdir()
    for name in ("train2017", "val2017"):
        (folder / name).rename(folder / "images" / name)


def roboflow(base: Path, folder: Path) -> None:
    """train/ valid/ test/ with their annotations; all ids from 0, where the unused supercategory stands; hashed names;
    sizes as floats."""
    for split, tree in trees(base).items():
        target = folder / {"train": "train", "val": "valid"}[split]
        target.mkdir(parents=True)
        ids = {category["id"]: number for number, category in enumerate(tree["categories"], 1)}
        images = {image["id"]: number for number, image in enumerate(tree["images"])}
        for image in tree["images"]:
            name = f"{image['id']}_jpg.rf.{image['id']:032x}.jpg"
            shutil.copy(base / f"{split}2017" / image["file_name"], target / name)
            image |= {"id": images[image["id"]], "file_name": name, "width": float(image["width"])}
        for category in tree["categories"]:
            category |= {"id": ids[category["id"]], "supercategory": "parts"}
        tree["categories"].insert(0, {"id": 0, "name": "parts", "supercategory": "none"})
        for number, annotation in enumerate(tree["annotations"]):
            annotation |= {"id": number, "image_id": images[annotation["image_id"]]}
            annotation["category_id"] = ids[annotation["category_id"]]
        write(target / "_annotations.coco.json", tree)
    (folder / "test").mkdir()


def cvat(base: Path, folder: Path) -> None:
    """An export for each split; a name is a number that is not the id; no iscrowd; ids as NumPy writes them."""
    for split, tree in trees(base).items():
        target = folder / split / "images" / "default"
        target.mkdir(parents=True)
        for number, image in enumerate(tree["images"]):
            name = f"shift a/{9000 - number}.jpg"
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy(base / f"{split}2017" / image["file_name"], target / name)
            image |= {"file_name": f"default/{name}", "id": float(image["id"])}
        for annotation in tree["annotations"]:
            annotation["image_id"] = float(annotation["image_id"])
            annotation["category_id"] = float(annotation["category_id"])
            if not annotation["iscrowd"]:
                del annotation["iscrowd"]
        write(folder / split / "annotations" / "instances_default.json", tree)


def scripts(base: Path, folder: Path) -> None:
    """Somebody's script: backslashes, the split's name before the names, ids of annotations that are text."""
    for split, tree in trees(base).items():
        (folder / split).mkdir(parents=True)
        for image in tree["images"]:
            shutil.copy(base / f"{split}2017" / image["file_name"], folder / split / image["file_name"])
            image["file_name"] = f"{split}\\{image['file_name']}"
        for annotation in tree["annotations"]:
            annotation["id"] = f"{split}-{annotation['id']}"
        tree["categories"].reverse()
        write(folder / "annotations" / f"instances_{split}.json", tree)


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    "coco": coco, "roboflow": roboflow, "cvat": cvat, "scripts": scripts
}  # fmt: skip
