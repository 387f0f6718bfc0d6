"""The trainer on a tiny drawn dataset: what it writes, what it scores, and that a resumed training is the same one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import DetectionModel

from app.bench.soak import differences
from app.core.config import UserError, load, validate
from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.quant.model import build, load_checkpoint, load_scored, save_checkpoint
from app.train.graph import StepGraph
from app.train.interrupt import Interrupted
from app.train.loop import Loop
from app.train.monitor import Monitor
from app.train.processes import ALONE, Ranks
from app.train.train import train
from app.train.validation import Scores, score_states
from tests.support.settle import AT_EVERY_STEP, sets_of, settle
from tests.support.tiny import tiny_network

# 40 images in batches of 8, two of them to an optimizer step; mosaic in all but the last epoch. A fast EMA.
SETTINGS = {
    "data.n_train": 40, "data.n_val": 8, "train.batch": 8, "train.epochs": 3, "train.bn_batches": 2, "hyp.nbs": 16,
    "hyp.warmup_epochs": 1, "hyp.close_mosaic": 1, "train.ema_tau": 5,
}  # fmt: skip
STEPS_AN_EPOCH = 3
ROUNDED = 0.05  # milliseconds and hundredths of a rate
WHOLE = "whole"  # run that the tests share


@pytest.fixture(scope="module")
def trained(runs_dir: Path) -> dict[str, Path]:
    """Folders of both variants of the tiny network, trained without interruption."""
    folders = {}
    with tiny_network():
        for variant in ("fp16", "qat"):
            config, run = settle(runs_dir, WHOLE, variant, SETTINGS)
            train(config, run, force=False)
            folders[variant] = run.variant_dir(config.label)
    return folders


@pytest.fixture
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def rows(folder: Path) -> list[dict[str, str]]:
    """results.csv without what depends on the clock."""
    with open(folder / "results.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def images_timed(folder: Path) -> list[float]:
    """Images of each epoch by its seconds and its rate."""
    with open(folder / "results.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [float(row["time/train_s"]) * float(row["time/images_per_s"]) for row in table]


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_a_training_of_yolov10n_leaves_everything_the_next_stages_need(runs_dir: Path, variant: str) -> None:
    config, run = settle(runs_dir, "yolov10n", variant, {**SETTINGS, "data.n_train": 16, "train.val_every": 3})
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    for name in ("config.yaml", "env.json", "args.yaml", "log.txt", "results.csv", "loss_curve.csv", "loss_curve.png"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "quant_config.json").exists() == (variant == "qat")
    table = rows(folder)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert {"AP/raw", "AP/ema", "AP/ema_bn", "train/box_loss", "val_loss/ema_bn"} <= set(table[0])
    assert all(table[-1].values())
    for name in ("best.pt", "last.pt"):
        model, config, _ = load_scored(folder / "weights" / name)
        assert config.label == folder.name
        assert not model.training


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("crash_in", ["correct", "write_rows"])
def test_correction_changes_what_is_exported_and_nothing_of_the_weights(
    runs_dir: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    """It happens once, also where the process is killed in it, or after it has replaced best.pt."""
    settings = {**SETTINGS, "quant.correction_epochs": 1, "quant.correction_lr": 0.01}
    config, whole = settle(runs_dir, "corrected-whole", "qat", settings)
    train(config, whole, force=False)
    config, run = settle(runs_dir, f"corrected-{crash_in}", "qat", settings)
    with monkeypatch.context() as patch:  # the next start has nothing else to do
        patch.setattr(f"app.train.loop.{crash_in}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    plain, corrected = (load_checkpoint(one / "weights" / "best.pt")["scored"] for one in (trained["qat"], folder))
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], corrected[name])}
    assert changed == {"weight", "bias"}
    assert all(torch.equal(plain[name], corrected[name]) for name in plain if name.endswith("conv.weight"))
    assert rows(folder) == rows(whole.variant_dir(config.label))
    assert rows(folder)[-1]["AP/corrected"] != ""
    uninterrupted = load_checkpoint(whole.best(config.label))["scored"]
    assert differences(corrected, uninterrupted) == []
    (folder / "done.json").unlink()  # the next start finds that all is done
    monkeypatch.setattr("app.train.loop.correct", None)
    train(config, run, force=False)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_the_correction_has_the_room_of_the_graph_and_batches_of_a_rank(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, n_ranks: int
) -> None:
    """Rank 0 alone makes it: its batches are as large as its part of a batch was, its steps of as many images."""
    settings = {**SETTINGS, "train.epochs": 1, "train.val_every": 1, "quant.correction_epochs": 1}
    config, run = settle(runs_dir, f"corrected-{n_ranks}", "qat", settings)
    happened: list[Any] = []
    correct_best = Loop._correct_best

    def by_rank_0(self: Loop) -> None:
        self.ranks = self.trainer.ranks = Ranks(n=n_ranks)
        happened.clear()
        correct_best(self)
        self.ranks = self.trainer.ranks = ALONE

    def correct(model: Any, batches: Any, loss_of: Any, lr: float, accumulate: int) -> None:
        happened.extend([len(batch["img"]) for batch in batches])
        happened.append(accumulate)

    monkeypatch.setattr(Loop, "_correct_best", by_rank_0)
    monkeypatch.setattr("app.train.loop.correct", correct)
    monkeypatch.setattr(StepGraph, "release", lambda self: happened.append("release"))
    train(config, run, force=False)
    sizes = {1: [8] * 5, 2: [4] * 10, 3: [3] * 13 + [1]}[n_ranks]
    assert happened == ["release", *sizes, n_ranks]


@pytest.mark.usefixtures("tiny")
def test_validation_scores_the_one2one_head(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "head", "qat", {**SETTINGS, "train.epochs": 1})
    seen = []
    validate = Loop.validate

    def spy(self: Loop) -> dict[str, float]:
        result = validate(self)
        seen.append(self.scored_model.end2end)
        return result

    monkeypatch.setattr(Loop, "validate", spy)
    train(config, run, force=False)
    assert seen == [True]


def test_both_variants_start_from_the_same_weights_and_see_the_same_images(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of YOLOv10n."""
    first: dict[str, tuple[Any, torch.Tensor]] = {}

    def stop(self: Loop, batch: dict[str, Any]) -> None:
        weight = self.state.net.state_dict()["model.0.conv.weight"]
        first[self.config.variant] = (weight.clone(), batch["img"].clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "backward", stop)
    for variant in ("fp16", "qat"):
        config, run = settle(runs_dir, "start", variant, SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    assert torch.equal(first["fp16"][0], first["qat"][0])
    assert torch.equal(first["fp16"][1], first["qat"][1])


def test_random_weights_do_not_depend_on_what_the_process_has_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics' YOLOv8 leaves a mark on the class of which YOLOv10's head is a kind."""
    monkeypatch.setattr(Detect, "legacy", False)
    config = load("fp16", [], ["model=yolov10n.yaml"])
    before = build(config)[0].state_dict()
    DetectionModel("yolov8n.yaml", verbose=False)
    assert Detect.legacy, "else the mark is gone, and build() need not mind it"
    after = build(config)[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def crash_before(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Interrupts trainings before these optimizer steps, counted from 1 with those that are done again."""
    step, n_steps = Loop.optimizer_step, 0

    def crash(self: Loop) -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps in numbers:
            raise KeyboardInterrupt
        step(self)

    patch.setattr(Loop, "optimizer_step", crash)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("variant", "crash_at"), [("fp16", 4), ("qat", 2), ("qat", 2 * STEPS_AN_EPOCH), ("qat", 2 * STEPS_AN_EPOCH + 2)]
)
def test_a_crashed_training_continues_as_if_nothing_had_happened(
    trained: dict[str, Path], runs_dir: Path, monkeypatch: pytest.MonkeyPatch, variant: str, crash_at: int
) -> None:
    """With a checkpoint at every step: inside the first epoch, between epochs, and after mosaic has been closed."""
    config, run = settle(runs_dir, f"crash-{variant}-{crash_at}", variant, {**SETTINGS, **AT_EVERY_STEP})
    with monkeypatch.context() as patch:
        crash_before(patch, crash_at + 1)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    assert rows(folder) == rows(trained[variant])
    assert images_timed(folder) == pytest.approx([40] * 3, rel=ROUNDED)
    ours, whole = (load_checkpoint(path / "weights" / "last.pt") for path in (folder, trained[variant]))
    del ours["config"], whole["config"]
    assert differences(ours, whole) == []


