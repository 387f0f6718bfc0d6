"""AP of frequent classes in the report: beside AP in every table, and judged by its own spread between seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.core.config import load
from app.core.files import read_json
from app.core.run import RunRoot
from app.report.compare import table
from app.report.evidence import as_row
from app.report.findings import Findings
from app.report.groups import frequent_line
from app.report.page_files import page_of
from app.report.publish import results
from app.report.report import report
from app.report.spread import seed_spread
from tests.support.drawn import kept_figures
from tests.support.page_numbers import numbers_without_source
from tests.support.report_fixtures import build_run, edit, write_bench_rows

BASE, OURS = 0.6, 0.57  # AP of frequent classes, of the baseline and of the quantized model
N_CLASSES = 12


@pytest.fixture
def run(tmp_path: Path) -> RunRoot:
    return with_frequent(build_run(tmp_path), BASE, OURS)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of FP16 trainings with APs of 0.02, 0.03 and 0.04, and of their frequent classes 0.19, 0.20 and 0.21."""
    path = write_bench_rows(tmp_path / "rows.json", (0.02, 0.03, 0.04))
    monkeypatch.setattr("app.report.spread.ROWS", path)
    enter_frequent(path, ([0.0, 0.19], [0.0, 0.20], [0.0, 0.21]))
    return path


def enter_frequent(path: Path, curves: Sequence[list[float] | None]) -> None:
    tree = json.loads(path.read_text())
    for row, curve in zip(tree["rows"], curves, strict=True):
        row["AP_frequent"] = curve
    path.write_text(json.dumps(tree))


def with_frequent(run: RunRoot, base: float, ours: float) -> RunRoot:
    for folder, ap in (("baseline-coco", base), ("qat-w4a16-coco", ours)):
        edit(run.root / folder / "metrics.json", "coco.AP_frequent", ap)
        edit(run.root / folder / "metrics.json", "dataset.n_frequent_classes", N_CLASSES)
    return run


def reported(run: RunRoot, *others: RunRoot) -> tuple[str, Findings]:
    with kept_figures():
        report(load("qat"), run, others)
    files = page_of(run, others)
    return files.markdown.read_text(), read_json(files.numbers, "report")


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of the page's tables whose first cell is this."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first]


@pytest.mark.usefixtures("bench")
def test_tables_have_it_beside_ap(run: RunRoot) -> None:
    text, findings = reported(run)
    assert cells(text, "variant")[0][1:5] == ["AP", "difference", "AP frequent", "AP50"]
    assert cells(text, "baseline")[0][1:5] == ["0.4321", "-", "0.6000", "0.6321"]
    assert cells(text, "qat-w4a16")[0][1:5] == ["0.4198", "-0.0123", "0.5700", "0.6198"]
    assert cells(text, "AP_frequent") == [["AP_frequent", "0.6000", "0.5700"]]
    assert text.count("AP frequent: mean AP of the 12 classes with at least 100 objects in these images.") == 1
    assert numbers_without_source(text, run.root) == []
    _, frequent = results(findings)
    assert frequent.startswith("AP of 12 frequent classes on small set, val2017, 1,200 images, n=1: baseline 0.6000, ")
    assert frequent.endswith("qat-w4a16 0.5700 (-0.0300)")


@pytest.mark.usefixtures("bench")
def test_verdict_holds_it_against_its_own_spread(run: RunRoot) -> None:
    """Deviation 0.01 of a mean of 0.2: 2 * sqrt(2) * 0.05 = 0.141 of 0.6 are 0.085."""
    text, _ = reported(run)
    told = "Over the 12 frequent classes: AP 0.5700 against 0.6000, -0.0300, within about 0.085 that chance may make."
    assert told in text
    assert (
        "For the AP of frequent classes it is about 0.14 of that AP, as FP16 trainings spread by 0.050 of it (n=3, at "
        "an AP of 0.200 after 4 epochs). The spread of this run shows"
    ) in text


@pytest.mark.usefixtures("bench")
def test_verdict_names_a_difference_beyond_chance(tmp_path: Path) -> None:
    text, _ = reported(with_frequent(build_run(tmp_path), 0.6, 0.51))
    assert "-0.0900, beyond about 0.085 that chance may make." in text


def test_spread_of_frequent_classes_by_hand(bench: Path) -> None:
    """The spread of AP does not change; two rows that have it say nothing yet."""
    found = seed_spread()
    assert (found["n"], found["mean"]) == (3, pytest.approx(0.03))
    expected = {"epoch": 4, "n": 3, "mean": 0.2, "sd": 0.01, "share": 0.05, "telling_share": math.sqrt(2) / 10}
    assert found["frequent"] == pytest.approx(expected)
    enter_frequent(bench, ([0.0, 0.19], [0.0, 0.20], None))
    assert seed_spread()["frequent"] is None


def test_rows_of_the_bench_without_it_give_no_limit(run: RunRoot, bench: Path) -> None:
    write_bench_rows(bench, (0.02, 0.03, 0.04))
    text, _ = reported(run)
    assert "Over the 12 frequent classes: AP 0.5700 against 0.6000, -0.0300. The file" in text
    assert "For the AP of frequent" not in text


def test_merged_runs_judge_it_by_their_own_spread(tmp_path: Path) -> None:
    """-0.01, -0.03, -0.02: mean -0.02, deviation 0.01, limit 4.303 * 0.01 / sqrt(3) = 0.0248."""
    runs = []
    for seed, change in enumerate((-0.01, -0.03, -0.02)):
        runs.append(with_frequent(build_run(tmp_path, f"run{seed}", seed), 0.5, 0.5 + change))
    text, findings = reported(*runs)
    over = findings["seeds"]["over_runs"]["qat-w4a16-coco"]
    assert over["AP_frequent_difference"] == pytest.approx({"n": 3, "mean": -0.02, "sd": 0.01})
    assert (
        "AP 0.4800 ± 0.0100 against 0.5000 ± 0.0000, -0.0200 ± 0.0100, within 0.0248, which chance exceeds once in "
        "twenty." in text
    )
    heads, mean = cells(text, "run")[0], cells(text, "mean")[0]
    by_head = dict(zip(heads, mean, strict=True))
    assert by_head["AP frequent qat-w4a16"] == "0.4800"
    assert by_head["difference of frequent qat-w4a16"] == "-0.0200"


def test_no_frequent_class_is_said_once(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    for folder in ("baseline-coco", "qat-w4a16-coco"):
        edit(run.root / folder / "metrics.json", "dataset.n_frequent_classes", 0)
    text, findings = reported(run)
    assert text.count("frequent") == 1
    assert "- No class has 100 objects in the scored images: there is no AP of frequent classes.\n" in text
    assert len(results(findings)) == 1


@pytest.mark.parametrize(("ours", "expected"), [(0.57, ["0.6000", "0.5700", "-0.0300"]), (None, ["0.6000", "-", "-"])])
def test_compare_has_it(run: RunRoot, ours: Any, expected: list[str]) -> None:
    """One of two folders may have been scored before there was this number."""
    if ours is None:
        path = run.root / "qat-w4a16-coco/metrics.json"
        tree = json.loads(path.read_text())
        del tree["coco"]["AP_frequent"]
        path.write_text(json.dumps(tree))
    folders = [run.root / "baseline-coco", run.root / "qat-w4a16-coco"]
    old, new = [as_row(read_json(folder / "metrics.json", "eval"), folder) for folder in folders]
    lines = "\n".join(table([(old, new)]))
    assert frequent_line([old, new]).startswith("AP frequent: mean AP of the 12 classes")
    assert cells(lines, "AP_frequent") == [["AP_frequent", *expected]]
