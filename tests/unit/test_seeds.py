"""Runs with other seeds, merged: means and spreads worked by hand, and what may not be merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.core.config import Config, UserError, load
from app.core.run import RunRoot
from app.report.page_files import MAX_ENDING, page_of
from app.report.publish import publish
from app.report.report import report
from tests.support.drawn import kept_figures
from tests.support.page_numbers import numbers_without_source
from tests.support.report_fixtures import SHA, add_ptq, build_run, edit, metrics, set_in, write

APS = {"a": (0.40, 0.39), "b": (0.42, 0.39), "c": (0.44, 0.42)}  # run -> AP of fp16, of qat


@pytest.fixture
def config() -> Config:
    return load("qat")


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRoot]:
    made = []
    for seed, (name, (fp16, qat)) in enumerate(APS.items()):
        made.append(build_run(tmp_path, name, seed))
        edit(made[-1].root / "baseline-coco/metrics.json", "coco.AP", fp16)
        edit(made[-1].root / "qat-w4a16-coco/metrics.json", "coco.AP", qat)
    return made


def merged(config: Config, runs: list[RunRoot]) -> tuple[str, dict[str, Any]]:
    with kept_figures():
        report(config, runs[0], runs[1:])
    files = page_of(runs[0], runs[1:])
    return files.markdown.read_text(), json.loads(files.numbers.read_text())


def test_mean_spread_and_number_worked_by_hand(config: Config, runs: list[RunRoot]) -> None:
    text, found = merged(config, runs)
    over = found["seeds"]["over_runs"]
    assert over["baseline-coco"]["AP"] == pytest.approx({"n": 3, "mean": 0.42, "sd": 0.02})
    # Differences -0.01, -0.03, -0.02: taken within a run, their spread is not that of the APs.
    assert over["qat-w4a16-coco"]["AP_difference"] == pytest.approx({"n": 3, "mean": -0.02, "sd": 0.01})
    assert "AP 0.4000 ± 0.0173 against 0.4200 ± 0.0200 of the FP16 training, -0.0200 ± 0.0100**" in text
    assert "sample standard deviation over 3 runs with other seeds" in text
    assert "n=1" not in text
    assert text.startswith("# What 4-bit weights cost: run `a, b, c`")
    assert numbers_without_source(text, runs[0].root) == []


def test_a_run_without_qat_counts_where_it_can(config: Config, runs: list[RunRoot]) -> None:
    (runs[2].root / "qat-w4a16-coco/metrics.json").unlink()
    text, found = merged(config, runs)
    over = found["seeds"]["over_runs"]
    assert (over["baseline-coco"]["AP"]["n"], over["qat-w4a16-coco"]["AP"]["n"]) == (3, 2)
    assert "- c: eval: qat-w4a16 was exported but not scored" in text


def test_a_row_that_the_first_run_lacks_is_that_of_the_first_run_that_has_it(
    config: Config, runs: list[RunRoot]
) -> None:
    """w8a16 failed in a and was trained in b and c: 0.40 - 0.42 and 0.41 - 0.44, each against its own baseline."""
    for run, ap, size_bytes in ((runs[1], 0.40, 2_700_000), (runs[2], 0.41, 2_700_001)):
        write(run.root / "qat-w8a16-coco/metrics.json", metrics("qat-w8a16", "w8.onnx", SHA["qat"], ap, size_bytes))
        write(run.root / "ptq-w8a16-coco/metrics.json", metrics("ptq-w8a16", "p8.onnx", SHA["qat"], ap - 0.1, 5))
    text, found = merged(config, runs)
    row = next(row for row in found["groups"][0]["rows"] if row["label"] == "qat-w8a16")
    assert row["over_runs"]["AP_difference"]["mean"] == pytest.approx(-0.025) and row["over_runs"]["AP"]["n"] == 2
    assert (row["AP_difference"], row["size_mb"]) == (pytest.approx(-0.02), 2.7), "of b, and not against a's baseline"
    assert [row["label"] for row in found["groups"][0]["rows"]] == ["baseline", "qat-w4a16", "ptq-w8a16", "qat-w8a16"]
    assert "**qat-w8a16: AP 0.4050 ± 0.0071 against 0.4200 ± 0.0200 of the FP16 training" in text
    assert "QAT against the better PTQ: +0.1000" in text
    assert "`../b/onnx/w8.onnx`" in text and "(../b/qat-w8a16-coco/metrics.json)" in text
    publish(runs[0], None, False, runs[1:])
    assert "qat-w8a16 0.4050 ± 0.0071 (-0.0250 ± 0.0071, n=2)" in (runs[0].runs_dir / "LOG.md").read_text()


def test_a_baseline_that_the_first_run_lacks_is_that_of_another(config: Config, runs: list[RunRoot]) -> None:
    (runs[0].root / "baseline-coco/metrics.json").unlink()
    text, found = merged(config, runs)
    baseline, qat = found["groups"][0]["rows"]
    assert (baseline["AP"], qat["AP"], qat["over_runs"]["AP_difference"]["n"]) == (0.42, 0.39, 2)
    assert "**qat-w4a16: AP 0.4000 ± 0.0173 against 0.4300 ± 0.0141 of the FP16 training" in text


def test_health_is_told_of_every_run(config: Config, runs: list[RunRoot]) -> None:
    """The first at length: the others would else be taken for as healthy as it is."""
    history = runs[1].variant_dir("qat-w4a16") / "results.csv"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([*lines[:-1], lines[-1].replace(lines[-1].split(",")[5], "nan", 1)]) + "\n")
    text, _ = merged(config, runs)
    (line,) = (line for line in text.splitlines() if line.startswith("**Training:**"))
    assert "fp16 of a is healthy" in line
    assert line.endswith("; qat-w4a16 of b is **not healthy**; all of c are healthy.")
    (losses,) = (line for line in text.splitlines() if line.startswith("**Losses:**"))
    assert "qat-w4a16's of a differ from fp16's by" in losses


def test_log_counts_the_runs_of_each_row(config: Config, runs: list[RunRoot]) -> None:
    (runs[2].root / "qat-w4a16-coco/metrics.json").unlink()
    add_ptq(runs[0])
    edit(runs[0].root / "ptq-w4a16-coco/metrics.json", "settings.conf", 0.25)  # a table of its own
    merged(config, runs)
    publish(runs[0], None, False, runs[1:])
    (line,) = (line for line in (runs[0].runs_dir / "LOG.md").read_text().splitlines() if "**result:**" in line)
    first, *_, last = line.split("; ")
    assert ", n=3: baseline 0.4200 ± 0.0200, ptq-w4a16-bn 0.3987 (-0.0013, n=1), qat-w4a16 " in first
    assert first.endswith("qat-w4a16 0.3900 ± 0.0000 (-0.0200 ± 0.0141, n=2)")  # differences -0.01 and -0.03
    assert ", n=1: ptq-w4a16 " in last


def test_one_run_has_no_spread(config: Config, runs: list[RunRoot]) -> None:
    add_ptq(runs[0])
    text, found = merged(config, runs)
    assert found["seeds"]["over_runs"]["ptq-w4a16-coco"]["AP"] == pytest.approx({"n": 1, "mean": 0.2198, "sd": None})
    assert "has AP 0.2198 (" in text


def test_settings_that_no_training_reads_may_differ(config: Config, runs: list[RunRoot]) -> None:
    """How the files were scored is compared where it was recorded, with the scores."""
    for number, run in enumerate(runs, start=1):
        set_in(run.variant_dir("qat-w4a16") / "config.yaml", "eval.latency_runs", number)
    assert merged(config, runs)[1]["seeds"]["over_runs"]["qat-w4a16-coco"]["AP"]["n"] == 3


def test_other_settings_are_refused_by_name(config: Config, runs: list[RunRoot]) -> None:
    path = runs[1].variant_dir("qat-w4a16") / "config.yaml"
    path.write_text(path.read_text().replace("imgsz: 640", "imgsz: 320").replace("workers: 8", "workers: 2"))
    with pytest.raises(UserError, match=r"b cannot be merged with a: .* more than seeds \(train.imgsz: 640 -> 320\)"):
        merged(config, runs)
    assert not list(runs[0].root.glob("summary*"))


def test_the_same_seed_is_no_second_sample(config: Config, tmp_path: Path) -> None:
    twins = [build_run(tmp_path, name, seed=3) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"same seeds in both \(train.seed=3"):
        merged(config, twins)


def test_another_meter_is_refused(config: Config, runs: list[RunRoot]) -> None:
    for name in ("baseline-coco", "qat-w4a16-coco"):
        edit(runs[1].root / name / "metrics.json", "settings.conf", 0.25)
    with pytest.raises(UserError, match="measured differently"):
        merged(config, runs)


@pytest.mark.parametrize("words", ["--runs a b c", "--run a --runs b c", "--run a --runs a b c"])
def test_command_line_writes_the_page_of_the_first(runs: list[RunRoot], words: str) -> None:
    """Make names the run itself: RUN=a ARGS="--runs b c"."""
    command = [sys.executable, "-m", "app", "report", *words.split(), "--runs-dir", str(runs[0].runs_dir)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "0.4200 ± 0.0200" in made.stderr
    assert (runs[0].root / "summary-with-b-c.md").exists() and not list(runs[1].root.glob("summary*"))
    assert not (runs[0].runs_dir / "full").exists()


def app(*words: str, runs_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", *words, "--runs-dir", str(runs_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("lost", "first", "other"), [("b", "a", "c"), ("a", "b", "c")])
def test_a_sweep_is_reported_and_published_without_a_run_that_has_no_scores(
    runs: list[RunRoot], lost: str, first: str, other: str
) -> None:
    """One of three has failed, and a fourth seed has not begun."""
    runs_dir = runs[0].runs_dir
    write(runs_dir / "s" / "sweep.json", {"runs": {"a": 0, "b": 1, "c": 2, "d": 3}})
    for path in (runs_dir / lost).glob("*-coco/metrics.json"):
        path.unlink()
    made = app("report", "--run", "s", runs_dir=runs_dir)
    assert made.returncode == 0, made.stderr
    line = "{}: nothing was scored, the run is left out: the command of its sweep goes on"
    page = (runs_dir / first / f"summary-with-{other}.md").read_text()
    for name in (lost, "d"):
        assert f"missing: {line.format(name)}" in made.stderr and f"- {line.format(name)}" in page
    assert "± " in page
    published = app("publish", "--run", "s", runs_dir=runs_dir)
    assert published.returncode == 0, published.stderr
    assert (runs_dir / "reports" / f"{first}-with-{other}" / "summary.md").exists()
    named = app("report", "--runs", first, lost, other, runs_dir=runs_dir)
    assert named.returncode == 2 and f"{lost} has no scores, run 'make eval' first" in named.stderr


def test_a_sweep_with_one_scored_run_has_the_page_of_that(runs: list[RunRoot]) -> None:
    runs_dir = runs[0].runs_dir
    write(runs_dir / "s" / "sweep.json", {"runs": {"a": 0, "d": 3}})
    made = app("report", "--run", "s", runs_dir=runs_dir)
    assert made.returncode == 0 and "missing: d: nothing was scored" in made.stderr
    assert "- d: nothing was scored" in runs[0].summary.read_text()
    assert "state" not in json.loads(runs[0].run_json.read_text())["stages"]["report"], "another seed changes the page"


def test_the_own_page_of_a_run_is_not_overwritten(config: Config, runs: list[RunRoot]) -> None:
    with kept_figures():
        report(config, runs[0])
    own = {path: path.read_bytes() for path in page_of(runs[0]).run.root.glob("summary.*")}
    numbers = (runs[0].root / "report.json").read_bytes()
    text, _ = merged(config, runs)
    assert len(own) == 2
    assert {path: path.read_bytes() for path in own} == own
    assert (runs[0].root / "report.json").read_bytes() == numbers
    assert "[report-with-b-c.json](report-with-b-c.json)" in text
    assert {"report", "report-with-b-c"} <= set(json.loads(runs[0].run_json.read_text())["stages"])


def test_own_and_merged_page_are_published_apart(
    config: Config, runs: list[RunRoot], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "app")
    with kept_figures():
        report(config, runs[0])
        report(config, runs[0], runs[1:])
    assert "'make publish RUN=a ARGS=\"--runs b c\"' keeps it in runs/reports" in caplog.text
    publish(runs[0], None, force=False)
    publish(runs[0], None, False, runs[1:])
    reports_dir = runs[0].runs_dir / "reports"
    own, both = ((reports_dir / name / "summary.md").read_text() for name in ("a", "a-with-b-c"))
    assert own.startswith("# What 4-bit weights cost: run `a`\n")
    assert both.startswith("# What 4-bit weights cost: run `a, b, c`\n")
    assert (reports_dir / "a-with-b-c" / "report-with-b-c.json").exists()
    assert not (reports_dir / "a-with-b-c" / "report.json").exists()
    assert "(reports/a-with-b-c/summary.md)" in (runs[0].runs_dir / "LOG.md").read_text()


@pytest.mark.parametrize("name", ["seed-number-", "s" * 90])
def test_a_page_of_many_runs_has_a_short_name_of_its_own(tmp_path: Path, name: str) -> None:
    others = [RunRoot(tmp_path, f"{name}{i}") for i in range(1, 16)]
    found = [page_of(RunRoot(tmp_path, "a"), part).ending for part in (others, others[1:], [*others[:-1], others[1]])]
    assert found[0].startswith(f"-with-{name[:10]}") and "-and-14-more-" in found[0]
    assert len(set(found)) == 3 and max(map(len, found)) <= MAX_ENDING
    assert page_of(RunRoot(tmp_path, "a"), others).ending == found[0]


def test_a_page_of_three_seeds_names_them(tmp_path: Path) -> None:
    first, *others = (RunRoot(tmp_path, f"coco-yolov10m-seed{i}") for i in range(3))
    assert page_of(first, others[:1]).markdown.name == "summary-with-coco-yolov10m-seed1.md"
    assert page_of(RunRoot(tmp_path, "curve-seed0"), [RunRoot(tmp_path, f"curve-seed{i}") for i in (1, 2)]).ending == (
        "-with-curve-seed1-curve-seed2"
    )
