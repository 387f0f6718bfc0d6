"""Figures, gallery, the analysis behind them, and the HTML page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.coco.detail import choose
from app.core.config import load
from app.core.curves import overlay_figure, save_png
from app.core.results import write_rows
from app.core.run import RunRoot
from app.report.figures import AUTHORS_YOLOV10M, size_figure
from app.report.gallery import gallery_figure
from app.report.html import STYLE, page
from app.report.layer_figures import FLOAT, layer_figure
from app.report.report import report
from tests.support.drawn import kept_figures
from tests.support.page_numbers import numbers_without_source
from tests.support.report_fixtures import build_run, copy_run, history, layer, metrics, write

N_LIGHT = 6  # curves, sizes, precision over recall, layers, classes, gallery


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> RunRoot:
    return copy_run(reported, tmp_path)


def analysis(run: RunRoot, folder: str) -> dict:
    return json.loads((run.figures_dir / "analysis.json").read_text())["variants"][folder]


def test_every_figure_has_a_light_and_a_dark_twin_and_is_on_the_page(run: RunRoot) -> None:
    text = run.summary.read_text()
    light = {path.name for path in run.figures_dir.glob("*.[pj]*g") if not path.stem.endswith("-dark")}
    assert len(light) == N_LIGHT
    for name in light:
        stem, _, suffix = name.rpartition(".")
        dark = f"{stem}-dark.{suffix}"
        assert f'srcset="figures/{dark}"' in text and f'src="figures/{name}"' in text
        sizes = {Image.open(run.figures_dir / file).size for file in (name, dark)}
        corners = [Image.open(run.figures_dir / file).convert("L").getpixel((0, 0)) for file in (name, dark)]
        assert len(sizes) == 1
        assert corners[0] > 250 and corners[1] < 20


def test_numbers_of_the_page_are_in_files(run: RunRoot) -> None:
    assert numbers_without_source(run.summary.read_text(), run.root) == []


def test_ap_by_class_and_f1_worked_by_hand(run: RunRoot) -> None:
    base, quantized = analysis(run, "baseline-coco"), analysis(run, "qat-w4a16-coco")
    assert base["ap_by_class"] == pytest.approx({"person": 1.0, "car": 0.0})
    # One of two persons found: precision 1 up to recall 0.5, that is at 51 of the 101 recalls.
    assert quantized["ap_by_class"] == pytest.approx({"person": 51 / 101, "car": 1.0})
    assert base["f1_by_image"] == {"1": 1.0, "2": 0.0, "3": 1.0, "4": 1.0}
    assert quantized["f1_by_image"] == {"1": 0.0, "2": 1.0, "3": 1.0, "4": 1.0}
    assert base["best_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert base["best_score"] == 0.5625


def test_gallery_follows_its_rule(run: RunRoot) -> None:
    chosen = [(row["why"], row["image_id"]) for row in analysis(run, "qat-w4a16-coco")["gallery"]]
    assert chosen[:2] == [("largest loss", 1), ("largest gain", 2)]
    assert chosen[2][0] == "random" and chosen[2][1] in (3, 4)


def test_choice_is_seeded_and_takes_no_image_twice() -> None:
    base = {str(i): 0.5 for i in range(50)}
    other = {str(i): 0.5 + (i % 3 - 1) / 4 for i in range(50)}
    first = choose(base, other, 3, seed=1)
    assert first == choose(base, other, 3, seed=1)
    assert first != choose(base, other, 3, seed=2)
    assert len({image_id for image_id, _, _ in first}) == 9
    assert [image_id for image_id, why, _ in first if why == "largest loss"] == ["0", "3", "6"]


def test_no_loss_is_shown_where_there_is_none() -> None:
    same = {"1": 0.5, "2": 0.5}
    assert {why for _, why, _ in choose(same, same, 2, seed=0)} == {"random"}


def reason_after(run: RunRoot) -> str:
    with kept_figures():
        report(load("qat"), run)
    return run.summary.read_text().partition("Left out: ")[2].partition("\n")[0]


def test_detections_of_another_scoring_are_refused(run: RunRoot) -> None:
    write(run.root / "qat-w4a16-coco/detections.json", [])
    assert "qat-w4a16-coco/detections.json does not give the AP of metrics.json" in reason_after(run)


def shown_in_gallery(path: Path) -> tuple[np.ndarray, list[float]]:
    """Pixels [H,W,3] and extent (left, right, bottom, top) of the photo in its panel."""
    row = {"image_id": 1, "why": "random", "f1_difference": 0.0}
    columns = {name: {1: []} for name in ("ground truth", "fp16", "qat-w4a16")}
    (image,) = gallery_figure([row], {1: path}, columns, {}).axes[0].images
    return np.asarray(image.get_array()), list(image.get_extent())


def test_gallery_shows_a_photo_as_its_exif_says(tmp_path: Path) -> None:
    """Boxes are those of the turned image, and colours do not change places."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (200, 100, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half comes to the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    shown, extent = shown_in_gallery(tmp_path / "turned.png")
    assert (shown.shape, extent) == ((60, 40, 3), [0, 40, 60, 0])
    assert shown[:30].reshape(-1, 3).tolist() == [[200, 100, 0]] * 30 * 40
    assert not shown[30:].any()


