"""The verdict: how many trainings, on what data, and whether the difference is larger than chance makes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from app.coco.dataset import BUILTIN_TITLE
from app.core.config import load
from app.core.environment import REPO_DIR
from app.core.run import RunRoot
from app.report import spread
from app.report.page_files import page_of
from app.report.report import report
from app.report.spread import seed_spread, telling_of_means
from tests.support.drawn import kept_figures
from tests.support.report_fixtures import SHA, build_run, edit, metrics, write, write_bench_rows

BENCH = "app.report.spread.ROWS"
DIFFERENCE = "-0.0123"  # of build_run


@pytest.fixture
def run(tmp_path: Path) -> RunRoot:
    return build_run(tmp_path)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the kept rows of the stability bench by FP16 trainings of these APs."""

    def replace(*aps: float) -> None:
        monkeypatch.setattr(BENCH, write_bench_rows(tmp_path / "rows.json", aps))

    return replace


def top(run: RunRoot, *others: RunRoot) -> str:
    """The page down to its first section."""
    with kept_figures():
        report(load("qat"), run, others)
    return page_of(run, others).markdown.read_text().partition("\n## ")[0]


def box(run: RunRoot) -> str:
    return top(run).split("\n\n")[1]


def test_spread_of_seeds_by_hand(bench: Callable[..., None]) -> None:
    """At epoch 4: mean 0.03, sample standard deviation 0.01."""
    bench(0.02, 0.03, 0.04)
    found = seed_spread()
    assert (found["n"], found["epoch"], found["imgsz"], found["model"]) == (3, 4, 320, "yolov10n.yaml")
    assert (found["mean"], found["sd"], found["share"]) == pytest.approx((0.03, 0.01, 1 / 3))
    assert found["telling_share"] == pytest.approx(2 * math.sqrt(2) / 3)


