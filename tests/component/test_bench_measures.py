"""The measures of the stability bench, how seeds scatter in them, and which trainings are not made again."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from app.bench.stability import Plan, bench_stability, is_among, recipe, training_of
from app.bench.stability_measures import (
    MEASURE,
    Measure,
    draw_shares,
    falls,
    scatter,
    share,
    show_falls,
    show_measures,
    show_pairs,
)
from app.bench.stability_rows import up_to, write_file
from app.core.config import load
from app.core.results import STATES
from app.core.run import RunRoot

EPOCHS = [6, 12, 18, 24, 30, 36]


def row(arm: str, seed: int, last: float) -> dict[str, Any]:
    """A training whose frequent classes rise to `last`, whose AP is a tenth of that and whose loss is 7 - AP."""
    frequent = [last * epoch / EPOCHS[-1] for epoch in EPOCHS]
    aps = [value / 10 for value in frequent]
    losses = [7 - ap for ap in aps]
    return {
        "arm": arm, "seed": seed, "epoch": EPOCHS, "AP": dict.fromkeys(STATES, aps), "AP_frequent": frequent,
        "train_loss": losses, "val_loss": losses, "corrected": None,
    }  # fmt: skip


def test_a_measure_is_the_mean_of_the_last_validations() -> None:
    one = row("fp16", 0, 0.36)
    assert Measure("AP_frequent", 1).of(one, 36) == pytest.approx(0.36)
    assert Measure("AP_frequent", 5).of(one, 36) == pytest.approx((0.12 + 0.18 + 0.24 + 0.30 + 0.36) / 5)
    assert Measure("AP", 2).of(one, 24) == pytest.approx((0.018 + 0.024) / 2)
    assert np.isnan(Measure("AP_frequent", 5).of(one, 24))
    del one["AP_frequent"]  # a row from before there was this measure
    assert np.isnan(Measure("AP_frequent", 1).of(one, 36))
    one["AP_frequent"] = None  # no class had enough objects
    assert np.isnan(Measure("AP_frequent", 1).of(one, 36))


def test_scatter_is_the_coefficient_of_variation() -> None:
    rows = [row("fp16", seed, value) for seed, value in enumerate((0.2, 0.3, 0.4))]
    assert scatter(Measure("AP_frequent", 1), rows) == ("0.3000", f"{stdev([0.2, 0.3, 0.4]) / 0.3:.1%}")
    assert scatter(Measure("AP_frequent", 1), rows[:1]) == ("0.2000", "-")


def test_share_is_that_of_pairs() -> None:
    fp16 = [row("fp16", seed, 0.2 + 0.1 * seed) for seed in range(3)]
    half = [row("w4a16", seed, 0.1 + 0.05 * seed) for seed in range(3)]
    assert share(MEASURE, half, fp16) == "0.500 ± 0.000"
    assert share(MEASURE, [row("w4a16", 2, 0.3), row("w4a16", 7, 0.9)], fp16) == "0.750"


def test_table_has_a_line_for_each_candidate(caplog: pytest.LogCaptureFixture) -> None:
    old = row("fp16", 0, 0.4)
    del old["AP_frequent"]
    with caplog.at_level(logging.INFO):
        show_measures([old, row("w4a16", 0, 0.2)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in caplog.messages if line[0] == "|"]
    assert lines[0][3] == "w4a16 (n=1)"
    table = {cells[0]: cells[1:] for cells in lines[2:]}
    names = ("AP", "AP_frequent", "AP_commonest", "val_loss")
    assert list(table) == [f"{name}{last}" for name in names for last in ("", ", last 5")]
    assert table["AP"] == ["0.0400", "-", "0.500"]
    assert table["AP_frequent"] == ["-", "-", "-"]


def test_every_quantized_arm_beside_every_other(caplog: pytest.LogCaptureFixture) -> None:
    """Of the seeds that both have; FP16 has its table, and one arm alone nothing beside it."""
    low = [row("fp16, lrf 0.01", 0, 0.3), row("fp16", 0, 0.4)]
    rows = [*low, row("w4a16", 0, 0.2), row("w4a16", 1, 0.9), row("w8a16", 0, 0.3)]
    with caplog.at_level(logging.INFO):
        show_pairs(rows[:4])
        assert caplog.messages == []
        show_pairs(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in caplog.messages]
    assert lines[0] == ["AP_frequent, last 5, as a share of", "w4a16", "w8a16"]
    assert lines[2:] == [["w4a16", "-", "0.667"], ["w8a16", "1.500", "-"]]


def test_seeds_without_the_measure_are_left_out() -> None:
    """Two of four seeds were trained before there was this number."""
    fp16 = [row("fp16", seed, 0.2) for seed in range(4)]
    half = [row("w4a16", seed, 0.1) for seed in range(4)]
    for old in (fp16[0], half[0], half[3]):
        old.pop("AP_frequent")
    assert share(MEASURE, half, fp16) == "0.500 (n=2)"
    assert scatter(Measure("AP_frequent", 1), fp16) == ("0.2000", "0.0%")
    assert share(Measure("AP", 1), half, fp16) == "0.500 ± 0.000"


def test_falls_below_the_best_are_counted() -> None:
    """The first two validations do not count. One of two seeds falls to 0.8 of its best; their mean, 0.2 after 0.225,
    to 0.89, and over FP16's frequent classes nothing falls."""
    rows = [row("w4a16", seed, 0.3) for seed in range(2)]
    for one, aps in zip(rows, ([0.1, 0.2, 0.25, 0.2], [0.1, 0.2, 0.2, 0.2]), strict=True):
        one |= {"epoch": EPOCHS[:4], "AP": dict.fromkeys(STATES, aps), "AP_frequent": [0.1, 0.2, 0.3, 0.3]}
    assert falls(Measure("AP", 1), rows, 0.9) == ("0.89", "1 of 2")
    assert falls(Measure("AP", 1), rows, 0.7) == ("0.89", "0 of 2")
    assert falls(Measure("AP_frequent", 1), rows, 0.9) == ("1.00", "0 of 2")
    del rows[0]["AP_frequent"]
    assert falls(Measure("AP_frequent", 1), rows, 0.9) == ("1.00", "0 of 1")
    del rows[1]["AP_frequent"]
    assert falls(Measure("AP_frequent", 1), rows, 0.9) == ("-", "-")


