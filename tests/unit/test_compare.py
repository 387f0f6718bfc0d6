"""Compare: pairs of scored folders, what may stand side by side, and what the page says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.coco.dataset import Dataset
from app.core.config import Config, Report, UserError, load
from app.core.files import sha256
from app.core.run import RunRoot
from app.report.compare import compare, pair_up
from app.report.report import report
from tests.support.drawn import kept_figures
from tests.support.report_fixtures import add_dataset, build_run, edit, score_detections, write


@pytest.fixture
def run(tmp_path: Path) -> RunRoot:
    run = build_run(tmp_path / "runs")
    add_dataset(run, tmp_path / "coco")
    return run


def settings_of_all() -> Config:
    return load("qat", sets=["report.gallery_images=1"])


def settings() -> Report:
    return settings_of_all().report


def row(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with this cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return next(cells for cells in lines if cells[0] == first)


def test_two_folders_of_a_run(run: RunRoot, tmp_path: Path) -> None:
    """The quantized model lost the object of image 1 (person) and found that of image 2 (car)."""
    compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", tmp_path / "out", settings())
    text = (tmp_path / "out" / "compare.md").read_text()
    assert row(text, "class") == ["class", "baseline", "qat-w4a16", "difference"]
    assert row(text, "person") == ["person", "1.0000", f"{51 / 101:.4f}", f"{51 / 101 - 1:+.4f}"]
    assert row(text, "car") == ["car", "0.0000", "1.0000", "+1.0000"]
    assert row(text, "AP")[1:] == ["0.5000", f"{(1 + 51 / 101) / 2:.4f}", f"{51 / 202:+.4f}"]
    assert {"AP_small", "AP_medium", "AP_large"} <= {
        line.split("|")[1].strip() for line in text.splitlines() if "|" in line
    }
    assert row(text, "1") == ["1", "largest loss", "1.00", "0.00", "-1.00"]
    assert row(text, "2") == ["2", "largest gain", "0.00", "1.00", "+1.00"]
    for name in ("sizes.png", "classes-qat-w4a16-coco.png", "gallery-qat-w4a16-coco.jpg"):
        assert (tmp_path / "out" / "figures" / name).stat().st_size > 0
        assert f'src="figures/{name}"' in text
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [m["dir"] for m in saved["rows"]] == ["baseline-coco", "qat-w4a16-coco"]


def test_two_runs_are_paired_by_folder_and_told_apart(
    run: RunRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = RunRoot(run.runs_dir, "other")
    shutil.copytree(run.root, other.root)
    shutil.copy(run.root / "qat-w4a16-coco" / "detections.json", other.root / "baseline-coco" / "detections.json")
    shutil.copy(run.root / "qat-w4a16-coco" / "metrics.json", other.root / "baseline-coco" / "metrics.json")
    shutil.rmtree(other.root / "qat-w4a16-coco")
    caplog.set_level("INFO")
    with kept_figures():
        compare(run.root, other.root, tmp_path / "out", settings())
    assert "compare: qat-w4a16-coco is in one of them only, left out" in caplog.messages
    text = (tmp_path / "out" / "compare.md").read_text()
    assert row(text, "class") == ["class", "baseline", "qat-w4a16", "difference"]
    assert row(text, "1")[-1] == "-1.00"
    shutil.copytree(run.root, other.root, dirs_exist_ok=True)
    pairs = pair_up(run.root, other.root)
    assert [(a["model"]["label"], b["model"]["label"]) for a, b in pairs] == [
        ("baseline (small)", "baseline (other)"),
        ("qat-w4a16 (small)", "qat-w4a16 (other)"),
    ]
    assert [m["dir"] for pair in pairs for m in pair] == [
        f"{side}-{name}-coco" for name in ("baseline", "qat-w4a16") for side in ("left", "right")
    ]
    with pytest.raises(UserError, match="is compared with itself"):
        pair_up(run.root, run.root)


def test_repacked_files_are_in_the_table_alone(run: RunRoot, tmp_path: Path) -> None:
    """An INT4 file has the weights of the QCDQ file: neither analysis nor pictures, unless nothing else is compared."""
    shutil.copytree(run.root / "qat-w4a16-coco", run.root / "qat-w4a16-int4-coco")
    edit(run.root / "qat-w4a16-int4-coco/metrics.json", "model.label", "qat-w4a16-int4")
    other = RunRoot(run.runs_dir, "other")
    shutil.copytree(run.root, other.root)
    compare(run.root, other.root, tmp_path / "out", settings())
    text = (tmp_path / "out/compare.md").read_text()
    assert "| qat-w4a16-int4 (small) | qat-w4a16-int4 (other) |" in text, "its numbers are there"
    assert "## qat-w4a16 (small) and" in text and "## qat-w4a16-int4" not in text
    assert not list((tmp_path / "out/figures").glob("*int4*"))
    saved = json.loads((tmp_path / "out/compare.json").read_text())
    assert len(saved["rows"]) == 6 and len(saved["analysis"]["variants"]) == 4
    folders = (each.root / "qat-w4a16-int4-coco" for each in (run, other))
    compare(*folders, tmp_path / "alone", settings())
    assert "## qat-w4a16-int4 (small) and" in (tmp_path / "alone/compare.md").read_text()


def test_the_runs_of_a_sweep_are_named(run: RunRoot, tmp_path: Path) -> None:
    write(run.runs_dir / "s/sweep.json", {"runs": {"s-seed0": 0, "s-seed2": 2}})
    named = r"s is a sweep: name one of its runs \(.*runs/s-seed0, .*runs/s-seed2\)"
    with pytest.raises(UserError, match=named):
        compare(run.runs_dir / "s", run.root, tmp_path / "out", settings())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"conf": 0.25}}, "conf 0.001 and 0.25"),
        ({"settings": {"evaluator": "another"}}, "evaluator onnxruntime"),
        ({"dataset": {"image_ids_sha256": "0" * 64}}, "images .* and 000000000000"),
        ({"model": {"imgsz": 320}}, "imgsz 64 and 320"),
    ],
)
def test_rows_measured_differently_are_refused(run: RunRoot, tmp_path: Path, change: dict, named: str) -> None:
    path = run.root / "qat-w4a16-coco" / "metrics.json"
    tree = json.loads(path.read_text())
    for section, values in change.items():
        tree[section] |= values
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"measured differently \\({named}"):
        compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_has_moved_is_found_by_its_setting(run: RunRoot, tmp_path: Path) -> None:
    (tmp_path / "coco").rename(tmp_path / "moved")
    folders = (run.root / "baseline-coco", run.root / "qat-w4a16-coco")
    with pytest.raises(UserError, match=r"coco/annotations/.* is missing or has changed: .* give the COCO_DIR=path"):
        compare(*folders, tmp_path / "out", settings())
    compare(*folders, tmp_path / "out", settings(), str(tmp_path / "moved"))
    assert (tmp_path / "out" / "figures" / "gallery-qat-w4a16-coco.jpg").exists()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "moved").rename(tmp_path / ".cache" / "coco")  # where the built-in dataset lies, beside the runs
    compare(*folders, tmp_path / "out", settings())
    (tmp_path / ".cache" / "coco").rename(tmp_path / "moved")
    annotations = tmp_path / "moved" / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text() + " ")
    with pytest.raises(UserError, match=r"moved/annotations/.* is missing or has changed"):
        compare(*folders, tmp_path / "out", settings(), str(tmp_path / "moved"))


def test_what_is_not_there_is_named(run: RunRoot, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither metrics"):
        compare(run.root, tmp_path / "nowhere", tmp_path / "out", settings())
    path = run.root / "baseline-coco" / "metrics.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "latency_ms"})
    )
    with pytest.raises(UserError, match=r"lacks latency_ms\.p50"):
        compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", tmp_path / "out", settings())


def test_detections_of_a_category_that_is_not_listed_are_not_drawn(run: RunRoot, tmp_path: Path) -> None:
    """A network of 80 classes on annotations that list two of them: what is not scored is not drawn either."""
    file = tmp_path / "coco/annotations/instances_val2017.json"
    tree = json.loads(file.read_text())
    tree["categories"] = [category for category in tree["categories"] if category["id"] in (1, 3)]
    file.write_text(json.dumps(tree))
    dog = {"image_id": 1, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.99}
    for name in ("baseline-coco", "qat-w4a16-coco"):
        folder = run.root / name
        rows = json.loads((folder / "detections.json").read_text())
        score_detections(folder, [*rows, dog], Dataset(tmp_path / "coco", "val2017", None, "small set"))
    with kept_figures() as figures:
        compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", tmp_path / "out", settings())
    texts = [text.get_text() for axes in figures["gallery-qat-w4a16-coco.jpg"].axes for text in axes.texts]
    assert sorted(set(texts)) == ["car", "car 0.62", "person", "person 0.56", "person 0.75"]
    edit(run.provenance, "splits.val.annotation_sha256", sha256(file))
    report(settings_of_all(), run)
    assert "Left out" not in run.summary.read_text()
