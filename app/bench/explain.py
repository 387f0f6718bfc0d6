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

from app.coco.annotations import CLASS_INDEX
from app.coco.score import quiet, score
from app.core.files import read_json, write_json

Rows = list[dict[str, Any]]
SAME_SCORE, SAME_PX = 1e-4, 0.1  # two detections of one class are the same up to float32 and rounding to 3 decimals


def explain(truth: COCO, ids: list[int], ours_dir: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """From our AP to that of `yolo val` in steps.

    Args:
        truth: annotations of the images.
        ids: the images.
        ours_dir: folder with our detections.json.
        recorded: result of app.bench.stock_val with its detections.

    Returns:
        ours, stock: AP of each; steps: what is changed -> what that adds to AP, the last one is what remains; and how
        many detections each has, and how many are the same in both.
    """
    ours_path = Path(ours_dir) / "detections.json"
    ours, theirs = read_json(ours_path, "bench"), with_ids(truth, recorded["rows"])
    write_json(Path(ours_dir) / "detections-yolo-val.json", theirs)
    aps = {
        "our eval": score(truth, ours_path, ids)["AP"] or 0.0,
        "crowd regions left out, what lies in them is a miss": score(without_crowds(truth), ours_path, ids)["AP"]
        or 0.0,
        "Ultralytics' metric instead of COCOeval": stock_ap(truth, ours, ids),
        "its own detections": stock_ap(truth, theirs, ids),
        "label files, boxes not clipped": recorded["AP"],
    }
    values = list(aps.values())
    steps = dict(zip(list(aps)[1:], np.diff(values).tolist(), strict=True))
    by_coco = score(truth, Path(ours_dir) / "detections-yolo-val.json", ids)["AP"]
    mine, other = by_image(ours, ids), by_image(theirs, ids)
    same = sum(n_same(mine[i], other[i]) for i in ids)
    return {
        "ours": values[0], "stock": recorded["AP"], "steps": steps, "stock_detections_by_our_score": by_coco,
        "n_ours": len(ours), "n_stock": len(theirs), "n_same": same,
    }  # fmt: skip


def with_ids(truth: COCO, rows: Rows) -> Rows:
    ids = {Path(image["file_name"]).name: image_id for image_id, image in truth.imgs.items()}
    return [{"image_id": ids[row["file"]], **{key: row[key] for key in row if key != "file"}} for row in rows]


def without_crowds(truth: COCO) -> COCO:
    """The same annotations but for the crowd regions, which YOLO label files do not hold."""
    single = COCO()
    kept = [annotation for annotation in truth.dataset["annotations"] if not annotation["iscrowd"]]
    single.dataset = {**truth.dataset, "annotations": kept}
    with quiet():
        single.createIndex()
    return single


def by_image(rows: Rows, ids: list[int]) -> dict[int, np.ndarray]:
    """Image id -> [n,6] x1,y1,x2,y2 (px), score (of objects 1), class index, in their order."""
    found: dict[int, list[list[float]]] = {image_id: [] for image_id in ids}
    for row in rows:
        x, y, w, h = row["bbox"]
        values = [x, y, x + w, y + h, row.get("score", 1.0), CLASS_INDEX[row["category_id"]]]
        found[row["image_id"]].append(values)
    return {image_id: np.array(values).reshape(-1, 6) for image_id, values in found.items()}


def stock_ap(truth: COCO, rows: Rows, ids: list[int]) -> float:
    """AP of Ultralytics' validator (engine/validator.py, utils/metrics.py, 8.4.190) over detections, best first."""
    objects = by_image([dict(a) for i in ids for a in truth.imgToAnns[i] if not a["iscrowd"]], ids)
    found = by_image(rows, ids)
    holder: Any = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))
    correct = []
    for image_id in ids:
        boxes, true = (torch.from_numpy(table[image_id]) for table in (found, objects))
        iou = box_iou(true[:, :4].float(), boxes[:, :4].float())
        correct.append(BaseValidator.match_predictions(holder, boxes[:, 5], true[:, 5], iou).numpy())
    all_found, all_true = (np.concatenate([table[i] for i in ids]) for table in (found, objects))
    if not len(all_true) or not len(all_found):
        return 0.0
    result = ap_per_class(np.concatenate(correct), all_found[:, 4], all_found[:, 5], all_true[:, 5])
    return float(np.mean(result[5]))  # AP [classes, IoU thresholds]


def n_same(a: np.ndarray, b: np.ndarray) -> int:
    """How many rows [n,6] of `a` are in `b`: same class, score and box."""
    if not len(a) or not len(b):
        return 0
    close = (a[:, None, 5] == b[None, :, 5]) & (np.abs(a[:, None, 4] - b[None, :, 4]) < SAME_SCORE)
    close &= np.abs(a[:, None, :4] - b[None, :, :4]).max(axis=2) < SAME_PX
    return int(close.any(axis=1).sum())
