"""Whether a stage has anything left to do: answered without PyTorch, as the stage would; the whole job asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

import app.__main__ as command_line
from app.core import child
from app.core.config import Config, UserError, dump, load
from app.core.files import sha256, write_json, write_text
from app.core.labels import FP16
from app.core.results import write_rows
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.report import report as page_of_run
from app.report.report import first_sentence, is_current, is_reported, report
from app.train.done import (
    epochs_left,
    images_now,
    is_finished,
    is_ptq_done,
    is_quantized,
    is_trained,
    make_ready,
    ptq_labels,
)
from tests.support.data_fixtures import SIZES_WH, config_for
from tests.support.drawn import kept_figures
from tests.support.report_fixtures import build_run
from tests.support.settle import settle

QUESTIONS = "app.train.done, app.export.done, app.eval.evaluate, app.report.report, app.data.prepare"


def test_no_question_loads_the_libraries_of_training() -> None:
    code = (
        f"import sys, app.job, {QUESTIONS}; "
        "assert not {'torch', 'torchvision', 'ultralytics', 'brevitas'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(runs_dir: Path, request: pytest.FixtureRequest) -> tuple[Config, RunRoot]:
    config, run = settle(runs_dir, request.node.name[:60].replace("[", "-").replace("]", ""), "fp16", {})
    folder = run.variant_dir("fp16")
    write_text(folder / "config.yaml", dump(config))
    write_text(folder / "weights" / "last.pt", "")
    write_json(folder / "done.json", {"epochs": 300, "best_ap": 0.4321, "images": images_now(run)})
    return config, run


def test_a_training_is_done_by_its_record(trained: tuple[Config, RunRoot], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert is_trained(*trained)
    assert caplog.messages == ["train fp16: done already (300 epochs, best AP 0.432)"]
    (trained[1].variant_dir("fp16") / "done.json").unlink()
    assert not is_trained(*trained)


def begun(coco_dir: Path, run: RunRoot, done: dict[str, Any] | None) -> Config:
    """A training of the two images, with a checkpoint; done.json where it is done."""
    config = config_for(coco_dir).model_copy(update={"variant": "fp16", "quant": None})
    prepare(config, run, force=False)
    assert make_ready(config, run, force=False)
    write_text(run.variant_dir("fp16") / "weights" / "last.pt", "")
    if done is not None:
        write_json(run.done("fp16"), {"epochs": 3, "best_ap": 0.5, **done})
    return config


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_training_on_other_images_is_refused(coco_dir: Path, run: RunRoot, is_done: bool, split: str) -> None:
    """`data --force` takes the dataset as it is now; a training of what it was is no training of that."""
    config = begun(coco_dir, run, None)
    if is_done:
        write_json(run.done("fp16"), {"epochs": 3, "best_ap": 0.5, "images": images_now(run)})
    assert is_finished(config, run) is is_done
    number = 1 if split == "train" else 3
    pixels = np.full((SIZES_WH[number][1], SIZES_WH[number][0], 3), 77, np.uint8)
    (coco_dir / f"{split}2017" / f"{number:012d}.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    prepare(config, run, force=True)
    with pytest.raises(UserError, match=f"fp16 was trained with other {split} images or annotations than .*--force"):
        make_ready(config, run, force=False)
    assert make_ready(config, run, force=True), "it starts over"
    write_text(run.variant_dir("fp16") / "weights" / "last.pt", "")
    assert make_ready(config, run, force=False), "and goes on with the images of now"


def test_a_training_that_does_not_name_its_images_is_done_with_a_line(
    coco_dir: Path, run: RunRoot, caplog: pytest.LogCaptureFixture
) -> None:
    config = begun(coco_dir, run, {})
    caplog.set_level("INFO", logger="app.train.done")
    assert is_trained(config, run)
    said = [record.message for record in caplog.records if record.name == "app.train.done"]
    assert said == [
        "train fp16: an earlier version began it, which did not record of which images",
        "train fp16: done already (3 epochs, best AP 0.500)",
    ]
    write_json(run.done("fp16"), {"epochs": 3, "best_ap": 0.5, "images": {"train": 7}})
    with pytest.raises(UserError, match=r"done\.json"):
        is_trained(config, run)


@pytest.mark.parametrize(("setting", "fault"), [("train.epochs=3", "epochs: 300 -> 3"), ("data.n_val=3", "n_val: ")])
def test_another_configuration_is_refused_as_by_the_stage(
    trained: tuple[Config, RunRoot], setting: str, fault: str
) -> None:
    config, run = trained
    section, _, rest = setting.partition(".")
    key, _, value = rest.partition("=")
    tree = config.model_dump()
    tree[section][key] = int(value)
    with pytest.raises(UserError, match=fault):
        is_trained(Config.model_validate(tree), run)
    (run.variant_dir("fp16") / "weights" / "last.pt").unlink()  # nobody needs it when a training is done
    with pytest.raises(UserError, match=fault):
        is_trained(Config.model_validate(tree), run)


def test_another_checkpoint_to_warm_up_from_is_refused(runs_dir: Path) -> None:
    checkpoint = runs_dir / "epoch1.pt"
    write_text(checkpoint, "one")
    warm = {"quant.warmup_share": 0.5, "quant.warmup_bits": "float", "quant.warmup_from": checkpoint}
    config, run = settle(runs_dir, "warm", "qat", warm)
    folder = run.variant_dir(config.label)
    assert make_ready(config, run, force=False)
    write_text(checkpoint, "two")
    assert make_ready(config, run, force=False)  # it has not begun
    write_text(folder / "weights" / "last.pt", "")
    assert make_ready(config, run, force=False)  # it goes on
    write_text(checkpoint, "three")
    with pytest.raises(
        UserError, match=r"qat-w4a16 began from another checkpoint than quant\.warmup_from=.*epoch1\.pt"
    ):
        make_ready(config, run, force=False)
    write_json(folder / "done.json", {"epochs": 300, "best_ap": 0.4321})
    with pytest.raises(UserError, match="began from another checkpoint"):
        is_trained(config, run)
    checkpoint.unlink()
    assert is_trained(config, run)


@pytest.mark.parametrize("record", ["done.json", "images.json"])
def test_a_checkpoint_of_other_images_is_no_warm_up(runs_dir: Path, record: str) -> None:
    """Where the folder of its training says of which; a copy elsewhere does not."""
    checkpoint = runs_dir / f"source-{record}" / "fp16" / "weights" / "epoch1.pt"
    write_text(checkpoint, "one")
    warm = {"quant.warmup_share": 0.5, "quant.warmup_bits": "float", "quant.warmup_from": checkpoint}
    config, run = settle(runs_dir, f"warm-{record}", "qat", warm)
    assert make_ready(config, run, force=False)
    images = images_now(run)
    write_json(checkpoint.parents[1] / record, {"images": images})
    assert make_ready(config, run, force=False)
    images["val"]["annotation_sha256"] = "0" * 64
    write_json(checkpoint.parents[1] / record, {"images": images})
    with pytest.raises(UserError, match=r"quant\.warmup_from: .*epoch1\.pt was trained with other val images or annot"):
        make_ready(config, run, force=False)


def test_epochs_left_by_the_files(trained: tuple[Config, RunRoot]) -> None:
    config, run = trained
    assert epochs_left(config, run) == 0
    (run.variant_dir("fp16") / "done.json").unlink()
    assert epochs_left(config, run) == 300
    write_rows(run.variant_dir("fp16") / "results.csv", [{"epoch": 1.0}, {"epoch": 2.0}])
    assert epochs_left(config, run) == 298


# --- ptq -------------------------------------------------------------------------------------------------------------


def test_ptq_is_done_while_both_checkpoints_are_of_this_baseline(tmp_path: Path) -> None:
    config, run = load("qat"), RunRoot(tmp_path, "run")
    assert config.quant and not is_ptq_done(config, run)
    write_text(run.best(FP16), "baseline")
    source = {"source_sha256": sha256(run.best(FP16))}
    for label in ptq_labels(config.quant):
        assert not is_ptq_done(config, run)
        write_text(run.best(label), "quantized")
        write_json(run.variant_dir(label) / "done.json", source)
    assert is_ptq_done(config, run)
    write_text(run.best(FP16), "damaged")  # the stage says what is wrong with it
    assert not is_ptq_done(config, run)
    assert not is_ptq_done(load("fp16"), run)


def test_ptq_of_other_rules_is_refused_also_where_only_their_hash_was_kept(tmp_path: Path) -> None:
    config, run = load("qat"), RunRoot(tmp_path, "run")
    assert config.quant
    label, scheme = ptq_labels(config.quant)[0], config.quant.scheme
    write_text(run.best(label), "quantized")
    write_json(run.done(label), {"source_sha256": "s"})
    for digest in ({}, {"scheme_sha256": scheme.sha256}):
        write_json(run.variant_dir(label) / "quant_config.json", digest)
        assert is_quantized(run, label, "s", scheme)
    write_json(run.variant_dir(label) / "quant_config.json", {"scheme_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"best\.pt was made with other rules of w4a16: overwrite it with --force"):
        is_quantized(run, label, "s", scheme)


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reported(tmp_path: Path) -> RunRoot:
    run = build_run(tmp_path)
    with kept_figures():
        report(load("qat"), run)
    return run


def test_a_page_is_shown_again_while_nothing_has_changed(reported: RunRoot, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = reported.summary.stat().st_mtime_ns
    assert is_reported(load("qat"), reported)
    assert reported.summary.stat().st_mtime_ns == before
    assert caplog.messages[0] == "report: done already, nothing has changed since"
    assert any(message.startswith("| qat-w4a16 ") for message in caplog.messages)
    verdict, page, following = caplog.messages[-3:]
    assert verdict.startswith("verdict: qat-w4a16: AP 0.4198 against 0.4321") and "**" not in verdict
    assert page == f"report: {reported.root}/summary.html, the same as Markdown: {reported.summary}"
    assert following.startswith("next: ")


@pytest.mark.parametrize("name", ["fp16/results.csv", "summary.html", "report.json", "figures", "quant_config.json"])
def test_a_page_is_outdated_by_any_file_of_the_run(reported: RunRoot, name: str) -> None:
    path = reported.root / name
    if path.is_dir():
        next(path.iterdir()).unlink()
    elif path.exists():
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.write_text("new")
    assert not is_current(reported, load("qat").report)


def test_a_page_is_outdated_by_settings_and_program(reported: RunRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_current(reported, load("qat").report)
    assert not is_current(reported, load("qat", sets=["report.gallery_images=1"]).report)
    monkeypatch.setattr(page_of_run, "program", lambda: "another")
    assert not is_current(reported, load("qat").report)


def test_a_page_of_merged_seeds_is_not_that_of_the_run(reported: RunRoot, tmp_path: Path) -> None:
    with kept_figures():
        report(load("qat"), reported, [build_run(tmp_path, "other", seed=1)])
    assert not is_current(reported, load("qat").report)


@pytest.mark.parametrize(
    ("paragraph", "said"),
    [
        ("**qat: AP 0.41 against 0.43, -0.02** (COCO, 5,000 images). The file has 2.6 MB.",
         "qat: AP 0.41 against 0.43, -0.02 (COCO, 5,000 images)."),
        ("**No verdict:** no quantized variant was scored.", "No verdict: no quantized variant was scored."),
        ("no end", "no end"),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence(paragraph: str, said: str) -> None:
    assert first_sentence(paragraph) == said


# --- the whole job ---------------------------------------------------------------------------------------------------


def started(monkeypatch: pytest.MonkeyPatch, done: set[str], arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Stages that the job starts, each with its arguments, where those in `done` have nothing left to do."""
    calls: list[tuple[str, list[str]]] = []

    def run_stage(stage: str, words: list[str]) -> int:
        calls.append((stage, words))
        return 0

    def is_done(args: Namespace) -> bool:
        return " ".join([args.stage, *([args.variant] if args.stage == "train" else [])]) in done

    monkeypatch.setattr(child, "run_stage", run_stage)
    monkeypatch.setattr(command_line, "is_done", is_done)
    args: Any = command_line.parse(["all", *arguments])
    args.function(args)
    return calls


