"""Why our AP and that of `yolo val` differ on one file: one thing changed at a time, each step measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils.metrics import ap_per_class, box_iou

from app.coco.score import quiet, score, with_annotations
from app.core.files import read_json, write_json
from app.eval.evaluate import DETECTIONS

Rows = list[dict[str, Any]]
SAME_SCORE, SAME_PX = 1e-4, 0.1  # two detections of one class are the same up to float32 and rounding to 3 decimals


def explain(truth: COCO, ids: list[int], ours_dir: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """From our AP to that of `yolo val` in steps.

    Args:
        truth: annotations of the images.
        ids: the images.
        ours_dir: folder with our detections.json; those of `yolo val` are written beside it.
        recorded: result of app.bench.stock_val with its detections.

    Returns:
        ours, stock: AP of each; steps: what is changed -> what that adds to AP, the last one is what remains; and how
        many detections each has, and how many are the same in both.
    """
    ours_path, theirs_path = Path(ours_dir) / DETECTIONS, Path(ours_dir) / "detections-yolo-val.json"
    ours, theirs = read_json(ours_path, "bench"), with_ids(truth, recorded["rows"])
    write_json(theirs_path, theirs)
    with quiet():
        single = with_annotations(truth, without_crowds(truth.dataset["annotations"]))
    our_ap = score(truth, ours_path, ids)["AP"] or 0.0
    aps = {  # what is changed -> AP from then on
        "crowd regions left out, what lies in them is a miss": score(single, ours_path, ids)["AP"] or 0.0,
        "Ultralytics' metric instead of COCOeval": stock_ap(truth, ours, ids),
        "its own detections": stock_ap(truth, theirs, ids),
        "label files, boxes not clipped": recorded["AP"],
    }
    steps, before = {}, our_ap
    for change, ap in aps.items():
        steps[change] = ap - before
        before = ap
    our_table, their_table = by_image(ours, ids), by_image(theirs, ids)
    return {
        "ours": our_ap,
        "stock": recorded["AP"],
        "steps": steps,
        "stock_detections_by_our_score": score(truth, theirs_path, ids)["AP"],
        "n_ours": len(ours),
        "n_stock": len(theirs),
        "n_same": sum(n_same(our_table[i], their_table[i]) for i in ids),
    }


def with_ids(truth: COCO, rows: Rows) -> Rows:
    """The rows with the image id in place of the file name."""
    ids = {Path(image["file_name"]).name: image_id for image_id, image in truth.imgs.items()}
    keys = ("category_id", "bbox", "score")
    return [{"image_id": ids[row["file"]], **{key: row[key] for key in keys}} for row in rows]


def without_crowds(annotations: list[Any]) -> Rows:
    """Single objects: YOLO label files hold no crowd regions."""
    return [annotation for annotation in annotations if not annotation["iscrowd"]]


def by_image(rows: Rows, ids: list[int]) -> dict[int, np.ndarray]:
    """Image id -> [n,6] x1,y1,x2,y2 (px), score (of objects 1), category id, in their order."""
    lists: dict[int, list[list[float]]] = {image_id: [] for image_id in ids}
    for row in rows:
        x, y, width, height = row["bbox"]
        lists[row["image_id"]].append([x, y, x + width, y + height, row.get("score", 1.0), row["category_id"]])
    return {image_id: np.array(values).reshape(-1, 6) for image_id, values in lists.items()}


def stock_ap(truth: COCO, rows: Rows, ids: list[int]) -> float:
    """AP of Ultralytics' validator (engine/validator.py, utils/metrics.py, 8.4.190) over detections, best first."""
    annotations = []
    for image_id in ids:
        annotations += without_crowds(truth.imgToAnns[image_id])
    objects, detections = by_image(annotations, ids), by_image(rows, ids)
    all_objects = np.concatenate(list(objects.values()))
    all_detections = np.concatenate(list(detections.values()))
    if not len(all_objects) or not len(all_detections):
        return 0.0
    hits = list(map(stock_hits, detections.values(), objects.values()))
    result = ap_per_class(np.concatenate(hits), all_detections[:, 4], all_detections[:, 5], all_objects[:, 5])
    return float(np.mean(result[5]))  # AP [classes, IoU thresholds]


def stock_hits(detections: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Whether Ultralytics takes each detection [n,6] of an image for one of its objects [m,6], bool [n, thresholds]."""
    holder: Any = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))
    ours, true = torch.from_numpy(detections), torch.from_numpy(objects)
    iou = box_iou(true[:, :4].float(), ours[:, :4].float())
    return BaseValidator.match_predictions(holder, ours[:, 5], true[:, 5], iou).numpy()


def n_same(left: np.ndarray, right: np.ndarray) -> int:
    """How many rows [n,6] of `left` are in `right`: same class, score and box."""
    if not len(left) or not len(right):
        return 0
    distances = np.abs(left[:, None] - right[None])
    same_class = distances[:, :, 5] == 0
    same_box = distances[:, :, :4].max(axis=2) < SAME_PX
    same = same_class & same_box & (distances[:, :, 4] < SAME_SCORE)
    return int(same.any(axis=1).sum())
