"""The report: golden page, every number from a file, nothing invented for a broken run, one table one meter."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.core.config import Config, UserError, load
from app.core.results import read_rows, write_rows
from app.core.run import RunRoot
from app.report.evidence import gather
from app.report.report import report
from tests.support.drawn import kept_figures
from tests.support.page_numbers import NUMBER, numbers_without_source
from tests.support.report_fixtures import (
    SHA,
    add_ptq,
    build_run,
    edit,
    export_file,
    metrics,
    set_in,
    write,
    write_bench_rows,
)

GOLDEN = Path(__file__).with_name("golden_summary.md")


@pytest.fixture
def config() -> Config:
    return load("qat")


@pytest.fixture
def run(tmp_path: Path) -> RunRoot:
    return build_run(tmp_path)


def page(config: Config, run: RunRoot) -> str:
    """The page alone: its figures are made, but not painted."""
    with kept_figures():
        report(config, run)
    return run.summary.read_text(encoding="utf-8")


def test_page_equals_golden_file(config: Config, run: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """To renew the file after a wanted change: copy the page that the failure names over it, and read the diff."""
    monkeypatch.setattr("app.report.spread.ROWS", write_bench_rows(run.runs_dir / "rows.json", (0.028, 0.030, 0.032)))
    text = page(config, run)
    made = run.runs_dir / "golden_summary.md"
    made.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"the new page is {made}"


def test_every_number_is_in_a_json_or_csv(config: Config, run: RunRoot) -> None:
    text = page(config, run)
    assert len(NUMBER.findall(text)) > 100
    assert numbers_without_source(text, run.root) == []


@pytest.mark.parametrize("number", ["0.4321", "-0.0123", "1,200", "2.66", "3.25"])
def test_a_number_from_nowhere_is_seen(config: Config, run: RunRoot, number: str) -> None:
    text = page(config, run)
    assert number in text
    other = number[:-1] + str((int(number[-1]) + 3) % 10)
    assert other in numbers_without_source(text.replace(number, other), run.root)


def test_derived_numbers(config: Config, run: RunRoot) -> None:
    page(config, run)
    base, row = json.loads((run.root / "report.json").read_text())["groups"][0]["rows"]
    assert base["AP_difference"] is None
    assert row["AP_difference"] == pytest.approx(0.4198 - 0.4321)
    assert row["size_share"] == pytest.approx(2663676 / 9284375)


STAGES = {
    "data": ("dataset/provenance.json", "data: dataset/provenance.json is missing"),
    "no fp16": ("fp16", "train: fp16 was not trained"),
    "no qat": ("qat-w4a16", "train: no QAT variant was trained"),
    "unfinished": ("qat-w4a16/done.json", "train: qat-w4a16 has not finished, 4 of 4 epochs"),
    "no curve": ("fp16/results.csv", "train: fp16 cannot be read"),
    "no noise": ("qat-w4a16/health.json", "train: qat-w4a16/health.json is missing"),
    "no layers": ("qat-w4a16/quant_config.json", "train: qat-w4a16/quant_config.json is missing"),
    "no machine": ("fp16/env.json", "train: fp16/env.json is missing"),
    "export": ("onnx", "export: no ONNX file of qat-w4a16"),
    "no baseline score": ("baseline-coco", "eval: baseline was exported but not scored"),
}  # fmt: skip


@pytest.mark.parametrize(("lost", "line"), STAGES.values(), ids=STAGES)
def test_partial_run_says_what_is_missing(config: Config, run: RunRoot, lost: str, line: str) -> None:
    path = run.root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = page(config, run)
    assert f"- {line}" in text
    assert str(run.root) not in text
    assert numbers_without_source(text, run.root) == []


def test_ptq_that_is_not_exported_or_of_an_older_baseline_is_named(run: RunRoot) -> None:
    write(run.root / "ptq-w4a16/done.json", {"best_sha256": "new"})
    write(run.root / "ptq-w4a16-bn/done.json", {"best_sha256": "new"})
    export_file(run, "ptq-w4a16-bn", "net-ptq-bn.onnx", "old")
    lines = [line for line in gather(run).missing if line.startswith("export:")]
    assert lines == [
        "export: net-ptq-bn.onnx is not of the best checkpoint of now: run 'make export'",
        "export: no ONNX file of ptq-w4a16: run 'make export'",
    ]


@pytest.mark.parametrize("name", ["dataset/provenance.json", "fp16/env.json", "baseline-coco/metrics.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {}}'])
def test_broken_file_is_named(config: Config, run: RunRoot, name: str, content: str) -> None:
    (run.root / name).write_text(content)
    assert re.search(rf"^- \w+: {name} (is not valid JSON|lacks )", page(config, run), re.MULTILINE)


def test_nothing_but_the_folder(config: Config, tmp_path: Path) -> None:
    run = RunRoot(tmp_path, "empty")
    run.root.mkdir()
    text = page(config, run)
    assert "**No verdict:**" in text
    for stage in ("data", "train", "eval"):
        assert f"- {stage}: " in text
    assert "## Environment" not in text


def test_no_such_run(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch does not exist"):
        report(config, RunRoot(tmp_path, "nosuch"))
    assert list(tmp_path.iterdir()) == []


def test_no_baseline_no_verdict(config: Config, run: RunRoot) -> None:
    shutil.rmtree(run.root / "baseline-coco")
    text = page(config, run)
    assert "**qat-w4a16: no verdict**" in text
    assert "against" not in text.partition("##")[0]


def test_stale_files_are_named(config: Config, run: RunRoot) -> None:
    export_file(run, "baseline", "net-baseline-fp32.onnx", "f" * 64)
    edit(run.root / "qat-w4a16-coco/metrics.json", "model.sha256", "e" * 64)
    text = page(config, run)
    assert "- export: net-baseline-fp32.onnx is not of the best checkpoint" in text
    assert "- eval: qat-w4a16-coco/metrics.json is of an older net-w4a16-qcdq-qat.onnx" in text


METERS = {
    "subset": {"dataset.subset": True, "dataset.n_images": 100, "dataset.image_ids_sha256": "0" * 64},
    "dataset": {"dataset.annotation_sha256": "0" * 64},
    "images": {"dataset.image_ids_sha256": "0" * 64},
    "threshold": {"settings.conf": 0.25},
    "detections": {"settings.max_det": 100},
    "evaluator": {"settings.evaluator": "another"},
    "input size": {"model.imgsz": 32},
}


@pytest.mark.parametrize("changes", METERS.values(), ids=METERS)
def test_rows_measured_otherwise_are_set_apart(config: Config, run: RunRoot, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        edit(run.root / "qat-w4a16-coco/metrics.json", key, value)
    text = page(config, run)
    assert "**qat-w4a16: no verdict**" in text
    assert text.count("Set apart: measured otherwise") == 2  # the table of results and that of all COCO numbers
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert not ("net-baseline-fp32.onnx |" in table and "net-w4a16-qcdq-qat.onnx |" in table)
        assert "AR_100" not in table or not re.match(r"\|.* baseline .* qat-w4a16 ", table)


def test_subset_is_labelled(config: Config, run: RunRoot) -> None:
    for name in ("baseline-coco", "qat-w4a16-coco"):
        edit(run.root / name / "metrics.json", "dataset.subset", True)
        edit(run.root / name / "metrics.json", "dataset.n_images", 100)
    text = page(config, run)
    assert text.count("SUBSET of 100 of 1,200 images") == 2  # verdict and table


def test_ptq_stands_beside_the_qat_of_its_scheme(config: Config, run: RunRoot) -> None:
    add_ptq(run)
    text = page(config, run)
    first = text.splitlines()[2]
    assert first.startswith("**qat-w4a16: AP 0.4198 against 0.4321 of the FP16 training, -0.0123**")
    assert "(PTQ) has AP 0.2198 (-0.2123), with BatchNorm re-estimated 0.3987 (-0.0334)" in first
    assert "QAT against the better PTQ: +0.0211." in first
    assert "**ptq-w4a16" not in text
    rows = re.findall(r"^\| ((?:baseline|ptq|qat)\S*) +\|.*onnx \|$", text, re.MULTILINE)
    assert rows == ["baseline", "ptq-w4a16", "ptq-w4a16-bn", "qat-w4a16"]
    assert numbers_without_source(text, run.root) == []


def test_ptq_of_a_scheme_that_was_not_trained_speaks_for_itself(config: Config, run: RunRoot) -> None:
    ptq = metrics("ptq-w8a16", "net-w8a16-qcdq-ptq.onnx", SHA["qat"], 0.4298, 2663676)
    write(run.root / "ptq-w8a16-coco/metrics.json", ptq)
    text = page(config, run)
    assert "**ptq-w8a16: AP 0.4298 against 0.4321 of the FP16 training, -0.0023**" in text
    assert "QAT against" not in text


def test_a_baseline_that_learned_nothing_is_called_so(config: Config, run: RunRoot) -> None:
    edit(run.root / "baseline-coco/metrics.json", "coco.AP", 0.0002)
    assert "- The baseline detects next to nothing" in page(config, run)


def test_unmeasurable_is_a_dash(config: Config, run: RunRoot) -> None:
    edit(run.root / "qat-w4a16-coco/metrics.json", "coco.AP", None)
    text = page(config, run)
    assert "no verdict**, AP -" in text
    assert "None" not in text.partition("```yaml")[0]


def write_aps(run: RunRoot, aps: list[float], n_warm: int = 0) -> None:
    path = run.variant_dir("fp16") / "results.csv"
    with open(path, newline="") as file:
        template = next(csv.DictReader(file))
    rows = [template | {"epoch": epoch, "AP/ema_bn": ap} for epoch, ap in enumerate(aps, 1)]
    rows = [row | {"quant/warm_up": int(epoch <= n_warm) or ""} for epoch, row in enumerate(rows, 1)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


HEALTH = {
    "steady": ([0.1, 0.2, 0.3, 0.3], "fp16 is healthy, its AP never fell below its running best;"),
    "fell": ([0.1, 0.2, 0.4, 0.1], "fp16 is **not healthy**, its AP fell to 0.250 of its running best at epoch 4"),
    "came back": ([0.1, 0.4, 0.2, 0.5], "fp16 is **not healthy**, its AP fell to 0.500 of its running best at epoch 3"),
    "best in warm-up": ([0.4, 0.2, 0.4, 0.4], "fp16 is **not healthy**, its AP fell to 0.500"),
    "just above": ([0.1, 0.4, 0.37, 0.4], "fp16 is healthy"),
    "nan": ([0.1, 0.2, float("nan"), 0.3], "fp16 is **not healthy**, results.csv holds NaN"),
    "one epoch": ([0.1], "fp16 cannot be judged: no validation after warm-up with an AP of 0.01 behind it"),
    "noise": ([0.0001, 0.0004, 0.0001, 0.002], "fp16 cannot be judged"),
    "always zero": ([0.0, 0.0, 0.0], "fp16 cannot be judged"),
}


@pytest.mark.parametrize(("aps", "said"), HEALTH.values(), ids=HEALTH)
def test_health(config: Config, run: RunRoot, aps: list[float], said: str) -> None:
    write_aps(run, aps)  # warm-up is epoch 1
    assert said in page(config, run)


def test_losses_beside_fp16(config: Config, run: RunRoot) -> None:
    """At the last epoch that both have validated, before an FP16 training that went on."""
    told = "at epoch {} qat-w4a16's differ from fp16's by +0.0200 on train images and +0.0400 on validation images"
    assert told.format(4) in page(config, run)
    rows = read_rows(run.variant_dir("qat-w4a16") / "results.csv")
    write_rows(run.variant_dir("qat-w4a16") / "results.csv", rows[:2])
    assert told.format(2) in page(config, run)
    shutil.rmtree(run.variant_dir("fp16"))
    assert "**Losses:**" not in page(config, run)


def test_a_fall_during_warm_up_does_not_count(config: Config, run: RunRoot) -> None:
    path = run.variant_dir("fp16") / "config.yaml"
    path.write_text(path.read_text().replace("warmup_epochs: 1.0", "warmup_epochs: 2.5"))
    write_aps(run, [0.4, 0.1, 0.2, 0.4])
    assert "fp16 is healthy, its AP never fell below its running best;" in page(config, run)


def test_the_quant_warm_up_is_neither_best_nor_a_fall(config: Config, run: RunRoot) -> None:
    write_aps(run, [0.1, 0.5, 0.5, 0.2, 0.3], n_warm=3)
    text = page(config, run)
    assert "fp16 is healthy, its AP never fell below its running best;" in text
    trained = json.loads((run.root / "report.json").read_text())["trainings"]["fp16"]
    assert (trained["best_epoch"], trained["AP"]["ema_bn"]) == (5, 0.3)


def test_doubts(config: Config, run: RunRoot) -> None:
    edit(run.variant_dir("fp16") / "env.json", "code_version", "abc-dirty")
    path = run.variant_dir("qat-w4a16") / "config.yaml"
    path.write_text(path.read_text().replace("imgsz: 640", "imgsz: 320").replace("save_period: 0", "save_period: 2"))
    set_in(path, "eval.latency_runs", 7)  # no training reads it
    parity = {"max_box_px": 240.0, "max_score": 0.31, "magnifies_rounding": True}
    edit(next(run.onnx_dir.glob("*baseline*.json")), "gates", {"parity": parity})
    text = page(config, run)
    assert "is off torch by 2.4e+02 px and 0.31 in score: its network magnifies rounding" in text
    assert "qat-w4a16 was trained with another configuration than fp16: train.imgsz." in text
    assert "trained with different code" in text
    assert "uncommitted changes" in text


def gate(tmp_path: Path, minimum: float) -> int | str | None:
    try:
        page(load("qat", sets=[f"report.min_ap50={minimum}"]), build_run(tmp_path))
    except SystemExit as stop:
        return stop.code
    return 0


def test_gate_passes(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.61) == 0


def test_gate_names_the_variant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert gate(tmp_path, 0.62) == 1
    assert "qat-w4a16 reaches AP50 0.6198" in caplog.text


def test_gate_does_not_ask_what_was_not_trained(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    ptq = metrics("ptq-w4a16", "net-w4a16-qcdq-ptq.onnx", SHA["qat"], 0.01, 9)
    write(run.root / "ptq-w4a16-coco" / "metrics.json", ptq)
    assert "ptq-w4a16" in page(load("qat", sets=["report.min_ap50=0.61"]), run)


def test_gate_fails_without_a_score(tmp_path: Path) -> None:
    run = RunRoot(tmp_path, "empty")
    run.root.mkdir()
    with pytest.raises(SystemExit):
        report(load("qat", sets=["report.min_ap50=0"]), run)