def test_a_line_an_arm_tells_the_falls(caplog: pytest.LogCaptureFixture) -> None:
    old = row("w4a16", 0, 0.4)
    del old["AP_frequent"]
    with caplog.at_level(logging.INFO):
        show_falls([row("fp16", 0, 0.4), old], 0.9)
    told = "lowest share of best, mean curve; trainings below 0.9: AP 1.00, 0 of 1"
    assert caplog.messages == [f"fp16: {told}; AP_frequent 1.00, 0 of 1", f"w4a16: {told}"]


def test_picture_has_a_dot_for_each_seed_and_a_bar_for_the_ratio() -> None:
    fp16 = [row("fp16", seed, 0.2) for seed in range(2)]
    figure = draw_shares([*fp16, row("w4a16", 0, 0.1), row("w4a16", 1, 0.2), row("w4a16-mixed", 1, 0.2)])
    assert figure is not None
    (panel,) = figure.axes
    lines = [np.asarray(line.get_xdata()).tolist() for line in panel.lines[1:]]
    assert lines == [pytest.approx([0.5, 1.0]), pytest.approx([0.75]), pytest.approx([1.0]), pytest.approx([1.0])]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["w4a16 (n=2)", "w4a16-mixed (n=1)"]
    assert draw_shares(fp16) is None


def test_picture_has_the_standard_error_and_room_for_the_outer_lines() -> None:
    """Shares 0.9, 1 and 1.1: deviation 0.1, standard error 0.1 / sqrt(3)."""
    fp16 = [row("fp16", seed, 0.2) for seed in range(3)]
    figure = draw_shares([*fp16, *(row("w4a16", seed, 0.18 + 0.02 * seed) for seed in range(3))])
    assert figure is not None
    (panel,) = figure.axes
    error = 0.1 / 3**0.5
    assert np.asarray(panel.lines[-1].get_xdata()).tolist() == pytest.approx([1 - error, 1 + error])
    assert panel.get_ylim() == (0.5, -0.5)
    assert len(set(np.asarray(panel.lines[1].get_ydata()).tolist())) == 3


def test_a_shorter_row_has_shorter_curves() -> None:
    shorter = up_to(row("fp16", 0, 0.36), 12)
    assert shorter is not None and shorter["AP_frequent"] == pytest.approx([0.06, 0.12])


def test_trainings_of_another_machine_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ["model=yolov10n.yaml", "train.epochs=36"]
    run, started = RunRoot(tmp_path, "stability"), []
    whole, cut = row("fp16", 0, 0.3), {**row("fp16", 1, 0.3), "epoch": EPOCHS[:-1]}
    training = training_of(run, "fp16", 0, [], sets)
    assert is_among(training, [whole]) and not is_among(training, [cut])
    assert is_among(training, [{**whole, "AP_frequent": None}])  # no class has enough objects
    del cut["AP_frequent"]
    assert not is_among(training, [{**cut, "epoch": EPOCHS}])  # of before there was this number
    write_file(tmp_path / "a.json", recipe(load("qat", sets=sets), {"fp16": []}), [whole])
    monkeypatch.setattr("app.bench.stability.prepare", lambda config, root, force: None)
    monkeypatch.setattr("app.bench.stability.train_all", lambda trainings, *_: started.extend(trainings))
    plan = Plan(["fp16"], [0, 1], for_s=60, n_jobs=1, files=(tmp_path / "a.json",))
    bench_stability(run, [], sets, plan)
    assert [training.seed for training in started] == [1]


def test_a_training_without_its_correction_is_made_to_its_end(tmp_path: Path) -> None:
    arm = "float warm-up, correction"
    training = training_of(RunRoot(tmp_path, "stability"), arm, 0, [], ["train.epochs=36"])
    whole = row(arm, 0, 0.3)
    assert not is_among(training, [whole])
    assert is_among(training, [{**whole, "corrected": 0.04}])
