"""A loss or gradient that is not finite: named, kept, and left out from the last good state on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from ultralytics.utils.loss import v8DetectionLoss

from app.core.config import Config
from app.core.run import RunRoot
from app.quant.model import load_checkpoint, load_scored
from app.train import loop as loop_module
from app.train.graph import StepGraph
from app.train.guard import GuardStop
from app.train.loop import Loop
from app.train.nonfinite import NonFinite, Watch, check_finite
from app.train.state import Progress, State
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.scripted import spoil_images
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network

# 24 images in batches of 8, one to an optimizer step.
SETTINGS = {
    "data.n_train": 24, "data.n_val": 4, "train.batch": 8, "train.epochs": 2, "hyp.nbs": 8, "hyp.close_mosaic": 0,
    "train.val_every": 2, **AT_EVERY_STEP,
}  # fmt: skip
BAD = 4  # the second batch of the second epoch, counted from 0


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def state_of(run: RunRoot, config: Config) -> dict[str, Any]:
    return load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")


def test_the_batch_is_named_kept_and_left_out(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = settle(runs_dir, "once", "qat", SETTINGS)
    spoil_images(monkeypatch, {BAD})
    with caplog.at_level(logging.WARNING, "app"):
        train(config, run, force=False)
    (line,) = [record.message for record in caplog.records if record.message.startswith("guard:")]
    path = run.variant_dir(config.label) / "faults" / f"batch-{BAD}.pt"
    assert line.startswith("guard: the loss is not finite at epoch 2, batch 2 of 3 (0000")
    assert f"and 4 more), first in: the images; kept for study in {path}; back to the last good state" in line
    kept = torch.load(path, weights_only=True)
    (batch,) = kept["batches"]
    assert batch["number"] == BAD
    assert batch["img"].shape == (8, 3, 64, 64)
    assert len(batch["im_file"]) == 8
    assert state_of(run, config)["faults"][0]["batches"] == [BAD]
    load_scored(run.variant_dir(config.label) / "weights" / "best.pt")


def test_training_after_a_rollback_is_training_without_that_batch(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; with a crash after the rollback, so that the resumed process has to know of it."""
    config, run = settle(runs_dir, "crash", "qat", {**SETTINGS, "train.save_every_s": 600})  # rollbacks of some steps
    other, without = settle(runs_dir, "without", "qat", SETTINGS)
    backward = Loop.backward

    def crash(self: Loop, batch: dict[str, Any]) -> None:
        if self.state.faults:
            raise KeyboardInterrupt
        backward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "backward", crash)
        spoil_images(patch, {BAD})
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    assert state_of(run, config)["faults"][0]["batches"] == [BAD]
    train(config, run, force=False)
    monkeypatch.setattr(State, "left_out", property(lambda self: {BAD}))
    train(other, without, force=False)
    ours, theirs = state_of(run, config), state_of(without, other)
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert [row["train/box_loss"] for row in ours["rows"]] == [row["train/box_loss"] for row in theirs["rows"]]