@pytest.mark.usefixtures("tiny")
def test_a_signal_saves_and_the_same_command_goes_on(
    trained: dict[str, Path], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a training step, then SIGINT in the validation after it."""
    config, run = settle(runs_dir, "signal", "qat", SETTINGS)
    step, validate, sent = Loop.optimizer_step, Loop.validate, []

    def step_and_term(self: Loop) -> None:
        step(self)
        if not sent:
            sent.append("TERM")
            os.kill(os.getpid(), signal.SIGTERM)

    def validate_and_int(self: Loop) -> dict[str, float]:
        result = validate(self)
        if len(sent) == 1:
            sent.append("INT")
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Loop, "optimizer_step", step_and_term)
    monkeypatch.setattr(Loop, "validate", validate_and_int)
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Interrupted) as stop:
            train(config, run, force=False)
        assert stop.value.signal == number
    train(config, run, force=False)
    assert rows(run.variant_dir(config.label)) == rows(trained["qat"])
    assert images_timed(run.variant_dir(config.label)) == pytest.approx([40] * 3, rel=ROUNDED)


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_from_before_seconds_were_kept_goes_on(
    runs_dir: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settle(runs_dir, "earlier", "qat", {**SETTINGS, **AT_EVERY_STEP})
    with monkeypatch.context() as patch:
        crash_before(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    last = run.variant_dir(config.label) / "weights" / "last.pt"
    state = load_checkpoint(last)
    assert (state["batch_in_epoch"], state.pop("trained_s") > 0) == (1, True)
    save_checkpoint(last, validate(state.pop("config")), state)
    train(config, run, force=False)
    assert rows(run.variant_dir(config.label)) == rows(trained["qat"])
    assert images_timed(run.variant_dir(config.label)) == pytest.approx([32, 40, 40], rel=ROUNDED)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("validation_s", "batches_kept"), [(300, 0), (700, 5)])
def test_a_kill_in_a_long_validation_costs_the_validation_alone(
    runs_dir: Path,
    trained: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    validation_s: float,
    batches_kept: int,
) -> None:
    """That of the second epoch, with a checkpoint every 600 s; the training is seconds long."""
    config, run = settle(runs_dir, f"validation-{validation_s}", "qat", {**SETTINGS, "train.save_every_s": 600})
    validate = Loop.validate

    def killed(self: Loop) -> dict[str, float]:
        return interrupt() if self.state.epoch == 1 else validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "validation_s", lambda self, n_images: validation_s)
        patch.setattr(Loop, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    kept = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert (len(kept["rows"]), kept["batch_in_epoch"]) == (1, batches_kept)
    train(config, run, force=False)
    assert rows(run.variant_dir(config.label)) == rows(trained["qat"])


@pytest.mark.usefixtures("tiny")
def test_a_killed_process_continues(runs_dir: Path, trained: dict[str, Path]) -> None:
    """kill -9 as soon as the first checkpoint is there; the training is started again."""
    settings = {**SETTINGS, **AT_EVERY_STEP}
    config, run = settle(runs_dir, "killed", "qat", settings)
    command = [sys.executable, "-m", "tests.support.tiny_app", "train", "--variant", "qat", "--run", "killed"]
    command += ["--runs-dir", str(runs_dir), *(word for item in sets_of(settings) for word in ("--set", item))]
    last = run.variant_dir(config.label) / "weights" / "last.pt"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=REPO_DIR) as process:
        while not last.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train(config, run, force=False)
    assert rows(last.parent.parent) == rows(trained["qat"])


def test_a_finished_training_is_left_alone_and_another_configuration_is_refused(
    trained: dict[str, Path], runs_dir: Path
) -> None:
    config, run = settle(runs_dir, WHOLE, "qat", SETTINGS)
    before = (trained["qat"] / "weights" / "last.pt").stat().st_mtime_ns
    train(config, run, force=False)
    assert (trained["qat"] / "weights" / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"hyp\.lr0: 0\.01 -> 0\.1.*RUN=name"):
        train(load("qat", sets=sets_of({**SETTINGS, "hyp.lr0": 0.1})), run, force=False)


@pytest.mark.usefixtures("tiny")
def test_validation_may_be_rarer_than_epochs(runs_dir: Path) -> None:
    config, run = settle(runs_dir, "rare", "qat", {**SETTINGS, "train.val_every": 2})
    train(config, run, force=False)
    aps = [row["AP/ema_bn"] for row in rows(run.variant_dir(config.label))]
    assert [bool(ap) for ap in aps] == [False, True, True]
    assert read_json(run.variant_dir(config.label) / "done.json", "train")["epochs"] == 3


@pytest.mark.usefixtures("tiny")
def test_a_crash_between_the_last_epoch_and_the_end_loses_nothing(runs_dir: Path) -> None:
    config, run = settle(runs_dir, "end", "fp16", {**SETTINGS, "train.epochs": 1})
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    table = rows(folder)
    (folder / "done.json").unlink()
    train(config, run, force=False)
    assert rows(folder) == table
    assert (folder / "done.json").exists()


OPTIONS = {
    "quant.warmup_share": 0.34, "quant.warmup_bits": 8, "quant.learned_scale": True, "quant.dampening": 0.001,
    "quant.freeze_threshold": 0.02, "quant.freeze_momentum": 0.1, "data.n_train": 24, "data.n_val": 4,
    "train.val_every": 3, **AT_EVERY_STEP,
}  # fmt: skip


@pytest.mark.usefixtures("tiny")
def test_all_options_together_continue_exactly(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashes in the warm-up of bits and learning rate, at their switch, and after mosaic has been closed."""
    config, run = settle(runs_dir, "options-whole", "qat", SETTINGS | OPTIONS)
    train(config, run, force=False)
    whole = run.variant_dir(config.label)
    config, run = settle(runs_dir, "options", "qat", SETTINGS | OPTIONS)
    crash_before(monkeypatch, 2, 4, 8)  # of two an epoch
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    ours, theirs = (load_checkpoint(one / "weights" / "last.pt") for one in (run.variant_dir(config.label), whole))
    assert differences(ours, theirs) == []


@pytest.mark.usefixtures("tiny")
def test_no_epoch_of_the_quant_warm_up_is_the_best(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores higher, with other weights than those that are exported."""
    config, run = settle(runs_dir, "warm", "qat", {**SETTINGS, "quant.warmup_share": 0.67})

    def score_warm_epochs_higher(state: Any, *args: Any) -> Scores:
        scores = score_states(state, *args)
        ap = 0.9 - 0.1 * state.epoch if state.epoch < 2 else 0.1
        return replace(scores, columns=scores.columns | {"AP/ema_bn": ap})

    monkeypatch.setattr("app.train.loop.score_states", score_warm_epochs_higher)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    assert [row["quant/warm_up"] for row in rows(folder)] == ["1", "1", ""]
    assert read_json(folder / "done.json", "train")["best_ap"] == 0.1
    assert load_checkpoint(folder / "weights" / "best.pt")["epoch"] == 2


def test_reestimated_batchnorm_is_what_is_scored(trained: dict[str, Path]) -> None:
    checkpoint = load_checkpoint(trained["qat"] / "weights" / "last.pt")
    name = "model.0.bn.running_mean"
    assert not torch.equal(checkpoint["scored"][name], checkpoint["ema"][name])
    assert torch.equal(checkpoint["scored"]["model.0.conv.weight"], checkpoint["ema"]["model.0.conv.weight"])


def test_a_checkpoint_holds_weights_that_scored_and_averaged_state_share_once(trained: dict[str, Path]) -> None:
    checkpoint = load_checkpoint(trained["qat"] / "weights" / "last.pt")
    shared = {
        name for name, value in checkpoint["scored"].items() if value.data_ptr() == checkpoint["ema"][name].data_ptr()
    }
    assert "model.0.conv.weight" in shared
    assert "model.0.bn.running_mean" not in shared


@pytest.mark.usefixtures("tiny")
def test_the_scored_copy_is_made_anew_for_other_bits_alone(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three validations, two of them in the warm-up."""
    copied: list[Any] = []
    monkeypatch.setattr("app.train.validation.deepcopy", lambda model: copied.append(model) or deepcopy(model))
    config, run = settle(runs_dir, "copies", "qat", {**SETTINGS, "quant.warmup_share": 0.67})
    train(config, run, force=False)
    assert len(rows(run.variant_dir(config.label))) == 3
    assert len(copied) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_or_foreign_checkpoint_is_named(trained: dict[str, Path], tmp_path: Path, damage: str) -> None:
    data = (trained["qat"] / "weights" / "best.pt").read_bytes()
    path = tmp_path / "best.pt"
    if damage == "other":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no checkpoint")
    with pytest.raises(UserError, match=r"best\.pt is not"):
        load_checkpoint(path)
