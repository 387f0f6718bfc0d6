"""The report of a val split without objects, and of images of extreme shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from app.core.config import load
from app.core.files import sha256
from app.report.gallery import gallery_figure
from app.report.report import report
from tests.support.report_fixtures import add_dataset, build_run, edit, write


def test_a_split_without_objects_has_a_report(tmp_path: Path) -> None:
    """An old run, or one from elsewhere: `data` refuses such a dataset."""
    run = build_run(tmp_path / "runs")
    add_dataset(run, tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_val2017.json"
    write(file, json.loads(file.read_text()) | {"annotations": []})
    edit(run.provenance, "splits.val.annotation_sha256", sha256(file))
    for name in ("baseline-coco", "qat-w4a16-coco"):
        path = run.root / name / "metrics.json"
        tree = json.loads(path.read_text())
        tree["coco"] = dict.fromkeys(tree["coco"])
        tree["dataset"]["annotation_sha256"] = sha256(file)
        write(path, tree)
    report(load("qat", sets=["report.gallery_images=2"]), run)
    assert "no verdict**, AP -: the images have no object that counts (small set" in run.summary.read_text()
    assert json.loads((run.root / "figures/analysis.json").read_text())


@pytest.mark.parametrize("shape", [(1, 500), (3, 30_000), (500, 1)])
def test_a_row_of_the_gallery_is_never_higher_than_a_picture_may_be(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", shape).save(path)
    rows = [{"image_id": 1, "why": "random", "f1_difference": 0.0}]
    figure = gallery_figure(rows, {1: path}, {"ground truth": {1: []}, "a": {1: []}, "b": {1: []}}, {})
    assert figure.get_figheight() < 12
