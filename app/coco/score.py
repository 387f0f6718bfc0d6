"""COCO truth and COCO score: which images count, and the twelve numbers of pycocotools."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.annotations import N_TRAIN, N_VAL, read_instances
from app.core.config import UserError
from app.core.files import read_json, sha256

COCO_2017 = "COCO 2017"
COCO_2017_SIZES = {"train2017": N_TRAIN, "val2017": N_VAL}
STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Images and annotations of one split. image_ids None means all that the annotation file lists."""

    images_dir: Path
    annotation_file: Path
    split: str
    image_ids: list[int] | None
    title: str


@dataclass(frozen=True)
class ImageFile:
    """One image to score; width and height in px as the annotations have them."""

    id: int
    path: Path
    width: int
    height: int


def standalone_dataset(coco_dir: Path, split: str) -> Dataset:
    """All images of a split of a COCO folder that no run has looked at.

    Raises:
        UserError: no such folder, or annotations that `make data` would not take either.
    """
    images_dir = coco_dir / split
    if not images_dir.is_dir():
        raise UserError(f"{images_dir} is no folder: --coco-dir must hold {split}/ and annotations/")
    annotation_file = coco_dir / "annotations" / f"instances_{split}.json"
    listed = read_instances(annotation_file)
    for image_id, problem in listed.problems.items():
        raise UserError(f"{annotation_file}: image id {image_id}: {problem}: mend the annotations")
    official = len(listed.images) == COCO_2017_SIZES.get(split)
    title = COCO_2017 if official else f"a COCO-format dataset, not {COCO_2017}"
    return Dataset(images_dir, annotation_file, split, None, title)


def load_truth(annotation_file: Path) -> COCO:
    """Reads annotations that COCOeval can score.

    Raises:
        UserError: not COCO instances, or a fault with which COCOeval would silently give wrong numbers.
    """
    read_instances(annotation_file)
    with quiet():
        truth = COCO(str(annotation_file))
    annotations = truth.dataset["annotations"]
    if any(not {"id", "area", "iscrowd"} <= set(annotation) for annotation in annotations):
        raise UserError(f"{annotation_file}: an annotation lacks id, area or iscrowd: it cannot be scored")
    if 0 in truth.anns or len(truth.anns) != len(annotations):
        # cocoeval.py (pycocotools 2.0.11) marks a match by the annotation's id, so that 0 reads as no match.
        raise UserError(f"{annotation_file}: annotation ids must be unique and not 0: number them from 1")
    return truth


def usable_ids(truth: COCO, dataset: Dataset) -> list[int]:
    """Sorted ids of the images that may be scored."""
    if dataset.image_ids is None:
        return sorted(truth.imgs)
    if unknown := set(dataset.image_ids) - set(truth.imgs):
        raise UserError(f"{dataset.annotation_file} does not list image {min(unknown)}: run 'make data ARGS=--force'")
    return sorted(dataset.image_ids)


def first_of(image_ids: list[int], max_images: int | None) -> list[int]:
    """Sorted ids of the first `max_images` in a random order that depends on nothing but the ids."""
    order = sorted(image_ids)
    random.Random(0).shuffle(order)  # noqa: S311 - a reproducible choice, no secret
    return sorted(order[:max_images])


def image_files(truth: COCO, dataset: Dataset, image_ids: list[int]) -> list[ImageFile]:
    """The images to score, in the order of their ids.

    Raises:
        UserError: a numeric file name that is not its image's id: results would belong to another image.
    """
    images = []
    for image_id in image_ids:
        entry = truth.imgs[image_id]
        path = dataset.images_dir / entry["file_name"]
        if path.stem.isdecimal() and int(path.stem) != image_id:
            raise UserError(
                f"{dataset.annotation_file}: image id {image_id} has the file name {path.name}: mend the ids"
            )
        images.append(ImageFile(image_id, path, entry["width"], entry["height"]))
    return images


