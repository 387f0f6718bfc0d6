"""A page of all-different numbers: each stands where it belongs. Expected cells are worked out from the scene."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
from matplotlib.figure import Figure

from app.core.config import load
from app.core.run import RunRoot
from app.report.page_files import page_of
from app.report.publish import publish
from app.report.report import report
from tests.support.drawn import colour_names, curves_of, kept_figures, style_names, x_of, y_of
from tests.support.markdown_tables import row, table
from tests.support.report_scene import BITS, COCO, HISTORY, LABELS, SNR_DB, STATS, build_scene, enter_ap

NEUTRAL = "#808080"  # of the lines that explain a style
SEPARATE = 0.5  # bits: variants of equal bits are drawn less than this apart


@dataclass(frozen=True)
class Page:
    run: RunRoot
    text: str
    found: dict[str, Any]
    figures: dict[str, Figure]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = build_scene(tmp_path_factory.mktemp("scene"))
    with kept_figures() as figures:
        report(load("qat"), run)
    return Page(run, run.summary.read_text(), json.loads((run.root / "report.json").read_text()), figures)


def first_paragraph(text: str) -> str:
    return text.split("\n\n")[1]


VERDICT = [
    "qat-w4a16: AP 0.4887 against 0.5123", "-0.0236", "SUBSET of 2,109 of 3,210 images",
    "has AP 0.3561 (-0.1562), with BatchNorm re-estimated 0.3772 (-0.1351)",
    "against the better PTQ: +0.1115", "16.21 MB against 61.44 MB, 0.26 of it", "INT4: 8.70 MB, 0.14 of it",
    "36.24 ms against 41.52 ms (p50",
]  # fmt: skip


@pytest.mark.parametrize("words", VERDICT)
def test_verdict(page: Page, words: str) -> None:
    assert words in first_paragraph(page.text)


ROWS = {
    "fp16": "0.5123 - 0.7034 61.44 41.52 47.83",
    "ptq-w4a16": "0.3561 -0.1562 0.5247 16.32 35.11 38.62",
    "ptq-w4a16-bn": "0.3772 -0.1351 0.5468 16.43 35.29 38.86",
    "qat-w4a16": "0.4887 -0.0236 0.6795 16.21 36.24 39.75",
    "qat-w4a16-int4": "0.4879 -0.0244 0.6783 8.70 52.37 58.49",
}


@pytest.mark.parametrize("label", ROWS)
def test_table_of_results(page: Page, label: str) -> None:
    columns = ("AP", "difference", "AP50", "size MB", "p50 ms", "p90 ms")
    assert row(page.text, label, *columns) == ROWS[label].split()
    assert row(page.text, label, "provider", "file") == ["CPU", f"net-{label}.onnx"]


def test_how_it_was_measured(page: Page) -> None:
    assert "608 px" in page.text
    assert "score from 0.0025" in page.text
    assert "at most 289 boxes" in page.text
    assert "137 runs after 11 to warm up" in page.text


@pytest.mark.parametrize("folder", LABELS)
def test_all_coco_numbers(page: Page, folder: str) -> None:
    name = folder.removesuffix("-coco")
    column = {stat: cells[name] for stat, cells in table(page.text, "baseline", name).items()}
    assert column == dict(zip(STATS, COCO[folder].split(), strict=True))


def test_rows_of_report_json(page: Page) -> None:
    rows = {entry["label"]: entry for entry in page.found["groups"][0]["rows"]}
    qat, int4 = rows["qat-w4a16"], rows["qat-w4a16-int4"]
    assert (qat["AP"], qat["p50_ms"], qat["size_mb"]) == (0.4887, 36.24, 16.20511)
    assert qat["AP_difference"] == pytest.approx(-0.0236)
    assert qat["AP_over_ptq"] == pytest.approx(0.1115)
    assert qat["size_share"] == pytest.approx(16205110 / 61437952)
    assert [int4["AP_over_ptq"], rows["ptq-w4a16"]["AP_over_ptq"], rows["fp16"]["AP_difference"]] == [None] * 3


# The best epoch by EMA + BN is 3 of fp16 and 4 of qat. Train losses there: 1.11 + 1.52 + 0.93, and 1.27 + 1.63 + 0.98.
# Hours: 3,500 s and 5,000 s. Images a second: means of the five epochs.
TRAININGS = {
    "fp16": "5 3 0.4507 0.4625 0.4712 3.560 3.871 166.3 0.97",
    "qat-w4a16": "5 4 0.4201 0.4283 0.4365 3.880 4.205 120.8 1.39",
}
TRAINING_COLUMNS = (
    "epochs", "best epoch", "AP raw", "AP EMA", "AP EMA+BN", "train loss", "val loss", "images/s", "hours"
)  # fmt: skip


@pytest.mark.parametrize("label", TRAININGS)
def test_table_of_trainings(page: Page, label: str) -> None:
    assert row(page.text, label, *TRAINING_COLUMNS) == TRAININGS[label].split()


def test_losses_beside_those_of_fp16(page: Page) -> None:
    """Last epoch: (1.04 + 1.47 + 0.91) - (0.95 + 1.31 + 0.88) = 0.28 and 4.113 - 3.702 = 0.411."""
    assert "at epoch 5 qat-w4a16's differ from fp16's by +0.2800 on train images and +0.4110 on valid" in page.text


def test_health_of_the_trainings(page: Page) -> None:
    """0.4439 / 0.4712 at epoch 4 of fp16, 0.4098 / 0.4365 at epoch 5 of qat."""
    assert "fp16 is healthy, its AP stayed above 0.9 of its running best (lowest 0.942 at epoch 4)" in page.text
    assert "qat-w4a16 is healthy, its AP stayed above 0.9 of its running best (lowest 0.939 at epoch 5)" in page.text


def test_bits_and_shares(page: Page) -> None:
    columns = ("variant", "bits", "layers in training", "in the ONNX file", "weights")
    lines = [line for line in page.text.splitlines() if re.match(r"\| (qat|ptq)-w4a16 +\| +[48] \|", line)]
    got = [[cell.strip() for cell in line.split("|")[1 : len(columns) + 1]] for line in lines]
    assert got == [
        ["ptq-w4a16", "4", "5", "3", "0.873 of all"], ["ptq-w4a16", "8", "2", "1", "0.127 of all"],
        ["qat-w4a16", "4", "5", "3", "0.861 of all"], ["qat-w4a16", "8", "2", "1", "0.139 of all"],
    ]  # fmt: skip
    assert set(columns) <= set(next(iter(table(page.text, *columns).values())))


def test_counts_of_the_dataset(page: Page) -> None:
    columns = ("images used", "listed", "broken", "annotations", "crowd", "without objects")
    assert row(page.text, "train2017", *columns) == ["8,765", "9,876", "12", "54,321", "432", "98"]
    assert row(page.text, "val2017", *columns) == ["2,109", "3,210", "3", "12,345", "76", "54"]
    assert "(seed 31)" in page.text


def test_noisiest_layers(page: Page) -> None:
    assert "ptq-w4a16 `model.4.conv` with 14.8 dB; qat-w4a16 `model.5.conv` with 18.6 dB" in page.text


def test_log_entry_of_a_publication(page: Page) -> None:
    publish(page.run, None, force=True)
    text = (page.run.runs_dir / "LOG.md").read_text()
    told = "fp16 0.5123, ptq-w4a16 0.3561 (-0.1562), ptq-w4a16-bn 0.3772 (-0.1351), qat-w4a16 0.4887 (-0.0236)"
    assert f"SUBSET of 2,109 of 3,210 images, n=1: {told}" in text


# By hand from `column`: the sum of the three train losses of each epoch.
TRAIN_LOSSES = {"fp16": [7.86, 5.15, 3.56, 3.37, 3.14], "qat-w4a16": [8.69, 5.71, 4.09, 3.88, 3.42]}
STATES = {"raw": "AP/raw", "EMA": "AP/ema", "EMA + BN re-estimated (scored)": "AP/ema_bn"}


def test_curves(page: Page) -> None:
    loss_axes, ap_axes = page.figures["curves.png"].axes
    colours = {colour: name for colour, name in colour_names(ap_axes.get_legend()).items() if name in HISTORY}
    aps = curves_of(ap_axes, colours, style_names(ap_axes.get_legend(), NEUTRAL))
    assert aps == {(name, state): HISTORY[name][key] for name in HISTORY for state, key in STATES.items()}
    losses = curves_of(loss_axes, colours, style_names(loss_axes.get_legend(), NEUTRAL))
    for label, expected in TRAIN_LOSSES.items():
        assert losses[label, "train"] == pytest.approx(expected)
        assert losses[label, "val, EMA + BN re-estimated"] == HISTORY[label]["val_loss/ema_bn"]
    assert all(x_of(line) == [1, 2, 3, 4, 5] for line in (*loss_axes.lines, *ap_axes.lines))


def test_bars_by_size(page: Page) -> None:
    """Repacked files hold the weights of another row and have no bars."""
    axes = page.figures["sizes.png"].axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    places = [STATS.index(name) for name in ("AP", "AP_small", "AP_medium", "AP_large")]
    values = {LABELS[folder]: [float(numbers.split()[i]) for i in places] for folder, numbers in COCO.items()}
    del values["qat-w4a16-int4"]
    assert heights == values
    assert [text.get_text() for text in axes.texts] == [f"{v:.3f}" for bars in values.values() for v in bars]
    ticks = [label.get_text().partition("\n")[0] for label in axes.get_xticklabels()]
    assert ticks == ["all", "small", "medium", "large"]
    centres = [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in axes.containers]
    assert all(round(centre) == tick for row_of_bars in centres for tick, centre in enumerate(row_of_bars))


def test_noise_and_bits_by_layer(page: Page) -> None:
    noise, bits = page.figures["layers.png"].axes
    drawn = {str(line.get_label()): line for line in noise.lines if str(line.get_label()) in SNR_DB}
    assert {label: y_of(line) for label, line in drawn.items()} == SNR_DB
    assert all(x_of(line) == list(range(7)) for line in drawn.values())
    levels = [line for line in bits.lines if line.get_marker() != "None"]
    for line in levels:
        assert y_of(line)[:7] == pytest.approx(list(BITS.values()), abs=SEPARATE)


HEALTH = {
    0: {"oscillating": "oscillating", "flipped": "flipped", "EMA differs": "ema_differs"},
    1: {"mean of the layers": "snr_mean_db", "worst layer": "snr_min_db"},
}


@pytest.mark.parametrize("panel", HEALTH)
def test_codes_over_the_epochs(page: Page, panel: int) -> None:
    figure = page.figures["quantizer-health.png"]
    axes = figure.axes[panel]
    drawn = curves_of(axes, colour_names(figure.legends[0]), style_names(axes.get_legend(), NEUTRAL))
    columns = HISTORY["qat-w4a16"]
    assert drawn == {("qat-w4a16", told): columns[f"health/{name}"] for told, name in HEALTH[panel].items()}


# Three seeds. Differences to fp16: -0.03, -0.02, -0.04. QAT less the better PTQ (with BN): 0.07, 0.09, 0.06.
SEEDS: dict[str, dict[str, float]] = {
    "a": {"baseline-coco": 0.50, "qat-w4a16-coco": 0.47, "ptq-w4a16-coco": 0.30, "ptq-w4a16-bn-coco": 0.40},
    "b": {"baseline-coco": 0.52, "qat-w4a16-coco": 0.50, "ptq-w4a16-coco": 0.32, "ptq-w4a16-bn-coco": 0.41},
    "c": {"baseline-coco": 0.57, "qat-w4a16-coco": 0.53, "ptq-w4a16-coco": 0.36, "ptq-w4a16-bn-coco": 0.47},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs_dir = tmp_path_factory.mktemp("seeds")
    runs = [build_scene(runs_dir, name, seed) for seed, name in enumerate(SEEDS, start=5)]
    for run, aps in zip(runs, SEEDS.values(), strict=True):
        enter_ap(run, aps)
    with kept_figures():
        report(load("qat"), runs[0], runs[1:])
    return page_of(runs[0], runs[1:]).markdown.read_text()


SEED_ROWS = {  # train.seed, AP of fp16 and of qat, difference of qat
    "a": "5 0.5000 0.4700 -0.0300", "b": "6 0.5200 0.5000 -0.0200", "c": "7 0.5700 0.5300 -0.0400",
    "mean": "0.5300 0.5000 -0.0300", "sd": "0.0361 0.0300 +0.0100",
}  # fmt: skip


@pytest.mark.parametrize("name", SEED_ROWS)
def test_seeds_merged(merged: str, name: str) -> None:
    columns = ("train.seed", "AP baseline-coco", "AP qat-w4a16-coco", "difference qat-w4a16-coco")
    assert " ".join(row(merged, name, *columns)).split() == SEED_ROWS[name].split()


def test_verdict_over_seeds(merged: str) -> None:
    """sd of 0.50 0.52 0.57: sqrt(0.0026 / 2); of 0.07 0.09 0.06: sqrt(0.000467 / 2); of PTQ: sqrt(0.001867 / 2)."""
    told = first_paragraph(merged)
    assert "AP 0.5000 ± 0.0300 against 0.5300 ± 0.0361 of the FP16 training, -0.0300 ± 0.0100" in told
    assert "over 3 runs" in told
    assert "(PTQ) has AP 0.3267 ± 0.0306 (-0.2033 ± 0.0058)" in told
    assert "against the better PTQ: +0.0733 ± 0.0153" in told
    assert row(merged, "qat-w4a16", "AP", "difference") == ["0.5000 ± 0.0300", "-0.0300 ± 0.0100"]
