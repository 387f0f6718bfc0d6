"""Crowds in AP, F1, figures, gallery and comparison: they are no miss, and what they swallow is no fault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from app.core.config import load
from app.report.compare import compare
from app.report.report import report
from tests.support.crowd_scene import build_crowds
from tests.support.drawn import kept_figures, y_of
from tests.support.markdown_tables import row, table

HALF_PRECISION = 51 / 202  # precision 1/2 at the 51 recalls up to 0.5, of 101
EXACT = 1e-12  # float64 on both sides


@dataclass(frozen=True)
class Made:
    """What report and compare made of the scene."""

    page: str
    variants: dict[str, Any]
    figures: dict[str, Figure]
    compared: str
    compared_figures: dict[str, Figure]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("crowds")
    run = build_crowds(folder / "runs", folder / "coco")
    config = load("qat", sets=["report.gallery_images=1"])
    with kept_figures() as figures:
        report(config, run)
    with kept_figures() as compared_figures:
        compare(run.root / "baseline-coco", run.root / "qat-w4a16-coco", folder / "out", config.report)
    variants = json.loads((run.figures_dir / "analysis.json").read_text())["variants"]
    compared = (folder / "out" / "compare.md").read_text()
    return Made(run.summary.read_text(), variants, figures, compared, compared_figures)


def test_ap_on_the_page(made: Made) -> None:
    """fp16: person 1, car 1 at five of ten IoU thresholds. qat: person, a fault ranked before one hit of two; car 1."""
    assert row(made.page, "baseline", "AP", "AP50") == ["0.7500", "1.0000"]
    assert row(made.page, "qat-w4a16", "AP", "difference", "AP50") == ["0.6262", "-0.1238", "0.6262"]


AP_BY_CLASS = {
    "baseline-coco": {"person": 1.0, "car": 0.5},
    "qat-w4a16-coco": {"person": HALF_PRECISION, "car": 1.0},
}
# Counted detections by score: fp16 hit, hit, fault, hit of three objects; qat fault, hit, hit.
F1 = {
    "baseline-coco": (6 / 7, 0.70, {"1": 1.0, "2": 1.0, "3": 1.0, "4": 2 / 3}),
    "qat-w4a16-coco": (4 / 6, 0.55, {"1": 0.0, "2": 1.0, "3": 1.0, "4": 1.0}),
}


@pytest.mark.parametrize("folder", AP_BY_CLASS)
def test_ap_by_class(made: Made, folder: str) -> None:
    assert made.variants[folder]["ap_by_class"] == pytest.approx(AP_BY_CLASS[folder], abs=EXACT)


@pytest.mark.parametrize("folder", F1)
def test_f1_without_crowds(made: Made, folder: str) -> None:
    best, score, by_image = F1[folder]
    facts = made.variants[folder]
    assert (facts["best_f1"], facts["best_score"]) == pytest.approx((best, score))
    assert facts["f1_by_image"] == pytest.approx(by_image)


def test_precision_over_recall(made: Made) -> None:
    """At IoU 0.75 fp16 has no car; qat's persons have precision 1/2 up to recall 1/2, and none beyond."""
    expected = {
        ("IoU 0.5", "baseline"): [1.0] * 101,
        ("IoU 0.75", "baseline"): [0.5] * 101,
        ("IoU 0.5", "qat-w4a16"): [0.75] * 51 + [0.5] * 50,
        ("IoU 0.75", "qat-w4a16"): [0.75] * 51 + [0.5] * 50,
    }
    panels = made.figures["precision-recall.png"].axes
    drawn = {(axes.get_title(), str(line.get_label())): y_of(line) for axes in panels for line in axes.lines}
    assert drawn == {key: pytest.approx(values) for key, values in expected.items()}


