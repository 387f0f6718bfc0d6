"""YOLOv10m, the network of the full run; `make smoke` runs YOLOv10n. All six sizes: see runs/LOG.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.config import load
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.export.export import export
from app.train.train import train

SETS = [
    "model=yolov10m.yaml", "data.coco_dir=coco-subset", "data.n_train=2", "data.n_val=1", "train.imgsz=64",
    "train.batch=2", "train.epochs=1", "train.device=cpu", "train.workers=0", "train.bn_batches=1", "hyp.mosaic=0",
    "hyp.close_mosaic=0", "export.optimize=false",
]  # fmt: skip


def test_yolov10m_goes_through_training_and_export(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)  # figures stay empty, a second less each
    run = RunRoot(runs_dir, "m")
    config = load("qat", sets=SETS)
    prepare(config, run, force=False)
    train(config, run, force=False)
    export(config, run, force=False)
    record = read_json(run.onnx_dir / "yolov10m-w4a16-int4-qat.json", "export")
    assert record["gates"].keys() >= {"codes", "bit_equal", "parity"}
    assert record["model"] == "yolov10m"