def test_the_job_starts_what_is_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--yes and what comes after are told to trainings alone: 300 epochs of QAT and 6 files, then the files.

    The scheme is checked, which takes PyTorch, before the first training; not where that is done.
    """
    checked: list[Config] = []
    monkeypatch.setitem(sys.modules, "app.quant.model", SimpleNamespace(check_scheme=checked.append))
    common = ["--run", "r", "--runs-dir", str(tmp_path)]
    calls = started(monkeypatch, {"train fp16", "export"}, [*common, "--yes"])
    assert [stage for stage, _ in calls] == ["data", "train --variant qat", "ptq", "eval", "report"]
    assert calls[1][1] == ["--yes", "--then", "0", "6", *common]
    assert all(words == common for stage, words in calls if not stage.startswith("train"))
    assert not checked
    assert started(monkeypatch, set(), common)[1][1] == ["--then", "300", "6", *common]
    assert len(checked) == 1
    everything = {"train fp16", "train qat", "ptq", "export", "eval", "report"}
    assert [stage for stage, _ in started(monkeypatch, everything, common)] == ["data"]


def test_a_forced_job_deletes_first_what_it_makes_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that it goes on without --force after a stop; a training of another scheme is not made anew."""
    monkeypatch.setitem(sys.modules, "app.quant.model", SimpleNamespace(check_scheme=lambda config: None))
    run = RunRoot(tmp_path, "r")
    folders = ["fp16", "onnx", "ptq-w4a16", "ptq-w4a16-bn", "qat-w4a16", "qat-w8a16"]
    for folder in folders:
        (run.root / folder / "weights").mkdir(parents=True)
    common = ["--run", "r", "--runs-dir", str(tmp_path)]
    started(monkeypatch, set(), common)
    assert sorted(os.listdir(run.root)) == folders
    started(monkeypatch, set(), [*common, "--force"])
    assert os.listdir(run.root) == ["qat-w8a16"]


def test_force_asks_nothing(tmp_path: Path, reported: RunRoot) -> None:
    from app.job import is_done

    words = ["report", "--run", reported.name, "--runs-dir", str(tmp_path)]
    assert is_done(command_line.parse(words))
    assert not is_done(command_line.parse([*words, "--force"]))
