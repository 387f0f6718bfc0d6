"""Output of the network -> detections -> rows of COCO results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from app.coco.categories import CATEGORY_IDS, NAMES
from app.coco.images import Placement, undo
from app.core.config import Eval, UserError

# For contract nms, as `yolo val` does it (ultralytics/utils/nms.py and cfg/default.yaml, 8.4.190).
NMS_IOU = 0.7
N_NMS_CANDIDATES = 30_000
SLACK = 0.01  # by which a quantized sigmoid may leave 0..1


@np.errstate(over="ignore", invalid="ignore")  # of huge boxes; what is then not finite is refused
def select(output: np.ndarray, contract: str, settings: Eval, n_classes: int = len(NAMES)) -> np.ndarray:
    """One image's output -> detections [n,6] x1,y1,x2,y2 (input px), score, class; best first, scores above conf.

    Args:
        output: raw and nms [4+nc,A] or end2end [K,6], as the contract says.
        contract: 'raw', 'end2end' or 'nms'.
        settings: scores up to `conf` are dropped, at most `max_det` rows are kept.
        n_classes: of the network.

    Raises:
        UserError: the output holds NaN or infinite values, scores that are no probabilities, or classes that are none.
    """
    if contract == "end2end":
        rows = output
    elif contract == "raw":
        rows = raw_rows(output, settings.max_det)
    else:
        rows = suppressed_rows(output, settings.conf)
    order = np.argsort(-rows[:, 4], kind="stable")[: settings.max_det]
    if not (np.isfinite(rows[order]).all() and np.isfinite(rows[:, 4]).all()):
        raise UserError(_not_finite(output))
    order = order[rows[order, 4] > settings.conf]
    rows = rows[order]
    if contract == "end2end":
        _check_rows(rows, order, n_classes)
    return rows


def _not_finite(output: np.ndarray) -> str:
    """The message about an output with NaN or infinite values, which names the first of them."""
    places = np.argwhere(~np.isfinite(output)).tolist()
    where = "its boxes are too large"
    if places:
        where = f"{output[tuple(places[0])]} at {places[0]} of {list(output.shape)}"
    return f"the model puts out values that are not finite ({where}): it is damaged or its precision overflows"


def _check_rows(rows: np.ndarray, numbers: np.ndarray, n_classes: int) -> None:
    """Raises a UserError if a class of end2end rows is not a whole number below `n_classes`, or a score is above 1.

    `numbers` are the places of the rows in the output. Padding is not among them.
    """
    scores, classes = rows[:, 4], rows[:, 5]
    is_class = (classes >= 0) & (classes < n_classes) & (classes == np.floor(classes))
    for number, index in zip(numbers[~is_class], classes[~is_class], strict=True):
        raise UserError(
            f"row {number} of the end2end output has the class {index:g}, not a whole number from 0 to "
            f"{n_classes - 1}: the columns must be x1, y1, x2, y2, score, class"
        )
    for number, value in zip(numbers[scores > 1 + SLACK], scores[scores > 1 + SLACK], strict=True):
        raise UserError(
            f"row {number} of the end2end output has the score {value:g}, which is above 1: "
            "the columns must be x1, y1, x2, y2, score, class; export the scores through a sigmoid"
        )


def _check_scores(low: float, high: float) -> None:
    """Raises a UserError if a score lies outside 0..1, as logits do; what is not finite is left to `select`."""
    if low < -SLACK or 1 + SLACK < high < np.inf:
        raise UserError(
            f"the model puts out scores from {low:.4g} to {high:.4g}, and probabilities lie in 0 to 1: "
            "these are logits, export the file with the sigmoid behind them"
        )


def suppressed_rows(output: np.ndarray, conf: float) -> np.ndarray:
    """raw layout [4+nc,A] of a one2many head -> rows [n,6] after non-maximum suppression (NMS) within each class.

    An anchor counts once for every class above `conf`, as in `yolo val` (multi_label).
    """
    if not np.isfinite(output).all():
        return np.full((1, 6), np.nan, np.float32)  # `select` names the fault
    boxes, all_scores = output[:4], output[4:]
    _check_scores(all_scores.min(initial=0.0), all_scores.max(initial=0.0))
    classes, anchors = np.nonzero(all_scores > conf)
    order = np.argsort(-all_scores[classes, anchors], kind="stable")
    best = order[:N_NMS_CANDIDATES]
    classes, anchors = classes[best], anchors[best]
    scores = all_scores[classes, anchors]
    x1, y1, x2, y2 = corners(boxes[:, anchors])
    _, _, w, h = boxes[:, anchors]
    xywh = np.stack([x1, y1, w, h], axis=1).astype(np.float64)
    suppress: Any = cv2.dnn.NMSBoxesBatched  # takes arrays, whatever OpenCV's stubs say
    kept = suppress(xywh, scores, classes.astype(np.int32), conf, NMS_IOU)
    rows = np.stack([x1, y1, x2, y2, scores, classes], axis=1, dtype=np.float32)
    return rows[np.array(kept, dtype=int)]


def raw_rows(output: np.ndarray, max_det: int) -> np.ndarray:
    """raw [4+nc,A] -> the max_det best rows [n,6], in no order; NaN counts as best, so that `select` sees it.

    The choice is that of the end2end graph (ultralytics/nn/modules/head.py Detect.get_topk_index, 8.4.190): the
    anchors with the best class score, then the best anchor-class pairs of those. So one anchor can give two classes.
    """
    scores = output[4:]
    n = min(max_det, scores.shape[1])
    if not n:
        return np.zeros((0, 6), np.float32)
    best = scores.max(axis=0)
    _check_scores(best.min(), best.max())
    anchors = top(best, n)
    chosen = scores[:, anchors].ravel()
    pairs = top(chosen, n)
    classes, columns = np.divmod(pairs, n)
    x1, y1, x2, y2 = corners(output[:4, anchors[columns]])
    return np.stack([x1, y1, x2, y2, chosen[pairs], classes.astype(np.float32)], axis=1)


def corners(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows cx, cy, w, h [4,n] -> x1, y1, x2, y2."""
    cx, cy, w, h = boxes
    half_w, half_h = w / 2, h / 2
    return cx - half_w, cy - half_h, cx + half_w, cy + half_h


def top(values: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest of a flat array, in no order; NumPy sorts NaN above all numbers."""
    n_rest = len(values) - n
    return np.argpartition(values, n_rest)[n_rest:]


def results(
    image_id: int,
    detections: np.ndarray,
    placement: Placement,
    category_ids: Sequence[int | None] = tuple(CATEGORY_IDS),
) -> list[dict[str, Any]]:
    """Detections [n,6] of `select` -> rows of COCO's results format, without those of classes that have no category.

    Boxes are rounded to 3 decimals of a pixel; scores keep every bit, as rounding would make ties and move the AP.
    """
    boxes = np.round(undo(detections[:, :4], placement), 3).tolist()
    scores = detections[:, 4].tolist()
    classes = detections[:, 5].astype(int).tolist()
    rows = []
    for box, score, index in zip(boxes, scores, classes, strict=True):
        category_id = category_ids[index]
        if category_id is not None:
            rows.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return rows