@pytest.mark.parametrize("kind", ["figures", "compared_figures"])
def test_bars_by_class_are_qat_less_fp16(made: Made, kind: str) -> None:
    axes = getattr(made, kind)["classes-qat-w4a16-coco.png"].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([0.5, HALF_PRECISION - 1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["car (0.500)", "person (1.000)"]
    assert [text.get_text() for text in axes.texts] == ["+0.500", "-0.748"]


def boxes(axes: Axes) -> list[tuple[list[float], str, str]]:
    """Box x,y,w,h in px, line style and label of everything drawn over a photo."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    pairs = zip(patches, axes.texts, strict=True)
    return [([*p.get_xy(), p.get_width(), p.get_height()], str(p.get_linestyle()), t.get_text()) for p, t in pairs]


GALLERY = {
    "largest loss, F1 -1.00\nimage 1": {
        "ground truth": [([4, 4, 20, 20], "-", "person"), ([30, 10, 30, 30], "--", "person crowd")],
        "baseline": [
            ([4, 4, 20, 20], "-", "person 0.80"), ([45, 20, 10, 10], "-", "person 0.90"),
            ([32, 12, 8, 8], "-", "person 0.95"),
        ],
        "qat-w4a16": [([4, 30, 8, 8], "-", "person 0.60"), ([32, 12, 8, 8], "-", "person 0.95")],
    },
    "largest gain, F1 +0.33\nimage 4": {
        "ground truth": [([20, 8, 16, 30], "-", "person"), ([0, 0, 18, 48], "--", "car crowd")],
        "baseline": [([2, 2, 10, 10], "-", "person 0.72"), ([20, 8, 16, 30], "-", "person 0.75")],
        "qat-w4a16": [([20, 8, 16, 30], "-", "person 0.58")],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["figures", "compared_figures"])
@pytest.mark.parametrize("name", GALLERY)
def test_gallery_draws_crowds_dashed(made: Made, kind: str, name: str) -> None:
    """A variant shows its boxes from the score of its own best F1 on: 0.70 and 0.55."""
    panels = getattr(made, kind)["gallery-qat-w4a16-coco.jpg"].axes
    titles = [axes.get_title() for axes in panels[:3]]
    lines = {panels[i].get_ylabel(): panels[i : i + 3] for i in range(0, len(panels), 3)}
    assert {title: boxes(axes) for title, axes in zip(titles, lines[name], strict=True)} == GALLERY[name]


def test_gallery_says_from_which_score_on(made: Made) -> None:
    assert "best (0.700 and 0.550)" in made.page


COMPARED = {  # AR_1 sees the best detection of each image and class: in image 1 that is one in the crowd
    "AP": "0.7500 0.6262 -0.1238", "AP50": "1.0000 0.6262 -0.3738", "AP75": "0.5000 0.6262 +0.1262",
    "AP_large": "- - -", "AR_1": "0.5000 0.7500 +0.2500", "AR_100": "0.7500 0.7500 +0.0000",
    "file MB": "9.28 2.66", "p50 ms": "6.25 4.75",
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_comparison_left_right_and_right_less_left(made: Made, name: str) -> None:
    cells = next(iter(table(made.compared, "baseline", "qat-w4a16", "difference").values()))
    assert list(cells) == ["", "baseline", "qat-w4a16", "difference"]
    assert " ".join(row(made.compared, name, "baseline", "qat-w4a16", "difference")).split() == COMPARED[name].split()


def test_comparison_by_class_and_image(made: Made) -> None:
    columns = ("class", "baseline", "qat-w4a16", "difference")
    assert row(made.compared, "person", *columns) == ["person", "1.0000", "0.2525", "-0.7475"]
    assert row(made.compared, "car", *columns) == ["car", "0.5000", "1.0000", "+0.5000"]
    assert list(table(made.compared, *columns)) == ["person", "car"]  # the largest loss first
    columns = ("why", "F1 baseline", "F1 qat-w4a16", "difference")
    assert row(made.compared, "1", *columns) == ["largest loss", "1.00", "0.00", "-1.00"]
    assert row(made.compared, "4", *columns) == ["largest gain", "0.67", "1.00", "+0.33"]


def test_bars_of_the_comparison(made: Made) -> None:
    axes = made.compared_figures["sizes.png"].axes[0]
    heights = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in axes.containers}
    small = {"baseline": 0.75, "qat-w4a16": (1 + HALF_PRECISION) / 2}  # all objects are small
    assert heights == {name: pytest.approx([ap, ap, 0, 0]) for name, ap in small.items()}
    told = [["0.750"] * 2, ["none"] * 2, ["0.626"] * 2, ["none"] * 2]
    assert [text.get_text() for text in axes.texts] == [text for pair in told for text in pair]
