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

from app.coco.annotations import CATEGORY_IDS
from app.core.files import write_json


class Recorder(DetectionValidator):
    """Keeps every detection as a row of COCO's results, unrounded, with the file name in place of the image id."""

    rows: list[dict[str, Any]]

    def init_metrics(self, model: torch.nn.Module) -> None:
        super().init_metrics(model)
        Recorder.rows = []

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        super().update_metrics(preds, batch)
        for i, pred in enumerate(preds):
            scaled = self.scale_preds(pred, self._prepare_batch(i, batch))
            boxes = scaled["bboxes"].double()
            xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
            for box, score, index in zip(xywh, scaled["conf"].tolist(), scaled["cls"].int().tolist(), strict=True):
                row = {"file": Path(batch["im_file"][i]).name, "category_id": CATEGORY_IDS[index]}
                Recorder.rows.append(row | {"bbox": box, "score": score})


def main(folder: Path) -> None:
    """Times model.val() from the loaded libraries on: its own file loading, decoding, inference and scoring."""
    given = json.loads((folder / "val.json").read_text(encoding="utf-8"))
    arguments = given["arguments"] | {"data": str(folder / "coco.yaml"), "project": str(folder), "exist_ok": True}
    model = YOLO(given["onnx"], task="detect")
    start = time.perf_counter()
    metrics: Any = model.val(validator=Recorder if given["record"] else None, plots=False, verbose=False, **arguments)
    total_s = time.perf_counter() - start
    session_s = metrics.speed["inference"] * given["n_images"] / 1e3
    result = {"AP": metrics.box.map, "AP50": metrics.box.map50, "total_s": total_s, "session_s": session_s}
    write_json(folder / "val-result.json", result | {"rows": Recorder.rows if given["record"] else None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
