"""What detections.json says beyond the twelve numbers: AP by class, precision over recall, F1 of single images."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params

from app.coco.dataset import Dataset, hash_ids
from app.coco.score import class_matcher, first_of, quiet, read_results, truth_of, usable_ids
from app.core.config import UserError

Metrics = dict[str, Any]  # the content of a metrics.json, with `dir` and `path` of its folder
IOUS, RECALLS = Params(iouType="bbox").iouThrs, Params(iouType="bbox").recThrs  # COCOeval's 10 and 101
PR_IOUS = (0.5, 0.75)
N_RECALLS = len(RECALLS)
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
    recalls = np.linspace(0, 1, N_RECALLS).round(2).tolist()
    return {"iou_of_f1": F1_IOU, "recalls": recalls, "variants": variants}, truth


def detail(truth: COCO, folder: Path, ids: list[int], expected_ap: float | None) -> dict[str, Any]:
    """Facts of one detections.json; `expected_ap` of metrics.json proves that both are of the same scoring."""
    path = folder / "detections.json"
    if not path.exists():
        raise UserError(f"{folder.name}/{path.name} is not there")
    detections = read_results(path)
    detections = detections[np.isin(detections[:, 0], ids)]
    by_class, hits, n_objects = {}, [np.zeros((0, 3))], Counter[int]()
    for category_id in sorted(truth.getCatIds()):
        found = matched(truth, detections, category_id, ids)
        if found.n_objects.total():
            by_class[truth.cats[category_id]["name"]] = precision_of(found)
        hits.append(hits_of(found))
        n_objects.update(found.n_objects)
    ap = float(np.mean(list(by_class.values()))) if by_class else None
    is_same = ap is expected_ap if ap is None or expected_ap is None else abs(ap - expected_ap) <= AP_TOLERANCE
    if not is_same:
        raise UserError(f"{folder.name}/{path.name} does not give the AP of metrics.json")
    aps = {name: float(precision.mean()) for name, precision in by_class.items()}
    return {"ap_by_class": aps, "precision": over_recall(by_class), **f1(np.concatenate(hits), n_objects, ids)}


@dataclass(frozen=True)
class Matched:
    """Detections of one class, at most 100 an image, in the order of the images; within one the best first.

    `images` and `scores` are [n]; `is_hit` and `is_ignored` [IoU,n], as COCOeval's dtMatches and dtIgnore.
    `n_objects` maps image id -> objects of the class without crowds, where there is an object or a crowd.
    """

    images: np.ndarray
    scores: np.ndarray
    is_hit: np.ndarray
    is_ignored: np.ndarray
    n_objects: Counter[int]


def matched(truth: COCO, detections: np.ndarray, category_id: int, ids: list[int]) -> Matched:
    """What COCOeval finds for one class among objects of all sizes and at most 100 detections an image.

    On COCO val2017 an image has objects of 3 classes and detections of up to 80. COCOeval matches where an image has
    an object of the class; elsewhere every detection is false, and 20 times as many of its cells would say so.

    Args:
        detections: [n,7] of `read_results`, of images in `ids`.
    """
    rows = best_of_images(detections[detections[:, 1] == category_id])
    objects = truth.loadAnns(truth.getAnnIds(imgIds=ids, catIds=[category_id]))
    with_objects = sorted({annotation["image_id"] for annotation in objects})
    area = rows[:, 4] * rows[:, 5]
    is_hit = np.zeros((len(IOUS), len(rows)), bool)
    is_ignored = np.tile((area < ALL_SIZES[0][0]) | (area > ALL_SIZES[0][1]), (len(IOUS), 1))
    n_objects: Counter[int] = Counter()
    for cell in cells_of(truth, rows[np.isin(rows[:, 0], with_objects)], category_id, with_objects):
        first = np.searchsorted(rows[:, 0], cell["image_id"])
        own = slice(first, first + len(cell["dtScores"]))
        is_hit[:, own], is_ignored[:, own] = cell["dtMatches"] != 0, cell["dtIgnore"]
        n_objects[cell["image_id"]] = int(np.sum(cell["gtIgnore"] == 0))
    return Matched(rows[:, 0], rows[:, 6], is_hit, is_ignored, n_objects)


def best_of_images(rows: np.ndarray) -> np.ndarray:
    """The MAX_DETECTIONS best rows of every image, in the order that COCOeval takes; equal ones as they come."""
    rows = rows[np.lexsort((-rows[:, 6], rows[:, 0]))]
    rank = np.arange(len(rows)) - np.searchsorted(rows[:, 0], rows[:, 0])
    return rows[rank < MAX_DETECTIONS]


def cells_of(truth: COCO, rows: np.ndarray, category_id: int, ids: list[int]) -> list[dict[str, Any]]:
    """COCOeval's results for one class in the images that have objects of it, one each."""
    with quiet():
        matcher = class_matcher(truth, rows, category_id, ids)
        matcher.params.areaRng = ALL_SIZES
        matcher.params.areaRngLbl = ["all"]
        matcher.params.maxDets = [MAX_DETECTIONS]
        matcher.evaluate()
    return matcher.evalImgs


