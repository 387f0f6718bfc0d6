"""A loss or gradient that is not finite: named, kept, and left out from the last good state on."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.core.config import Config, load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.quant.model import load_checkpoint, load_scored
from app.train.checkpoint import check_finite
from app.train.guard import GuardStop
from app.train.nonfinite import NonFinite, Watch
from app.train.train import train
from app.train.trainer import Trainer

# 24 images in batches of 8, one to an optimizer step.
SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=24", "data.n_val=4", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=8", "train.epochs=2", "train.workers=0", "train.device=cpu", "train.bn_batches=1", "hyp.nbs=8",
    "hyp.close_mosaic=0", "train.val_every=2", "train.save_every_s=1e-9",
]  # fmt: skip
BAD = 4  # the second batch of the second epoch, counted from 0


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def settle(runs_dir: Path, name: str, *sets: str) -> tuple[Config, RunRoot]:
    config, run = load("qat", sets=[*SETTINGS, *sets]), RunRoot(runs_dir, name)
    prepare(config, run, force=False)
    return config, run


def spoil_images(patch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Images of these batches are not finite, as from a decoder gone wrong; the loader gives bytes otherwise."""
    next_batch = Watch.next

    def spoil(self: Watch, number: int, batch: dict[str, Any]) -> None:
        if number in bad:
            batch["img"] = torch.full(batch["img"].shape, float("nan"))
        next_batch(self, number, batch)

    patch.setattr(Watch, "next", spoil)


def state_of(run: RunRoot, config: Config) -> dict[str, Any]:
    return load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")


def test_the_batch_is_named_kept_and_left_out(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = settle(runs_dir, "once")
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
    config, run = settle(runs_dir, "crash", "train.save_every_s=600")  # a rollback of more than one step
    other, without = settle(runs_dir, "without")

    backward = Trainer._backward

    def crash(self: Trainer, batch: dict[str, Any]) -> None:
        if self.faults:
            raise KeyboardInterrupt
        backward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", crash)
        spoil_images(patch, {BAD})
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    assert state_of(run, config)["faults"][0]["batches"] == [BAD]
    train(config, run, force=False)
    monkeypatch.setattr(Trainer, "left_out", lambda self: {BAD})
    train(other, without, force=False)
    ours, theirs = state_of(run, config), state_of(without, other)
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert [row["train/box_loss"] for row in ours["rows"]] == [row["train/box_loss"] for row in theirs["rows"]]


def test_gradient_is_caught_before_the_weights_are_spoilt(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "gradient")
    get_model, next_batch, number = Trainer.get_model, Watch.next, 0

    def hooked(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        model: Any = get_model(self, *args, **kwargs)
        model.model[3].conv.weight.register_hook(lambda grad: grad * float("inf") if number == BAD else grad)
        return model

    def note(self: Watch, its_number: int, batch: dict[str, Any]) -> None:
        nonlocal number
        number = its_number
        next_batch(self, its_number, batch)

    monkeypatch.setattr(Trainer, "get_model", hooked)
    monkeypatch.setattr(Watch, "next", note)
    train(config, run, force=False)
    assert state_of(run, config)["faults"] == [
        {"what": "gradient", "cause": "gradient of model.3.conv.weight", "batches": [BAD]}
    ]


def test_it_stops_when_the_rollbacks_are_used_up(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch from the second epoch on is bad; what is left is the state after the first epoch."""
    config, run = settle(runs_dir, "stop", "guard.max_rollbacks=1")
    spoil_images(monkeypatch, set(range(3, 100)))
    with pytest.raises(GuardStop, match=r"epoch 2, batch 2 of 3 .*1 rollbacks \(guard\.max_rollbacks\) are used up"):
        train(config, run, force=False)
    state = state_of(run, config)
    assert [fault["batches"] for fault in state["faults"]] == [[3], [4]]
    assert (state["epoch"], state["batch_in_epoch"]) == (1, 1)
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_spoilt_weights_never_replace_a_good_state(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "spoilt")
    step = Trainer.optimizer_step

    def spoil(self: Trainer) -> None:
        step(self)
        if self.watch.newest[0][0] == BAD:
            self.net.model[0].conv.weight.data[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(Trainer, "optimizer_step", spoil)
    train(config, run, force=False)
    assert state_of(run, config)["faults"] == [
        {"what": "weights", "cause": "weight model.0.conv.weight", "batches": [BAD]}
    ]


@pytest.mark.parametrize(("scale", "good"), [(0.5, False), (1.0, True), (65536.0, True)])
def test_a_grad_scale_that_nothing_is_small_enough_for_is_a_fault(scale: float, good: bool) -> None:
    """Infinite gradients are normal while the scale is large: then the scaler alone deals with them."""
    scaler = SimpleNamespace(get_scale=lambda: scale)
    trainer: Any = SimpleNamespace(net=torch.nn.Linear(2, 2), watch=Watch(torch.device("cpu")), scaler=scaler)
    with contextlib.nullcontext() if good else pytest.raises(NonFinite, match="gradient is not finite"):
        check_finite(trainer)
