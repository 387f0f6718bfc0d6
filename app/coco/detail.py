"""What detections.json says beyond the twelve numbers: AP by class, precision over recall, F1 of single images."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.dataset import Dataset, hash_ids
from app.coco.score import first_of, load_results, quiet, truth_of, usable_ids
from app.core.config import UserError

Metrics = dict[str, Any]  # the content of a metrics.json, with `dir` and `path` of its folder
PR_IOUS = (0.5, 0.75)
F1_IOU = 0.5
AP_TOLERANCE = 1e-6  # the same code on the same file: only the order of additions may differ
ALL_SIZES = [[0.0, 1e10]]  # range of areas in px^2
MAX_DETECTIONS = 100


def analyse(dataset: Dataset, group: list[Metrics]) -> tuple[dict[str, Any], COCO]:
    """Scores the detections.json of rows that were measured alike again, in detail.

    Returns:
        JSON-able facts, and the annotations. `variants` maps dir -> AP by class, precision at 101 recalls averaged over
        classes, the score at which F1 over all images is best, and the F1 of each image at that score.

    Raises:
        UserError: detections are gone, or they or the images are not those of metrics.json; the message is the reason.
    """
    truth = truth_of(dataset)
    ids = first_of(usable_ids(truth, dataset), group[0]["dataset"]["n_images"])
    if hash_ids(ids) != group[0]["dataset"]["image_ids_sha256"]:
        raise UserError("the images of metrics.json are not those of the dataset")
    variants = {}
    for metrics in group:
        variants[metrics["dir"]] = detail(truth, Path(metrics["path"]), ids, metrics["coco"]["AP"])
    recalls = np.linspace(0, 1, 101).round(2).tolist()
    return {"iou_of_f1": F1_IOU, "recalls": recalls, "variants": variants}, truth


def detail(truth: COCO, folder: Path, ids: list[int], expected_ap: float | None) -> dict[str, Any]:
    """Facts of one detections.json; `expected_ap` of metrics.json proves that both are of the same scoring."""
    path = folder / "detections.json"
    if not path.exists():
        raise UserError(f"{folder.name}/{path.name} is not there")
    scorer = evaluated(truth, path, ids)
    names, precision = precision_by_class(truth, scorer)
    ap = float(precision.mean()) if names else None
    if not is_same_ap(ap, expected_ap):
        raise UserError(f"{folder.name}/{path.name} does not give the AP of metrics.json")
    over_recall = {}
    for iou in PR_IOUS:
        nearest = int(np.argmin(abs(scorer.params.iouThrs - iou)))
        over_recall[str(iou)] = precision[nearest].mean(axis=1).tolist() if names else [None] * precision.shape[1]
    aps = precision.mean(axis=(0, 1)).tolist()
    ap_by_class = dict(zip(names, aps, strict=True))
    return {"ap_by_class": ap_by_class, "precision": over_recall, **f1(scorer, ids)}


def precision_by_class(truth: COCO, scorer: COCOeval) -> tuple[list[str], np.ndarray]:
    """Names of the classes that have objects, and their precision [IoU, recall, class]."""
    precision = scorer.eval["precision"][:, :, :, 0, 0]
    present = (precision > -1).any(axis=(0, 1))  # COCOeval gives -1 where a class has no object
    category_ids = np.array(scorer.params.catIds)[present]
    names = [truth.cats[category_id]["name"] for category_id in category_ids]
    return names, precision[:, :, present]


def evaluated(truth: COCO, detections_path: Path, ids: list[int]) -> COCOeval:
    """COCOeval over objects of all sizes and at most 100 detections an image, as its AP has them."""
    with quiet():
        scorer = COCOeval(truth, load_results(truth, detections_path), "bbox")
        scorer.params.imgIds = ids
        scorer.params.areaRng = ALL_SIZES
        scorer.params.areaRngLbl = ["all"]
        scorer.params.maxDets = [MAX_DETECTIONS]
        scorer.evaluate()
        scorer.accumulate()
    return scorer


def is_same_ap(ap: float | None, expected: float | None) -> bool:
    """Whether two APs are of one scoring; None where there was nothing to measure."""
    if ap is None or expected is None:
        return ap is expected
    return abs(ap - expected) <= AP_TOLERANCE


def f1(scorer: COCOeval, ids: list[int]) -> dict[str, Any]:
    """The score threshold of the best F1 over all images and classes at IoU 0.5, and every image's F1 there.

    F1 = 2 TP / (2 TP + FP + FN). Crowds, and detections that match a crowd, do not count. An image with
    nothing to find and nothing found has F1 1.
    """
    hits, n_objects = matches(scorer.evalImgs, ids)
    best_f1, threshold = best_threshold(np.concatenate(list(hits.values())), sum(n_objects.values()))
    by_image = {}
    for image_id in ids:
        by_image[str(image_id)] = _image_f1(hits[image_id], n_objects[image_id], threshold)
    return {"best_f1": best_f1, "best_score": threshold, "f1_by_image": by_image}


def best_threshold(hits: np.ndarray, n_objects: int) -> tuple[float, float]:
    """The best F1 over rows [score, 1 if correct else 0] [n,2], and its score; (0, 1) where nothing was detected."""
    if not len(hits):
        return 0.0, 1.0
    order = np.argsort(-hits[:, 0], kind="stable")
    scores, correct = hits[order].T
    n_correct = np.cumsum(correct)
    n_shown = np.arange(1, len(hits) + 1)
    curve = 2 * n_correct / (n_shown + n_objects)
    best = int(curve.argmax())
    return float(curve[best]), float(scores[best])


def matches(cells: Iterable[Any], ids: list[int]) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """COCOeval's evalImgs -> per image: rows [score, 1 if correct else 0] [n,2], and the number of objects."""
    hits: dict[int, np.ndarray] = {image_id: np.zeros((0, 2)) for image_id in ids}
    n_objects = dict.fromkeys(ids, 0)
    for cell in cells:
        if cell is None:
            continue
        image_id = cell["image_id"]
        is_object = np.asarray(cell["gtIgnore"]) == 0
        n_objects[image_id] += int(is_object.sum())
        counted = ~np.asarray(cell["dtIgnore"][0], bool)  # row 0 is IoU 0.5
        correct = np.asarray(cell["dtMatches"][0])[counted] > 0
        scores = np.asarray(cell["dtScores"], float)[counted]
        rows = np.stack([scores, correct], axis=1)
        hits[image_id] = np.concatenate([hits[image_id], rows])
    return hits, n_objects


