"""The whole job, stage by stage, on a dataset with every oddity at once."""

from __future__ import annotations

from pathlib import Path

from app.core.config import load
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.eval.evaluate import evaluate
from app.export.export import export
from app.report.report import report
from app.train.ptq import ptq
from app.train.train import train
from tests.support.drawn import kept_figures
from tests.support.every_oddity import IMAGES, draw_every_oddity
from tests.support.export_run import TINY, network
from tests.support.settle import sets_of

SETTINGS = {
    "train.batch": 6, "train.epochs": 1, "hyp.nbs": 6, "eval.provider": "cpu", "eval.latency_warmup": 0,
    "eval.latency_runs": 1, "report.gallery_images": 20,
}  # fmt: skip


def test_every_stage_takes_every_image(tmp_path: Path) -> None:
    coco_dir = tmp_path / "l'été: my data"
    draw_every_oddity(coco_dir)
    run = RunRoot(tmp_path / "runs", "odd")
    sets = sets_of({**SETTINGS, "data.coco_dir": str(coco_dir)})
    with network(TINY), kept_figures():
        prepare(load("fp16", sets=sets), run, force=False)
        for variant in ("fp16", "qat"):
            train(load(variant, sets=sets), run, force=False)
        config = load("qat", sets=sets)
        ptq(config, run, force=False)
        export(config, run, force=False)
        evaluate(config, run, force=False)
        report(config, run)
    splits = read_json(run.provenance, "data")["splits"]
    assert [(split["n_images"], split["n_broken"]) for split in splits.values()] == [(len(IMAGES), 0)] * 2
    metrics = list(run.root.glob("*-coco/metrics.json"))
    assert len(metrics) == 6
    assert all(read_json(path, "eval")["dataset"]["n_images"] == len(IMAGES) for path in metrics)
    page = run.summary.read_text(encoding="utf-8")
    assert "Left out: precision over recall" not in page
    assert "<b>bold" not in page