def precision_of(found: Matched) -> np.ndarray:
    """Precision at 101 recalls, [IoU,recall], to the last bit as COCOeval's accumulate computes it."""
    order = np.argsort(-found.scores, kind="stable")
    is_hit, counts = found.is_hit[:, order], ~found.is_ignored[:, order]
    n_true = np.cumsum(is_hit & counts, axis=1).astype(float)
    n_false = np.cumsum(~is_hit & counts, axis=1).astype(float)
    recall = n_true / found.n_objects.total()
    precision = n_true / (n_false + n_true + np.spacing(1))
    best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_recalls = np.zeros((len(IOUS), N_RECALLS))
    for row, own_recall, best in zip(at_recalls, recall, best_from_here, strict=True):
        places = np.searchsorted(own_recall, RECALLS)
        is_reached = places < len(best)
        row[is_reached] = best[places[is_reached]]
    return at_recalls


def over_recall(by_class: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Precision at 101 recalls, the mean over classes, by IoU; `by_class` has [IoU, recall] of every class."""
    curves: dict[str, list[float | None]] = {}
    for iou in PR_IOUS:
        nearest = int(np.argmin(abs(IOUS - iou)))
        of_classes = [precision[nearest] for precision in by_class.values()]
        curves[str(iou)] = np.mean(of_classes, axis=0).tolist() if by_class else [None] * N_RECALLS
    return curves


def hits_of(found: Matched) -> np.ndarray:
    """Image id, score, and 1 if correct at IoU 0.5, [n,3], of the detections that count: none that match a crowd."""
    rows = np.stack([found.images, found.scores, found.is_hit[0]], axis=1)  # row 0 is IoU 0.5
    return rows[~found.is_ignored[0]]


def f1(rows: np.ndarray, n_objects: Counter[int], ids: list[int]) -> dict[str, Any]:
    """The score threshold of the best F1 over all images and classes at IoU 0.5, and every image's F1 there.

    F1 = 2 TP / (2 TP + FP + FN). An image with nothing to find and nothing found has F1 1. `rows` are those of
    `hits_of` for all classes, `n_objects` maps image id -> objects of all classes.
    """
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    best_f1, threshold = best_threshold(rows[:, 1:], n_objects.total())
    shown = rows[rows[:, 1] >= threshold]
    n_shown = Counter(shown[:, 0].tolist())
    n_correct = Counter(shown[shown[:, 2] > 0, 0].tolist())
    by_image = {}
    for image_id in ids:
        total = n_shown[image_id] + n_objects[image_id]
        by_image[str(image_id)] = 2 * n_correct[image_id] / total if total else 1.0
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