def test_an_epoch_of_which_nothing_is_trained(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one batch is left out: its losses are NaN, and the training goes on. The first epoch, then a later one."""
    for number in (0, 1):
        settings = {**SETTINGS, "data.n_train": 8, "train.epochs": 3, "train.val_every": 1}
        config, run = settle(runs_dir, f"nothing-{number}", "qat", settings)
        with monkeypatch.context() as patch:
            spoil_images(patch, {number})
            train(config, run, force=False)
        losses = [row["train/box_loss"] for row in state_of(run, config)["rows"]]
        assert [isnan(loss) for loss in losses] == [epoch == number for epoch in range(3)]


def test_the_line_of_an_epoch_of_which_nothing_is_trained_yet() -> None:
    faults: list[dict[str, Any]] = [{"batches": [0]}]
    progress = Progress(epoch=0, batch_in_epoch=1, loss_names=["box_loss"], faults=faults)
    assert isnan(progress.mean_losses(5)["train/box_loss"])


@pytest.mark.parametrize("fast_path", [True, False])
def test_the_graph_is_captured_anew_where_bits_change_and_makes_room_for_the_cause_of_a_fault(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, fast_path: bool
) -> None:
    """It holds the quantization of its capture, and its memory is no other's."""
    settings = {**SETTINGS, "quant.warmup_share": 0.5, "quant.warmup_bits": "float", "quant.fast_path": fast_path}
    config, run = settle(runs_dir, f"released-{fast_path}", "qat", settings)
    happened: list[str] = []
    cause = loop_module.find_cause

    def find(*args: Any) -> Any:
        happened.append("cause")
        return cause(*args)

    monkeypatch.setattr(StepGraph, "release", lambda self: happened.append(f"release {self.state.epoch}"))
    monkeypatch.setattr(loop_module, "find_cause", find)
    spoil_images(monkeypatch, {2})
    train(config, run, force=False)
    assert happened == ["release 0", "cause", "release 1"]


def test_gradient_is_caught_before_the_weights_are_spoilt(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "gradient", "qat", SETTINGS)
    get_model, next_batch, number = Trainer.get_model, Watch.next, 0

    def hooked(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        model: Any = get_model(self, *args, **kwargs)
        model.model[1].conv.weight.register_hook(lambda grad: grad * float("inf") if number == BAD else grad)
        return model

    def note(self: Watch, its_number: int, batch: dict[str, Any]) -> None:
        nonlocal number
        number = its_number
        next_batch(self, its_number, batch)

    monkeypatch.setattr(Trainer, "get_model", hooked)
    monkeypatch.setattr(Watch, "next", note)
    train(config, run, force=False)
    assert state_of(run, config)["faults"] == [
        {"what": "gradient", "cause": "gradient of model.1.conv.weight", "batches": [BAD]}
    ]


def test_a_fault_of_the_head_that_is_not_shown_is_a_fault_of_the_loss(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses that are printed and kept are those of the one2one head."""
    config, run = settle(runs_dir, "one2many", "qat", SETTINGS)
    next_batch, number = Watch.next, 0

    def note(self: Watch, its_number: int, batch: dict[str, Any]) -> None:
        nonlocal number
        number = its_number
        next_batch(self, its_number, batch)

    loss_of_head = v8DetectionLoss.loss

    def spoilt(self: v8DetectionLoss, *args: Any) -> Any:
        loss, items = loss_of_head(self, *args)
        is_one2many = self.assigner.topk2 > 1
        return (loss * float("nan") if number == BAD and is_one2many else loss), items

    monkeypatch.setattr(Watch, "next", note)
    monkeypatch.setattr(v8DetectionLoss, "loss", spoilt)
    train(config, run, force=False)
    (fault,) = state_of(run, config)["faults"]
    assert (fault["what"], fault["batches"]) == ("loss", [BAD])


def test_running_statistics_that_are_not_finite_are_a_fault() -> None:
    norm = torch.nn.BatchNorm2d(2)
    watch, scaler = Watch(torch.device("cpu")), GradScaler("cpu")
    check_finite(norm, scaler, watch)
    cast(torch.Tensor, norm.running_var)[1] = float("nan")
    with pytest.raises(NonFinite, match="weights is not finite"):
        check_finite(norm, scaler, watch)


def test_it_stops_when_the_rollbacks_are_used_up(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch from the second epoch on is bad; what is left is the state after the first epoch."""
    config, run = settle(runs_dir, "stop", "qat", {**SETTINGS, "guard.max_rollbacks": 1})
    spoil_images(monkeypatch, set(range(3, 100)))
    with pytest.raises(GuardStop, match=r"epoch 2, batch 2 of 3 .*1 rollbacks \(guard\.max_rollbacks\) are used up"):
        train(config, run, force=False)
    state = state_of(run, config)
    assert [fault["batches"] for fault in state["faults"]] == [[3], [4]]
    assert (state["epoch"], state["batch_in_epoch"]) == (1, 1)
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_spoilt_weights_never_replace_a_good_state(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "spoilt", "qat", SETTINGS)
    step = Loop.optimizer_step

    def spoil(self: Loop) -> None:
        step(self)
        if self.watch.newest[0][0] == BAD:
            self.state.net.model[0].conv.weight.data[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(Loop, "optimizer_step", spoil)
    train(config, run, force=False)
    assert state_of(run, config)["faults"] == [
        {"what": "weights", "cause": "weight model.0.conv.weight", "batches": [BAD]}
    ]


@pytest.mark.parametrize(("scale", "good"), [(0.5, False), (1.0, True), (65536.0, True)])
def test_a_grad_scale_that_nothing_is_small_enough_for_is_a_fault(scale: float, good: bool) -> None:
    """Infinite gradients are normal while the scale is large: then the scaler alone deals with them."""
    scaler = GradScaler("cpu", init_scale=scale)
    with contextlib.nullcontext() if good else pytest.raises(NonFinite, match="gradient is not finite"):
        check_finite(torch.nn.Linear(2, 2), scaler, Watch(torch.device("cpu")))