def test_seeds_count_up_to_the_last_epoch_that_all_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.02 and 0.04 at epoch 4; a later epoch of one seed, other states and other arms do not count."""
    rows = [
        {"arm": "fp16", "epoch": [2, 4, 6], "AP": {"raw": [0, 0, 0], "ema_bn": [0.0, 0.02, 0.9]}},
        {"arm": "fp16", "epoch": [4], "AP": {"raw": [0], "ema_bn": [0.04]}},
        {"arm": "w4a16", "epoch": [4], "AP": {"raw": [0], "ema_bn": [0.7]}},
    ]
    write(tmp_path / "rows.json", {"config": {"model": "m", "train.imgsz": 1}, "rows": rows})
    monkeypatch.setattr(BENCH, tmp_path / "rows.json")
    assert (seed_spread()["n"], seed_spread()["epoch"], seed_spread()["mean"]) == (2, 4, pytest.approx(0.03))


def test_the_kept_rows_are_those_of_the_repository_and_in_the_image() -> None:
    assert spread.ROWS.is_relative_to(REPO_DIR)
    assert f"!{Path(spread.SOURCE).parts[0]}" in (REPO_DIR / ".dockerignore").read_text().split()
    assert seed_spread()["n"] >= 3


def test_a_difference_that_two_trainings_have_by_chance(run: RunRoot, bench: Callable[..., None]) -> None:
    """Spread 0.02 of the AP: 2 * sqrt(2) * 0.02 * 0.4321 = 0.0244."""
    bench(0.0294, 0.03, 0.0306)
    told = f"{DIFFERENCE}** (n=1, small set, val2017, 1,200 images). That is less than about 0.024, by which"
    assert told in box(run)


def test_a_difference_beyond_chance(run: RunRoot, bench: Callable[..., None]) -> None:
    """Spread 0.01 of the AP: the limit is 0.0122, the difference 0.0123."""
    bench(0.0297, 0.03, 0.0303)
    told = f"{DIFFERENCE}** (n=1, small set, val2017, 1,200 images). That is more than about 0.012, by which"
    assert told in box(run)


def test_the_source_and_its_limits_are_named(run: RunRoot, bench: Callable[..., None]) -> None:
    bench(0.0297, 0.03, 0.0303)
    text = top(run)
    assert "one above about 0.03 of the AP, with one training each" in text
    assert "2 x sqrt(2) x the spread between seeds, 0.01 of the AP" in text
    assert "of 3 FP16 trainings, docs/stability.json" in text
    assert "yolov10n at 320 px on a small part of COCO, at an AP of 0.030 after 4 epochs" in text
    assert "anywhere else it is only an orientation" in text


def test_ptq_is_not_another_training(run: RunRoot) -> None:
    """Where no QAT was scored, nothing differs by a seed."""
    (run.root / "qat-w4a16-coco/metrics.json").unlink()
    ptq = metrics("ptq-w4a16", "net-w4a16-qcdq-ptq.onnx", SHA["qat"], 0.40, 9)
    write(run.root / "ptq-w4a16-coco/metrics.json", ptq)
    text = top(run)
    assert "**ptq-w4a16: AP 0.4000 against 0.4321" in text
    assert "by chance" not in text and "How large" not in text


@pytest.mark.parametrize(
    ("subset", "told"),
    [(False, "n=1, 1,200 drawn images: says"), (True, "n=1, SUBSET of 1,200 of 3,000 drawn images: says")],
)
def test_drawn_images_say_nothing_about_coco(run: RunRoot, subset: bool, told: str) -> None:
    for name in ("baseline-coco", "qat-w4a16-coco"):
        edit(run.root / name / "metrics.json", "dataset.title", BUILTIN_TITLE)
        edit(run.root / name / "metrics.json", "dataset.subset", subset)
        edit(run.root / name / "metrics.json", "dataset.n_images_listed", 3000 if subset else 1200)
    assert f"({told} nothing about COCO)" in box(run)


@pytest.mark.parametrize(("base_ap", "is_judged"), [(0.0099, False), (0.01, True)])
def test_a_baseline_near_zero_cannot_be_judged(run: RunRoot, base_ap: float, is_judged: bool) -> None:
    edit(run.root / "baseline-coco/metrics.json", "coco.AP", base_ap)
    text = top(run)
    told = text.split("\n\n")[1]
    assert ("How large a difference" in text) == is_judged
    assert ("**qat-w4a16: cannot be judged**, AP 0.4198 against 0.0099 of the FP16 training (n=1" in told) != is_judged
    assert ("below 0.01 an AP rests on a handful of boxes" in told) != is_judged
    assert ("by chance" in told) == is_judged


def test_a_quantized_model_near_zero_is_a_verdict(run: RunRoot) -> None:
    edit(run.root / "qat-w4a16-coco/metrics.json", "coco.AP", 0.0002)
    assert "**qat-w4a16: AP 0.0002 against 0.4321 of the FP16 training, -0.4319**" in box(run)


@pytest.mark.parametrize(("n", "limit"), [(1, None), (2, None), (3, 0.04303 / math.sqrt(3)), (4, 0.01591)])
def test_limit_of_means_is_that_of_students_t(n: int, limit: float | None) -> None:
    found = telling_of_means({"n": n, "mean": -0.02, "sd": None if n == 1 else 0.01})
    assert found == (None if limit is None else pytest.approx(limit, rel=1e-3))


def seeds(tmp_path: Path, differences: list[float]) -> list[RunRoot]:
    runs = []
    for seed, change in enumerate(differences):
        runs.append(build_run(tmp_path, f"run{seed}", seed))
        edit(runs[-1].root / "baseline-coco/metrics.json", "coco.AP", 0.4)
        edit(runs[-1].root / "qat-w4a16-coco/metrics.json", "coco.AP", 0.4 + change)
    return runs


def test_merged_runs_are_judged_by_their_own_spread(tmp_path: Path) -> None:
    """-0.03, -0.05, -0.04: mean -0.04, deviation 0.01, limit 4.303 * 0.01 / sqrt(3) = 0.0248."""
    text = top(*seeds(tmp_path, [-0.03, -0.05, -0.04]))
    assert "(n=3, small set, val2017, 1,200 images; mean ± sample standard deviation over 3 runs" in text
    assert "That is more than 0.0248, which chance exceeds once in twenty." in text
    assert "by chance" not in text and "stability.json" not in text


def test_a_mean_within_its_own_spread(tmp_path: Path) -> None:
    """+0.02, -0.03, -0.02: mean -0.01, deviation sqrt(0.0007) = 0.0265, limit 0.0657."""
    text = top(*seeds(tmp_path, [0.02, -0.03, -0.02]))
    assert "That is less than 0.0657, which chance exceeds once in twenty." in text


def test_two_runs_have_no_spread_to_judge_by(tmp_path: Path) -> None:
    text = top(*seeds(tmp_path, [-0.01, -0.03]))
    assert "n=2, small set" in text
    assert "Too few runs for a spread: merge 3 or more." in text