def _image_f1(hits: np.ndarray, n_objects: int, threshold: float) -> float:
    """F1 of one image over the detections from the threshold on; 1 where there is nothing to find and nothing found."""
    shown = hits[hits[:, 0] >= threshold]
    total = len(shown) + n_objects
    return float(2 * shown[:, 1].sum() / total) if total else 1.0


def choose(base: dict[str, float], other: dict[str, float], n_each: int, seed: int) -> list[tuple[str, str, float]]:
    """Images for the gallery: (id, why, F1 of other - F1 of base), n of each kind, no image twice.

    The largest losses, the largest gains, then a seeded draw from the rest; ties go to the smaller id. An image that
    neither lost nor gained is no example of a loss or a gain.
    """
    change = {image_id: other[image_id] - base[image_id] for image_id in base}
    lost = [image_id for image_id in change if change[image_id] < 0]
    gained = [image_id for image_id in change if change[image_id] > 0]
    losses = sorted(lost, key=lambda image_id: (change[image_id], int(image_id)))[:n_each]
    gains = sorted(gained, key=lambda image_id: (-change[image_id], int(image_id)))[:n_each]
    rest = sorted(change.keys() - {*losses, *gains}, key=int)
    n_drawn = min(n_each, len(rest))
    drawn = random.Random(seed).sample(rest, n_drawn)  # noqa: S311 - a reproducible choice, no secret
    chosen = []
    for why, images in (("largest loss", losses), ("largest gain", gains), ("random", drawn)):
        chosen += [(image_id, why, change[image_id]) for image_id in images]
    return chosen
