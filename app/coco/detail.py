"""What detections.json says beyond the twelve numbers: AP by class, precision over recall, F1 of single images."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco.score import Dataset, first_of, hash_ids, load_results, load_truth, quiet, usable_ids
from app.core.config import UserError
from app.core.files import sha256
from app.report.evidence import Evidence
from app.report.findings import Metrics

PR_IOUS = (0.5, 0.75)
F1_IOU = 0.5
AP_TOLERANCE = 1e-6  # the same code on the same file: only the order of additions may differ
ALL_SIZES = [[0.0, 1e10]]


def analyse(dataset: Dataset, group: list[Metrics]) -> tuple[dict[str, Any], COCO]:
    """Scores the detections.json of rows that were measured alike again, in detail.

    Returns:
        JSON-able facts, and the annotations. `variants` maps dir -> AP by class, precision at 101 recalls averaged over
        classes, the score at which F1 over all images is best, and the F1 of each image at that score.

    Raises:
        UserError: detections are gone, or they or the images are not those of metrics.json; the message is the reason.
    """
    truth = load_truth(dataset.annotation_file)
    ids = first_of(usable_ids(truth, dataset), group[0]["dataset"]["n_images"])
    if hash_ids(ids) != group[0]["dataset"]["image_ids_sha256"]:
        raise UserError("the images of metrics.json are not those of the dataset")
    variants = {m["dir"]: detail(truth, Path(m["path"]), ids, m["coco"]["AP"]) for m in group}
    facts = {"iou_of_f1": F1_IOU, "recalls": np.linspace(0, 1, 101).round(2).tolist(), "variants": variants}
    return facts, truth


def annotations_of(evidence: Evidence, metrics: Metrics) -> Dataset:
    """The val split of the run, if it is the one that was scored.

    Raises:
        UserError: it is not, or the annotations are gone; the message is the reason.
    """
    if evidence.provenance is None:
        raise UserError("dataset/provenance.json is not there")
    split = evidence.provenance["splits"]["val"]
    file = Path(split["annotation_file"])
    if not file.is_file() or sha256(file) != metrics["dataset"]["annotation_sha256"]:
        raise UserError(f"the scored annotations ({file.name}) are not on this machine, or have changed")
    images_dir = Path(evidence.provenance["coco_dir"]) / split["name"]
    return Dataset(images_dir, file, split["name"], split["image_ids"], evidence.provenance["title"])


def detail(truth: COCO, folder: Path, ids: list[int], expected_ap: float | None) -> dict[str, Any]:
    """Facts of one detections.json; `expected_ap` of metrics.json proves that both are of the same scoring."""
    if not (folder / "detections.json").exists():
        raise UserError(f"{folder.name}/detections.json is not there")
    with quiet():
        scorer = COCOeval(truth, load_results(truth, folder / "detections.json"), "bbox")
        scorer.params.imgIds = ids
        scorer.params.areaRng, scorer.params.areaRngLbl, scorer.params.maxDets = ALL_SIZES, ["all"], [100]
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, 0]  # [IoU, recall, class]; -1 where a class has no object
    present = (precision > -1).any(axis=(0, 1))
    precision = precision[:, :, present]
    ap = float(precision.mean()) if present.any() else None
    if (ap is None) != (expected_ap is None) or abs((ap or 0) - (expected_ap or 0)) > AP_TOLERANCE:
        raise UserError(f"{folder.name}/detections.json does not give the AP of metrics.json")
    names = [truth.cats[number]["name"] for number in np.array(scorer.params.catIds)[present]]
    ious = [int(np.argmin(abs(scorer.params.iouThrs - iou))) for iou in PR_IOUS]
    return {
        "ap_by_class": dict(zip(names, precision.mean(axis=(0, 1)).tolist(), strict=True)),
        "precision": {str(scorer.params.iouThrs[i].round(2)): precision[i].mean(axis=1).tolist() for i in ious},
        **f1(scorer, ids),
    }


def f1(scorer: COCOeval, ids: list[int]) -> dict[str, Any]:
    """The score threshold of the best F1 over all images and classes at IoU 0.5, and every image's F1 there.

    F1 = 2 TP / (2 TP + FP + FN). Crowds and what they swallow do not count. An image with nothing to find and nothing
    found has F1 1.
    """
    hits, n_objects = matches(scorer.evalImgs, ids)
    scores = np.concatenate([h[:, 0] for h in hits.values()])
    correct = np.concatenate([h[:, 1] for h in hits.values()])
    n_all = sum(n_objects.values())
    if not len(scores):
        return {"best_f1": 0.0, "best_score": 1.0, "f1_by_image": {str(i): float(not n_objects[i]) for i in ids}}
    order = np.argsort(-scores, kind="stable")
    curve = 2 * np.cumsum(correct[order]) / (np.arange(1, len(scores) + 1) + n_all)
    best = int(curve.argmax())
    threshold = float(scores[order][best])
    by_image = {str(i): _image_f1(hits[i], n_objects[i], threshold) for i in ids}
    return {"best_f1": float(curve[best]), "best_score": threshold, "f1_by_image": by_image}


def matches(cells: Iterable[Any], ids: list[int]) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """COCOeval's evalImgs -> per image: rows [score, 1 if correct else 0] [n,2], and the number of objects."""
    hits: dict[int, list[np.ndarray]] = {image_id: [np.zeros((0, 2))] for image_id in ids}
    n_objects = dict.fromkeys(ids, 0)
    for cell in cells:
        if cell is None:
            continue
        counted = ~np.asarray(cell["dtIgnore"][0], bool)  # row 0 is IoU 0.5
        correct = np.asarray(cell["dtMatches"][0])[counted] > 0
        scores = np.asarray(cell["dtScores"], float)[counted]
        hits[cell["image_id"]].append(np.stack([scores, correct], axis=1))
        n_objects[cell["image_id"]] += int((np.asarray(cell["gtIgnore"]) == 0).sum())
    return {image_id: np.concatenate(rows) for image_id, rows in hits.items()}, n_objects


def _image_f1(hits: np.ndarray, n_objects: int, threshold: float) -> float:
    shown = hits[hits[:, 0] >= threshold]
    total = len(shown) + n_objects
    return float(2 * shown[:, 1].sum() / total) if total else 1.0


def choose(base: dict[str, float], other: dict[str, float], n_each: int, seed: int) -> list[tuple[str, str, float]]:
    """Images for the gallery: (id, why, F1 of other - F1 of base), n of each kind, no image twice.

    The largest losses, the largest gains, then a seeded draw from the rest; ties go to the smaller id. An image that
    neither lost nor gained is no example of a loss or a gain.
    """
    change = {image_id: other[image_id] - base[image_id] for image_id in base}
    ordered = sorted(change, key=lambda image_id: (change[image_id], int(image_id)))
    losses = [i for i in ordered if change[i] < 0][:n_each]
    gains = sorted((i for i in ordered if change[i] > 0), key=lambda i: (-change[i], int(i)))[:n_each]
    rest = sorted(set(change) - {*losses, *gains}, key=int)
    drawn = random.Random(seed).sample(rest, min(n_each, len(rest)))  # noqa: S311 - a reproducible choice, no secret
    kinds = (("largest loss", losses), ("largest gain", gains), ("random", drawn))
    return [(image_id, why, change[image_id]) for why, images in kinds for image_id in images]