def describe_dataset(truth: COCO, dataset: Dataset, image_ids: list[int]) -> dict[str, Any]:
    """What was scored, for metrics.json; `subset` is true as soon as one listed image is left out."""
    n_listed = len(truth.imgs)
    official = dataset.title == COCO_2017 and dataset.split == "val2017"
    return {
        "title": dataset.title,
        "coco_dir": str(dataset.images_dir.parent),
        "split": dataset.split,
        "annotation_sha256": sha256(dataset.annotation_file),
        "n_images": len(image_ids),
        "n_images_listed": n_listed,
        "n_annotations": len(truth.getAnnIds(imgIds=image_ids)),
        "subset": len(image_ids) < n_listed,
        "image_ids": image_ids if len(image_ids) < n_listed else None,
        "image_ids_sha256": hash_ids(image_ids),
        "complete_coco_val": official and len(image_ids) == n_listed == N_VAL,
    }


def hash_ids(image_ids: Iterable[int]) -> str:
    return hashlib.sha256("\n".join(map(str, sorted(image_ids))).encode()).hexdigest()


def score(truth: COCO, detections_path: Path, image_ids: list[int]) -> dict[str, float | None]:
    """The twelve numbers of COCOeval (0..1; None where there is nothing to measure) of a results file.

    All `image_ids` count, those without objects or detections too. COCOeval keeps a dict for each detection, and one
    for each image, class and size, gigabytes on COCO val2017: here it sees one class at a time, and gives the same.
    """
    found = read_results(detections_path)
    with quiet():
        scored = [score_class(truth, found, number, image_ids) for number in sorted(truth.getCatIds())]
        whole: Any = COCOeval(iouType="bbox")
        axes = {"precision": 2, "recall": 1}  # [IoU, recall, class, size, detections] and [IoU, class, ...]
        whole.eval = {name: np.concatenate([one[name] for one in scored], axis) for name, axis in axes.items()}
        whole.summarize()
    values = np.asarray(whole.stats).tolist()
    return {name: None if value == -1 else value for name, value in zip(STATS, values, strict=True)}


def read_results(detections_path: Path) -> np.ndarray:
    """COCO results -> [n,7]: image id, class id, x, y, w, h (px), score. Line by line where the evaluator wrote them.

    Raises:
        UserError: missing, or not such a file.
    """
    try:
        try:
            with open(detections_path, encoding="utf-8") as file:
                parts = [as_array(json.loads(f"[{line.strip().strip('[],')}]")) for line in file]
        except ValueError:  # rows that spread over lines, from another program
            parts = [as_array(json.loads(detections_path.read_text(encoding="utf-8")))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{detections_path} is missing or no COCO results: run 'make eval ARGS=--force'") from error
    return np.concatenate([np.zeros((0, 7)), *parts])


def as_array(rows: list[dict[str, Any]]) -> np.ndarray:
    values = [(row["image_id"], row["category_id"], *row["bbox"], row["score"]) for row in rows]
    return np.array(values, float).reshape(-1, 7)


def score_class(truth: COCO, found: np.ndarray, category_id: int, image_ids: list[int]) -> Any:
    """COCOeval's result of one class, a dict with precision and recall; `found` as read_results gives it."""
    rows = found[found[:, 1] == category_id].tolist()
    results: Any = COCO()
    results.dataset = {**truth.dataset, "annotations": [
        {"id": number, "image_id": int(image), "category_id": category_id, "bbox": [x, y, w, h], "area": w * h,
         "score": score}
        for number, (image, _, x, y, w, h, score) in enumerate(rows, start=1)
    ]}  # fmt: skip
    results.createIndex()
    scorer: Any = COCOeval(truth, results, "bbox")
    scorer.params.imgIds, scorer.params.catIds = image_ids, [category_id]
    scorer.evaluate()
    scorer.accumulate()
    return scorer.eval


def load_results(truth: COCO, detections_path: Path) -> COCO:
    """COCO.loadRes that also takes a file without any detection (pycocotools 2.0.11 looks at the first)."""
    rows = read_json(detections_path, "eval")
    if rows:
        return truth.loadRes(rows)
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends what pycocotools prints to the log, at debug."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    log.debug("%s", printed.getvalue().rstrip())
