"""What stands on either side of the network: image file -> input array, output array -> rows of COCO results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.coco import CATEGORY_IDS
from app.config import Eval, UserError

PAD_VALUE = 114
# For contract nms, as `yolo val` does it (ultralytics/utils/nms.py and cfg/default.yaml, 8.4.190).
NMS_IOU = 0.7
N_NMS_CANDIDATES = 30_000
JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class Placement:
    """Where an image of width x height px lies inside the square input: its new size and the left and top padding."""

    width: int
    height: int
    new_width: int
    new_height: int
    left: int
    top: int


def read_image(path: Path) -> np.ndarray:
    """Image file -> uint8 [H,W,3] BGR, rotated as its EXIF says (COCO's sizes are those after the rotation).

    Raises:
        UserError: missing, unreadable or truncated (OpenCV would fill the missing part of a JPEG with grey).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror}): restore the file") from error
    truncated = path.suffix.lower() in (".jpg", ".jpeg") and JPEG_END not in data[-64:]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data and not truncated else None
    if image is None:
        raise UserError(f"image {path} {'is truncated' if truncated else 'cannot be decoded'}: restore the file")
    return image


def place(width: int, height: int, imgsz: int) -> Placement:
    """Long side to imgsz, small images scaled up, centred; an odd pixel of padding goes right or below.

    The rounding is that of Ultralytics 8.4.190 in validation (data/base.py load_image, then LetterBox with
    scaleup=False in data/augment.py): sizes round up, so no side vanishes.
    """
    ratio = imgsz / max(width, height)
    new_width, new_height = min(math.ceil(width * ratio), imgsz), min(math.ceil(height * ratio), imgsz)
    return Placement(width, height, new_width, new_height, (imgsz - new_width) // 2, (imgsz - new_height) // 2)


def letterbox(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Placement]:
    """uint8 [H,W,3] BGR -> network input float32 [3,imgsz,imgsz] RGB 0..1, and where the image lies in it."""
    height, width = image.shape[:2]
    p = place(width, height, imgsz)
    if (p.new_width, p.new_height) != (width, height):
        image = cv2.resize(image, (p.new_width, p.new_height), interpolation=cv2.INTER_LINEAR)
    array = np.full((3, imgsz, imgsz), PAD_VALUE / np.float32(255), np.float32)
    inside = array[:, p.top : p.top + p.new_height, p.left : p.left + p.new_width]
    for channel in range(3):
        np.divide(image[:, :, 2 - channel], np.float32(255), out=inside[channel])
    return array, p


def undo(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes [n,4] x1,y1,x2,y2 in input px -> x,y,w,h in image px, clipped to the image, float64."""
    p = placement
    gain = np.array([p.new_width / p.width, p.new_height / p.height] * 2)
    corners = (boxes.astype(np.float64) - [p.left, p.top, p.left, p.top]) / gain
    corners = corners.clip(0, [p.width, p.height, p.width, p.height])
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def select(output: np.ndarray, contract: str, settings: Eval) -> np.ndarray:
    """One image's output -> detections [n,6] x1,y1,x2,y2 (input px), score, class; best first, scores above conf.

    Args:
        output: raw and nms [84,A] or end2end [K,6], as the contract says.
        contract: 'raw', 'end2end' or 'nms'.
        settings: scores up to `conf` are dropped, at most `max_det` rows are kept.

    Raises:
        UserError: the output holds NaN or infinite values.
    """
    if contract == "end2end":
        rows = output
    else:
        rows = raw_rows(output, settings.max_det) if contract == "raw" else suppressed_rows(output, settings.conf)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[: settings.max_det]]
    if not np.isfinite(rows).all():
        raise UserError("the model puts out values that are not finite: it is damaged or its precision overflows")
    return rows[rows[:, 4] > settings.conf]


def suppressed_rows(output: np.ndarray, conf: float) -> np.ndarray:
    """raw layout [84,A] of a one2many head -> rows [n,6] after non-maximum suppression within each class.

    An anchor counts once for every class above `conf`, as in `yolo val` (multi_label).
    """
    if not np.isfinite(output).all():
        return np.full((1, 6), np.nan, np.float32)  # `select` names the fault
    classes, anchors = np.nonzero(output[4:] > conf)
    scores = output[4:][classes, anchors]
    best = np.argsort(-scores, kind="stable")[:N_NMS_CANDIDATES]
    classes, anchors, scores = classes[best], anchors[best], scores[best]
    cx, cy, w, h = output[:4, anchors]
    xywh = np.stack([cx - w / 2, cy - h / 2, w, h], axis=1).astype(np.float64)
    suppress: Any = cv2.dnn.NMSBoxesBatched  # takes arrays, whatever OpenCV's stubs say
    kept = np.array(suppress(xywh, scores, classes.astype(np.int32), conf, NMS_IOU), dtype=int)
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=1)
    return np.concatenate([corners, scores[:, None], classes[:, None]], axis=1, dtype=np.float32)[kept]


def raw_rows(output: np.ndarray, max_det: int) -> np.ndarray:
    """raw [84,A] -> the max_det best rows [n,6], in no order; NaN counts as best so that nobody misses it.

    The choice is that of the end2end graph (ultralytics/nn/modules/head.py Detect.get_topk_index, 8.4.190): the
    anchors with the best class score, then the best anchor-class pairs of those. So one anchor can give two classes.
    """
    scores = output[4:]
    n = min(max_det, scores.shape[1])
    anchors = top(scores.max(axis=0), n)
    chosen = scores[:, anchors]
    pairs = top(chosen.ravel(), n)
    classes, columns = np.divmod(pairs, n)
    cx, cy, w, h = output[:4, anchors[columns]]
    corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    return np.stack([*corners, chosen.ravel()[pairs], classes.astype(np.float32)], axis=1)


def top(values: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest of a flat array, in no order; NumPy sorts NaN above all numbers."""
    return np.argpartition(values, len(values) - n)[len(values) - n :]


def results(image_id: int, detections: np.ndarray, placement: Placement) -> list[dict[str, Any]]:
    """Detections [n,6] of `select` -> rows of COCO's results format.

    Boxes are rounded to 3 decimals of a pixel; scores keep every bit, as rounding would make ties and move the AP.
    """
    boxes = np.round(undo(detections[:, :4], placement), 3).tolist()
    scores, classes = detections[:, 4].tolist(), detections[:, 5].astype(int).tolist()
    return [
        {"image_id": image_id, "category_id": CATEGORY_IDS[index], "bbox": box, "score": score}
        for box, score, index in zip(boxes, scores, classes, strict=True)
    ]
