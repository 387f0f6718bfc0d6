"""`yolo val` of Ultralytics on one ONNX file, timed, or with its detections kept: python -m app.bench.stock_val FOLDER.

FOLDER holds val.json (the arguments) and coco.yaml; val-result.json is written beside them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator

from app.core.files import write_json


class Recorder(DetectionValidator):
    """Keeps every detection as a row of COCO's results, unrounded, with the file name in place of the image id."""

    rows: list[dict[str, Any]]
    category_ids: list[int]  # of the classes

    def init_metrics(self, model: torch.nn.Module) -> None:
        super().init_metrics(model)
        Recorder.rows = []

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        super().update_metrics(preds, batch)
        for index, pred in enumerate(preds):
            file_name = Path(batch["im_file"][index]).name
            scaled = self.scale_preds(pred, self._prepare_batch(index, batch))
            corners = scaled["bboxes"].double()
            sizes = corners[:, 2:] - corners[:, :2]
            boxes = torch.cat([corners[:, :2], sizes], 1).tolist()
            scores, classes = scaled["conf"].tolist(), scaled["cls"].int().tolist()
            for box, score, class_index in zip(boxes, scores, classes, strict=True):
                category_id = Recorder.category_ids[class_index]
                Recorder.rows.append({"file": file_name, "category_id": category_id, "bbox": box, "score": score})


def main(folder: Path) -> None:
    """Times model.val() from the loaded libraries on: its own file loading, decoding, inference and scoring."""
    given = json.loads((folder / "val.json").read_text(encoding="utf-8"))
    arguments = given["arguments"] | {"data": str(folder / "coco.yaml"), "project": str(folder), "exist_ok": True}
    model = YOLO(given["onnx"], task="detect")
    Recorder.category_ids = given["category_ids"]
    validator = Recorder if given["record"] else None
    start = time.perf_counter()
    metrics: Any = model.val(validator=validator, plots=False, verbose=False, **arguments)
    total_s = time.perf_counter() - start
    result = {
        "AP": metrics.box.map,
        "AP50": metrics.box.map50,
        "total_s": total_s,
        "session_s": metrics.speed["inference"] * given["n_images"] / 1e3,
        "rows": Recorder.rows if given["record"] else None,
    }
    write_json(folder / "val-result.json", result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