def test_gallery_shows_16_bit_greys_by_their_upper_8_bits(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    shown, _ = shown_in_gallery(tmp_path / "grey.png")
    assert np.abs(shown.astype(int) - (grey / 257)[:, :, None]).max() <= 1


def test_changed_annotations_are_refused(run: RunRoot) -> None:
    file = Path(json.loads(run.provenance.read_text())["splits"]["val"]["annotation_file"])
    file.write_text(file.read_text() + "\n")
    assert "have changed" in reason_after(run)


def test_missing_detections_are_named(run: RunRoot) -> None:
    (run.root / "baseline-coco/detections.json").unlink()
    assert "baseline-coco/detections.json is not there" in reason_after(run)


def test_html_needs_nothing_else(run: RunRoot) -> None:
    html = (run.root / "summary.html").read_text()
    assert re.findall(r'(?:src|srcset)="(?!data:image/)', html) == []
    assert html.count("data:image/") == 2 * N_LIGHT
    for outside in ("<script", "<link", "http:", "https:", "@import", "url("):
        assert outside not in html
    assert "prefers-color-scheme: dark" in html


def test_html_has_what_the_markdown_has(run: RunRoot) -> None:
    cells = re.findall(r"<t[dh](?: [^>]*)?>", (run.root / "summary.html").read_text())
    table_lines = [
        line for line in run.summary.read_text().splitlines() if line.startswith("| ") and "| --" not in line
    ]
    assert len(cells) == sum(line.count(" | ") + 1 for line in table_lines)
    assert len(cells) > 100


def test_html_has_the_headings_that_it_links_to(run: RunRoot) -> None:
    html = (run.root / "summary.html").read_text()
    targets = re.findall(r'href="#([\w-]+)"', html)
    assert {"pictures", "quantization", "where-things-are"} < set(targets)
    assert set(targets) <= set(re.findall(r'<h2 id="([\w-]+)">', html))


def test_text_makes_no_table_of_contents_of_its_own(tmp_path: Path) -> None:
    assert "<p>[TOC]</p>" in page("# title\n\n[TOC]\n\n## one", tmp_path, "run")


def test_every_figure_links_to_its_whole_picture(run: RunRoot) -> None:
    """On a narrow screen it is drawn wider than the screen, and scrolls."""
    html = (run.root / "summary.html").read_text()
    targets = re.findall(r'<a class="full" href="([^"]+)">', html)
    assert len(targets) == N_LIGHT
    assert all((run.root / target).is_file() for target in targets)
    assert html.count('<div class="figure"><picture>') == N_LIGHT


def test_only_prose_wraps_in_tables(run: RunRoot) -> None:
    """Names of files stand in cells that are aligned to the right, by a style of their own."""
    html = (run.root / "summary.html").read_text()
    assert re.findall(r"([^\n{}]+) \{ white-space: normal", STYLE) == ["td:last-child:not([style])"]
    cells = [attributes for attributes, text in re.findall(r"<td([^>]*)>([^<]*)</td>", html) if text.endswith(".onnx")]
    assert cells == [' style="text-align: right;"'] * 2


def test_html_names_a_run_safely(tmp_path: Path) -> None:
    assert "<title>a&lt;b</title>" in page("# text", tmp_path, "a<b")


def test_curves_show_every_state_of_every_variant() -> None:
    figure = overlay_figure({"fp16": history(0.0), "qat-w4a16": history(0.1)})
    loss_axes, ap_axes = figure.axes
    assert len(loss_axes.lines) == 2 * 2
    assert len(ap_axes.lines) == 2 * 3
    assert len({(line.get_color(), line.get_linestyle()) for line in ap_axes.lines}) == 6


def test_curves_with_a_nan_can_be_painted(tmp_path: Path) -> None:
    rows = history(0.0)
    rows[2] |= {"AP/ema_bn": float("nan"), "val_loss/ema_bn": float("inf")}
    save_png(overlay_figure({"fp16": rows}), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 0


def test_reference_line_ends_with_the_training() -> None:
    rows = [row | {"epoch": 10 * row["epoch"]} for row in history(0.0)]
    line = overlay_figure({"fp16": rows}, AUTHORS_YOLOV10M).axes[1].lines[-1]
    assert list(line.get_xdata()) == [10, 20]
    assert list(line.get_ydata()) == [0.239, 0.347]


def test_epochs_without_validation_are_no_zero(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    path = run.variant_dir("fp16") / "results.csv"
    with open(path, newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    for row in rows[::2]:
        for name in [name for name in row if name.startswith(("AP/", "val_loss/"))]:
            del row[name]
    write_rows(path, rows)
    with kept_figures():
        report(load("qat"), run)
    assert "fp16 is healthy" in run.summary.read_text()
    best = json.loads((run.root / "report.json").read_text())["trainings"]["fp16"]
    assert best["epochs"] == 4 and best["best_epoch"] == 4


def test_many_variants_stay_apart() -> None:
    """More rows than colours: none is dropped, and no two look the same."""
    labels = ["fp16", *(f"{kind}-{scheme}" for kind in ("qat", "ptq") for scheme in "abcd")]
    figure = size_figure([{**metrics(label, "f", "s", 0.3, 1), "dir": label} for label in labels])
    bars = figure.axes[0].containers
    assert len({(bar[0].get_facecolor(), bar[0].get_hatch()) for bar in bars}) == len(labels)


def test_layer_figure_shows_each_layer_of_each_variant_with_its_bits() -> None:
    layers = [layer("model.0.conv", 8, ""), layer("model.1.conv", 4, ""), layer("model.23.dfl.conv", 32, "fixed")]
    qat = {"layers": layers, "snr_db": {"model.0.conv": 40.0, "model.1.conv": 18.0}}
    ptq = {"layers": layers, "snr_db": {"model.0.conv": 39.0, "model.1.conv": 16.0}}
    noise, bits = layer_figure({"qat-w4a16": qat, "ptq-w4a16": ptq}).axes
    assert [list(line.get_ydata()) for line in noise.lines[:2]] == [[40.0, 18.0], [39.0, 16.0]]
    assert [round(sum(line.get_ydata()[i] for line in bits.lines[:2]) / 2) for i in range(3)] == [8, 4, FLOAT]
    assert [label.get_text() for label in bits.get_xticklabels()] == ["0", "1", "23"]


def test_health_of_the_quantizer_is_drawn_where_it_was_recorded(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    names = ("oscillating", "flipped", "ema_differs", "snr_mean_db", "snr_min_db")
    rows = [row | {f"health/{name}": 0.1 * row["epoch"] for name in names} for row in history(0.0)]
    write_rows(run.variant_dir("qat-w4a16") / "results.csv", rows)
    report(load("qat"), run)
    assert "figures/quantizer-health.png" in run.summary.read_text()
    assert (run.figures_dir / "quantizer-health-dark.png").exists()
