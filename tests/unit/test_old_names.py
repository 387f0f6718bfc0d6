"""A run from before files were called baseline and baseline-fp16, and drawn shapes so, has the names of today."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.coco.dataset import BUILTIN_TITLE
from app.core.config import load
from app.core.run import RunRoot
from app.report.compare import pair_up
from app.report.evidence import gather
from app.report.report import report
from tests.support.drawn import kept_figures
from tests.support.markdown_tables import row
from tests.support.report_fixtures import SHA, build_run, edit, export_file, metrics, write

HALF = "net-baseline-fp16.onnx"


def add_half(run: RunRoot, label: str, folder: str) -> None:
    """The same weights in FP16, exported and scored."""
    export_file(run, label, HALF, SHA["fp16 checkpoint"])
    write(run.root / folder / "metrics.json", metrics(label, HALF, SHA["qat"], 0.4320, 4_600_000))


@pytest.fixture
def old(tmp_path: Path) -> RunRoot:
    run = build_run(tmp_path, "old")
    add_half(run, "fp16-half", "baseline-half-coco")
    edit(run.onnx_dir / "net-baseline-fp32.json", "label", "fp16")
    edit(run.root / "baseline-coco/metrics.json", "model.label", "fp16")
    for path in run.root.glob("*-coco/metrics.json"):
        edit(path, "dataset.title", "built-in coco-subset")
    edit(run.provenance, "title", "built-in coco-subset")
    return run


@pytest.fixture
def new(tmp_path: Path) -> RunRoot:
    run = build_run(tmp_path, "new")
    add_half(run, "baseline-fp16", "baseline-fp16-coco")
    return run


def test_nothing_is_missed_in_an_old_run(old: RunRoot) -> None:
    assert gather(old).missing == []


def test_an_older_best_checkpoint_is_seen_under_the_old_label(old: RunRoot) -> None:
    edit(old.onnx_dir / "net-baseline-fp32.json", "checkpoint_sha256", "0" * 64)
    assert gather(old).missing == [
        "export: net-baseline-fp32.onnx is not of the best checkpoint of now: run 'make export'"
    ]


def test_page_of_an_old_run(old: RunRoot) -> None:
    with kept_figures():
        report(load("qat"), old)
    text = old.summary.read_text()
    assert row(text, "baseline", "AP", "file") == ["0.4321", "net-baseline-fp32.onnx"]
    assert row(text, "baseline-fp16", "AP", "file") == ["0.4320", HALF]
    assert row(text, "AP50", "baseline", "baseline-fp16", "qat-w4a16") == ["0.6321", "0.6320", "0.6198"]
    assert "half" not in text.replace("baseline-half-coco/", "")  # where its files are
    assert "coco-subset" not in text and f"{BUILTIN_TITLE}, val2017" in text


def test_a_file_scored_again_under_its_new_name_is_one_row(old: RunRoot) -> None:
    add_half(old, "baseline-fp16", "baseline-fp16-coco")
    assert [metrics["dir"] for metrics in gather(old).scored] == [
        "baseline-coco", "baseline-fp16-coco", "qat-w4a16-coco",
    ]  # fmt: skip


def test_names_are_explained_once(new: RunRoot) -> None:
    with kept_figures():
        report(load("qat"), new)
    assert new.summary.read_text().count("`fp16` is the training, `baseline` its ONNX file") == 1


def test_an_old_run_is_compared_with_a_new_one(old: RunRoot, new: RunRoot) -> None:
    for run in (old, new):
        for path in run.root.glob("*-coco/metrics.json"):
            edit(path, "dataset.coco_dir", "/nowhere")
            edit(path, "dataset.image_ids", None)
    labels = [[metrics["model"]["label"] for metrics in pair] for pair in pair_up(old.root, new.root)]
    assert labels == [
        ["baseline (old)", "baseline (new)"],
        ["baseline-fp16 (old)", "baseline-fp16 (new)"],
        ["qat-w4a16 (old)", "qat-w4a16 (new)"],
    ]
