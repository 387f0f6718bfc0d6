"""The job on a dataset of its own classes, in four layouts: one network, one file, one AP; names reach every page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from app.bench.soak import differences
from app.coco.score import standalone_dataset
from app.core.config import Config, UserError, load
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.eval.evaluate import evaluate, evaluate_standalone
from app.export.export import export
from app.export.trace import one_head
from app.quant.model import load_checkpoint, load_scored
from app.report.compare import compare
from app.report.publish import publish
from app.report.report import report
from app.report.tables import plain
from app.train.ptq import bn_images
from app.train.train import train
from tests.support.drawn import kept_figures
from tests.support.export_run import TINY, network
from tests.support.layouts import LAYOUTS, NAMES, draw_base
from tests.support.settle import sets_of

SETTINGS = {
    "train.imgsz": 64, "train.batch": 4, "train.epochs": 1, "hyp.nbs": 4, "eval.provider": "cpu",
    "eval.latency_warmup": 0, "eval.latency_runs": 1, "report.gallery_images": 2, "eval.conf": 0.0,
}  # fmt: skip
OTHER = "roboflow"  # the layout in which most is written otherwise


def config_of(coco_dir: Path, variant: str) -> Config:
    return load(variant, sets=sets_of({**SETTINGS, "data.coco_dir": str(coco_dir)}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRoot]:
    """Runs with a trained baseline, the first with all stages up to eval; beside them the dataset in all layouts."""
    folder = tmp_path_factory.mktemp("own")
    base = draw_base(folder / "base", n_train=8, n_val=2)
    runs = {}
    with network(TINY):
        for name, write in LAYOUTS.items():
            write(base, folder / name)
        for name in ("coco", OTHER):
            coco_dir, run = folder / name, RunRoot(folder / "runs", name)
            runs[name] = run
            config = config_of(coco_dir, "fp16")
            prepare(config, run, force=False)
            train(config, run, force=False)
        run, config = runs["coco"], config_of(folder / "coco", "qat")
        train(config, run, force=False)
        export(config, run, force=False)
        evaluate(config, run, force=False)
    return runs


def detections_in(folder: Path) -> list[Any]:
    """Score and box of every detection, and the place of its image and class among all."""
    rows = read_json(folder / "detections.json", "eval")
    images, categories = (sorted({row[key] for row in rows}) for key in ("image_id", "category_id"))
    return [
        (images.index(row["image_id"]), categories.index(row["category_id"]), row["bbox"], row["score"]) for row in rows
    ]


def test_another_layout_gives_the_same_weights(runs: dict[str, RunRoot]) -> None:
    """To the last bit; tests/unit/test_layouts.py shows for all of them that the network sees the same."""
    ours, theirs = (
        load_checkpoint(runs[layout].variant_dir("fp16") / "weights" / "last.pt") for layout in ("coco", OTHER)
    )
    del ours["config"], theirs["config"]  # they name the place
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_numbers_for_a_file(runs: dict[str, RunRoot], tmp_path: Path, name: str) -> None:
    run = runs["coco"]
    (path,) = run.onnx_dir.glob("*-baseline-fp32.onnx")
    coco_dir = run.runs_dir.parent / name
    metrics = evaluate_standalone(config_of(coco_dir, "qat"), path, standalone_dataset(coco_dir, None), tmp_path)
    detections = detections_in(run.root / "baseline-coco")
    assert {category for _, category, _, _ in detections} == set(range(len(NAMES)))
    assert detections_in(tmp_path) == detections
    assert metrics["coco"] == read_json(run.root / "baseline-coco" / "metrics.json", "eval")["coco"]
    assert metrics["dataset"]["title"] == "own dataset, 5 classes"


def test_number_and_names_of_classes_reach_the_file(runs: dict[str, RunRoot]) -> None:
    run = runs["coco"]
    with network(TINY):
        model, _, checkpoint = load_scored(run.best("fp16"))
    assert checkpoint["names"] == NAMES
    assert list(model.names.values()) == NAMES
    (path,) = run.onnx_dir.glob("*-baseline-fp32.onnx")
    graph = onnx.load(path)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(facts["names"]) == NAMES
    assert [size.dim_value for size in graph.graph.output[0].type.tensor_type.shape.dim][1] == 4 + len(NAMES)
    assert read_json(path.with_suffix(".json"), "export")["n_classes"] == len(NAMES)


def test_every_stage_takes_the_network(runs: dict[str, RunRoot], tmp_path: Path) -> None:
    """QAT, report, comparison and publication; the classes of the page are those of the file."""
    run = runs["coco"]
    config = config_of(tmp_path, "qat")
    with kept_figures() as figures:
        report(config, run)
        compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", tmp_path / "out", config.report)
    publish(run, "own classes", force=False)
    assert {path.parent.name for path in run.root.glob("*-coco/metrics.json")} == {
        "baseline-coco", "baseline-fp16-coco", "qat-w4a16-coco", "qat-w4a16-int4-coco",
    }  # fmt: skip
    page = run.summary.read_text(encoding="utf-8")
    assert "own dataset, 5 classes" in page
    assert "5 classes: hex bolt, nut, washer &lt;b>\\|$M_5$, Öse 中, o-ring." in page
    assert "Left out: precision over recall" not in page
    analysis = read_json(run.figures_dir / "analysis.json", "report")
    scored = analysis["variants"]["baseline-coco"]["ap_by_class"].keys()
    assert scored
    assert scored <= set(NAMES)
    table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert all(f"| {plain(name)} " in table for name in scored)
    assert "person" not in page + table
    gallery = figures["gallery-qat-w4a16-coco.jpg"]
    drawn = {text.get_text().rpartition(" 0.")[0] or text.get_text() for axes in gallery.axes for text in axes.texts}
    assert drawn <= {*(name.replace("$", r"\$") for name in NAMES), "hex bolt crowd"}


def test_files_of_other_classes_are_told(runs: dict[str, RunRoot], tmp_path: Path) -> None:
    """A run whose data were replaced by others after its training."""
    run = RunRoot(tmp_path / "runs", "r")
    base = draw_base(tmp_path / "base", n_train=4, n_val=2)
    for file in (base / "annotations").iterdir():
        tree = json.loads(file.read_text())
        tree["categories"][0]["name"] = "screw"
        file.write_text(json.dumps(tree))
    with network(TINY):
        prepare(config_of(base, "fp16"), run, force=False)
        for path in runs["coco"].onnx_dir.glob("*-baseline-fp32.*"):
            (run.onnx_dir / path.name).parent.mkdir(exist_ok=True)
            (run.onnx_dir / path.name).write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=r"only there 'hex bolt'; only in the annotations 'screw'"):
            evaluate(config_of(base, "qat"), run, force=False)


def test_one_class(tmp_path: Path) -> None:
    base = draw_base(tmp_path / "base", n_train=4, n_val=2)
    for file in (base / "annotations").iterdir():
        tree = json.loads(file.read_text())
        tree["categories"] = [{"id": 0, "name": "part", "supercategory": "none"}]
        for annotation in tree["annotations"]:
            annotation["category_id"] = 0
        file.write_text(json.dumps(tree))
    run, config = RunRoot(tmp_path / "runs", "r"), config_of(base, "fp16")
    with network(TINY):
        prepare(config, run, force=False)
        train(config, run, force=False)
        model, _, _ = load_scored(run.best("fp16"))
        boxes_and_scores = one_head(model, "raw")(torch.zeros(1, 3, 64, 64))
    assert tuple(boxes_and_scores.shape) == (1, 4 + 1, 84)  # 8 x 8, 4 x 4 and 2 x 2 cells
    assert len(bn_images(config, run, 0).after(0)) == 1  # what ptq reads
