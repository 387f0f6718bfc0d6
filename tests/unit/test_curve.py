"""The curve: AP over bytes of several schemes, worked by hand, on the page, in the picture, and published."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from app.coco.dataset import BUILTIN_TITLE
from app.core.config import load
from app.core.run import RunRoot, runs_of
from app.report.compare import pair_up
from app.report.curve import QAT, SIDE_BY_SIDE, curve, curve_figure, places_of, spread
from app.report.evidence import gather
from app.report.figures import by_size
from app.report.findings import derive, enter_seeds
from app.report.page_files import page_of
from app.report.publish import publish
from app.report.report import next_step, report
from app.report.spread import ratio_of_pairs
from tests.support.drawn import kept_figures, x_of, y_of
from tests.support.page_numbers import numbers_without_source
from tests.support.report_fixtures import SHA, add_ptq, build_run, edit, layer, metrics, write

BASE = (0.40, 0.50, 0.60)
W4 = (0.36, 0.45, 0.51)
W8 = (0.40, 0.49, 0.61)


def add_scores(run: RunRoot, label: str, ap: float, size_bytes: int) -> None:
    write(run.root / f"{label}-coco/metrics.json", metrics(label, f"net-{label}.onnx", SHA["qat"], ap, size_bytes))


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRoot]:
    """Three seeds of FP16, w4a16 (QCDQ and INT4) and w8a16, which has no INT4 file; PTQ of w4a16 in the first."""
    made = []
    for seed, (base, w4, w8) in enumerate(zip(BASE, W4, W8, strict=True)):
        run = build_run(tmp_path, f"s-seed{seed}", seed)
        edit(run.root / "baseline-coco/metrics.json", "coco.AP", base)
        edit(run.root / "qat-w4a16-coco/metrics.json", "coco.AP", w4)
        add_scores(run, "baseline-fp16", base, 4_700_000)
        add_scores(run, "qat-w4a16-int4", w4, 1_500_000)
        add_scores(run, "qat-w8a16", w8, 2_700_000)
        quant_config = {"scheme": "w8a16", "layers": [layer("model.0.conv", 8, "")], "share_of_learned_weights": {}}
        write(run.variant_dir("qat-w8a16") / "quant_config.json", quant_config)
        made.append(run)
    add_ptq(made[0])
    write(tmp_path / "s/sweep.json", {"runs": {run.name: i for i, run in enumerate(made)}})
    return made


def test_ratio_of_pairs_by_hand() -> None:
    """1.32 / 1.50 = 0.88; residuals (0.36 - 0.352, 0.45 - 0.44, 0.51 - 0.528) / 0.5 = 0.016, 0.02, -0.036."""
    ratio = ratio_of_pairs(list(W4), list(BASE))
    assert ratio is not None and ratio.value == pytest.approx(0.88)
    assert ratio.error == pytest.approx(math.sqrt((0.016**2 + 0.02**2 + 0.036**2) / 2 / 3))
    two = ratio_of_pairs([0.2, 0.3], [0.4, 0.6])
    assert two is not None and (two.value, two.error) == (pytest.approx(0.5), None)
    assert ratio_of_pairs([], []) is None and ratio_of_pairs([1.0], [0.0]) is None
    assert ratio_of_pairs([math.nan], [1.0]) is None


def test_points_of_merged_runs(runs: list[RunRoot]) -> None:
    points = curve(list(map(gather, runs)))
    assert points is not None
    by_label = {each["label"]: each for each in points}
    assert list(by_label) == [
        "baseline", "baseline-fp16", "ptq-w4a16", "ptq-w4a16-bn", "qat-w4a16", "qat-w8a16"
    ]  # fmt: skip
    w4a16 = by_label["qat-w4a16"]
    assert w4a16["AP"] == {"s-seed0": 0.36, "s-seed1": 0.45, "s-seed2": 0.51}
    assert (w4a16["n"], w4a16["mean"], w4a16["share"]) == (3, pytest.approx(0.44), pytest.approx(0.88))
    assert (w4a16["qcdq_mb"], w4a16["int4_mb"]) == (2.663676, 1.5)
    assert (by_label["qat-w8a16"]["qcdq_mb"], by_label["qat-w8a16"]["int4_mb"]) == (2.7, 2.7)
    assert by_label["ptq-w4a16"]["int4_mb"] == 1.5, "packed it has the bytes of QAT's file"
    assert by_label["ptq-w4a16"]["share"] == pytest.approx(0.2198 / 0.40), "against the same run's baseline alone"
    assert by_label["baseline-fp16"]["int4_mb"] == 4.7


def test_packed_bytes_that_are_not_known_are_none(runs: list[RunRoot]) -> None:
    for run in runs:
        (run.root / "qat-w4a16-int4-coco/metrics.json").unlink()
    points = curve(list(map(gather, runs)))
    assert points is not None
    assert [each["int4_mb"] for each in points if each["scheme"] == "w4a16"] == [None, None, None]


def test_one_scheme_has_no_curve(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    assert curve([gather(run)]) is None
    with kept_figures() as figures:
        report(load("qat"), run)
    assert not [name for name in figures if name.startswith("curve.")]
    assert "## AP over bytes" not in run.summary.read_text()


def test_a_distilled_training_is_no_other_scheme(tmp_path: Path) -> None:
    """w4a16 trained with a teacher alone, beside PTQ, which has none."""
    run = build_run(tmp_path)
    (run.root / "qat-w4a16-coco/metrics.json").unlink()
    add_ptq(run)
    add_scores(run, "qat-w4a16-distilled", 0.4298, 2_663_676)
    add_scores(run, "qat-w4a16-distilled-int4", 0.4298, 1_500_000)
    assert curve([gather(run)]) is None
    with kept_figures():
        report(load("qat"), run)
    assert "QAT against the better PTQ: +0.0311" in run.summary.read_text()
    assert "**ptq-w4a16" not in run.summary.read_text(), "its scheme was trained"
    add_scores(run, "qat-w8a16", 0.43, 2_700_000)
    points = curve([gather(run)])
    assert points is not None
    assert [each["int4_mb"] for each in points if each["scheme"].startswith("w4a16")] == [1.5, 1.5, 1.5]


def test_the_picture_has_a_mark_for_each_seed(runs: list[RunRoot]) -> None:
    points = curve(list(map(gather, runs)))
    assert points is not None
    packed, qcdq = curve_figure(points).axes
    for panel, w4_mb in ((packed, 1.5), (qcdq, 2.663676)):
        marks = {str(line.get_label()): line for line in panel.lines}
        assert x_of(marks["QAT"]) == pytest.approx([w4_mb, 2.7])
        assert y_of(marks["QAT"]) == pytest.approx([0.44, 0.50])
        assert x_of(marks["FP32 and FP16"]) == [4.7, 9.284375]
        seeds = [line for line in panel.lines if x_of(line) == [w4_mb] * 3]
        assert [y_of(line) for line in seeds] == [list(W4)]
        assert {text.get_text() for text in panel.texts} == {"w4a16", "w8a16", "FP16", "FP32"}


def test_a_panel_without_known_bytes_is_empty(runs: list[RunRoot]) -> None:
    points = curve(list(map(gather, runs)))
    assert points is not None
    packed, qcdq = curve_figure([{**each, "int4_mb": None} for each in points]).axes
    assert not packed.lines and qcdq.lines


def test_schemes_of_equal_bytes_stand_side_by_side() -> None:
    points = [{"scheme": name, "mb": mb} for name, mb in (("a", 2.70), ("b", 2.71), ("c", 4.0))]
    places = places_of(points, "mb")
    assert places["a"] < 2.70 < 2.71 < places["b"] < 3
    assert places["c"] == 4.0


def test_names_of_neighbours_move_apart() -> None:
    moved = spread({"a": 2.71, "b": 2.64, "c": 4.0, "d": 2.78})
    assert moved["a"] / moved["b"] == pytest.approx(SIDE_BY_SIDE) == pytest.approx(moved["d"] / moved["a"])
    assert moved["a"] == pytest.approx((2.71 * 2.64 * 2.78) ** (1 / 3)), "in the middle of the three"
    assert moved["c"] == 4.0


def test_names_of_schemes_neither_overlap_nor_leave_the_panel(runs: list[RunRoot]) -> None:
    points = curve(list(map(gather, runs)))
    assert points is not None
    near = [{**each, "scheme": name, "int4_mb": 1.51} for each in points for name in ("near-it", "n" * 40)]
    figure = curve_figure([*points, *(each for each in near if each["how"] == QAT)])
    figure.savefig(io.BytesIO())
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == 6 and all(box.y1 <= panel.bbox.y1 for box in boxes)
        assert not [1 for one, other in combinations(boxes, 2) if one.overlaps(other)]


def test_sizes_of_many_rows_are_in_several_pictures(runs: list[RunRoot]) -> None:
    """As of two runs with three schemes each; the two rows of a pair stay together."""
    row = gather(runs[0]).scored[0]
    group = [{**row, "model": {**row["model"], "label": f"qat-{n}"}} for n in range(26)]
    with kept_figures() as figures:
        text = by_size(group, runs[0].figures_dir)
    shown = {name: [str(bars.get_label()) for bars in figures[name].axes[0].containers] for name in figures}
    assert shown["sizes-1.png"] == [f"qat-{n}" for n in range(14)]
    assert shown["sizes-15.png"] == [f"qat-{n}" for n in range(14, 26)]
    assert "Rows 15 to 26 of 26." in text and "figures/sizes-15-dark.png" in text


def test_page_of_a_sweep_and_its_publication(runs: list[RunRoot], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "app")
    runs_dir = runs[0].runs_dir
    first, *others = runs_of(["s"], runs_dir)
    with kept_figures() as figures:
        report(load("qat"), first, others)
        report(load("qat"), first)  # its own page keeps a picture of its own
    files = page_of(first, others)
    text = files.markdown.read_text()
    assert "| qat-w4a16     |   3 | 0.4400 |      0.880 ± 0.018 |      1.50 |    2.66 |" in text
    assert f"figures/curve{files.ending}.png" in text
    assert {"curve.png", f"curve{files.ending}.png", f"curve{files.ending}-dark.png"} <= set(figures)
    assert "| qat-w4a16     |   3 | 0.4400 |" in caplog.text, "the end of the job shows the table"
    assert numbers_without_source(text, first.root) == []
    assert json.loads(files.numbers.read_text())["curve"][0]["label"] == "baseline"
    publish(first, None, False, others)
    published = files.published_dir
    assert (published / f"figures/curve{files.ending}.png").exists()
    assert "## AP over bytes" in (published / "summary.md").read_text()


def test_the_end_of_a_sweep_names_the_sweep(runs: list[RunRoot]) -> None:
    first, *others = runs

    def following(runs: list[RunRoot]) -> str:
        evidences = list(map(gather, runs))
        findings = derive(evidences[0], load("qat").report)
        if runs[1:]:
            enter_seeds(findings, evidences)
        findings["missing"] = []
        return next_step(runs[0], evidences[0], findings)

    assert following(runs) == "open the page in a browser; 'make publish RUN=s' keeps it in runs/reports"
    assert "'make report RUN=s' has all seeds of the sweep" in following([first])
    write(first.runs_dir / "s/sweep.json", {"runs": {first.name: 0}})
    assert "how much another seed differs: the same 'make sweep' with more SEEDS" in following([first])
    assert "make publish RUN=s-seed1" in following(others), "the runs are no sweep's"
    edit(first.provenance, "title", BUILTIN_TITLE)
    assert "COCO itself: the same 'make sweep' with COCO_DIR=path" in following([first])
    evidence = gather(first)
    single = RunRoot(first.runs_dir, "single")
    shutil.copytree(first.root, single.root)
    path = single.variant_dir("fp16") / "config.yaml"
    edit(single.provenance, "title", "COCO 2017")
    seed = int(re.findall(r"seed: (\d+)", path.read_text())[-1])
    assert following([single]).endswith(
        f"with RUN=single-seed{seed + 1} and '--set train.seed={seed + 1}' added to ARGS, then 'make report RUN=single "
        f'ARGS="--runs single-seed{seed + 1}"\''
    )
    text = next_step(first, evidence, {**derive(evidence, load("qat").report), "missing": ["a file"]})
    assert text == "the command of sweep s makes what is missing, and the page anew"


def test_compare_pairs_all_schemes_of_two_seeds(runs: list[RunRoot]) -> None:
    for run in runs:
        for path in run.root.glob("*-coco/metrics.json"):
            edit(path, "dataset.coco_dir", "/nowhere")
            edit(path, "dataset.image_ids", None)
    pairs = pair_up(runs[0].root, runs[1].root)
    names = [(old["model"]["label"], new["model"]["label"]) for old, new in pairs]
    assert ("qat-w8a16 (s-seed0)", "qat-w8a16 (s-seed1)") in names
    assert len(names) == 5  # PTQ is in one of them only
