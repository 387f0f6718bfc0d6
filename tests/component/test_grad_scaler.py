"""The optimizer step under a GradScaler: what is clipped, what a skipped step leaves, what a checkpoint keeps.

Trainings on a CPU have none that is enabled; here they get one, and stay in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from app.quant.model import load_checkpoint
from app.train.step import clipped_step
from tests.support.recorder import Recorder, distance
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network, train_recorded, train_stock

SCALE = 1024.0  # a power of two, by which FP32 numbers multiply exactly
CLIP_EPSILON = 1e-6  # relative: torch divides by the norm + 1e-6
SGD_ERROR = 1e-3  # relative: as in test_schedule_stock.py, clipping sums in another order
RECIPE = {
    "optimizer": "SGD", "lr0": 0.01, "lrf": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "warmup_epochs": 0.0,
    "warmup_momentum": 0.8, "warmup_bias_lr": 0.1, "close_mosaic": 0, "mosaic": 0.0, "hsv_h": 0.0, "hsv_s": 0.0,
    "hsv_v": 0.0, "translate": 0.0, "scale": 0.0, "fliplr": 0.0,
}  # fmt: skip


# --- one step --------------------------------------------------------------------------------------------------------


def updates_of(scaler: GradScaler, grads: tuple[float, float]) -> tuple[list[float], list[Any]]:
    """How far two weights in groups with learning rates 1 and 0.1 move down, and what the watch is told."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in grads]
    optimizer = torch.optim.SGD(
        [{"params": [weight], "lr": lr} for weight, lr in zip(weights, (1.0, 0.1), strict=True)]
    )
    loss = sum((weight * grad).sum() for weight, grad in zip(weights, grads, strict=True))
    scaler.scale(torch.as_tensor(loss)).backward()
    told: list[Any] = []
    clipped_step(optimizer, scaler, told.append)
    assert all(weight.grad is None for weight in weights)
    return [-weight.item() for weight in weights], told


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(
    ("grads", "moved"),
    [
        ((30.0, 40.0), [6.0, 0.8]),  # norm 50: a fifth of both
        ((3.0, 4.0), [3.0, 0.4]),  # norm 5
        ((0.0, 400.0), [0.0, 1.0]),
        ((9.9, 0.0), [9.9, 0.0]),
    ],
)
def test_all_gradients_together_are_clipped_at_ten(
    enabled: bool, grads: tuple[float, float], moved: list[float]
) -> None:
    """With a scaler the gradients that arrive are 1,024 times as large: clipping comes after unscaling."""
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=enabled)
    assert updates_of(scaler, grads)[0] == pytest.approx(moved, rel=CLIP_EPSILON)


def test_the_watch_is_told_the_norm_before_clipping_unless_the_scaler_looks_at_it() -> None:
    (norm,) = updates_of(GradScaler("cpu", enabled=False), (30.0, 40.0))[1]
    assert float(norm) == pytest.approx(50.0, rel=CLIP_EPSILON)
    assert updates_of(GradScaler("cpu", init_scale=SCALE), (30.0, 40.0))[1] == [None]


def test_a_step_with_an_infinite_gradient_is_skipped_and_halves_the_scale() -> None:
    scaler = GradScaler("cpu", init_scale=SCALE)
    assert updates_of(scaler, (float("inf"), 1.0))[0] == [0.0, 0.0]
    assert scaler.get_scale() == SCALE / 2
    assert updates_of(scaler, (1.0, 2.0))[0] == pytest.approx([1.0, 0.2], rel=CLIP_EPSILON)


# --- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@contextmanager
def enabled_scaler(growth_interval: int = 1000) -> Iterator[None]:
    """Trainers in the block get a GradScaler that doubles its scale after `growth_interval` steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.amp.GradScaler",
            lambda *_, **__: GradScaler("cpu", init_scale=SCALE, growth_interval=growth_interval),
        )
        yield


def settings(n_train: int, epochs: int, nbs: int) -> dict[str, Any]:
    """Trainings in batches of 2."""
    sizes = {"data.n_train": n_train, "data.n_val": 2, "train.batch": 2}
    sizes |= {"train.epochs": epochs, "train.val_every": epochs}
    return sizes | {f"hyp.{key}": value for key, value in RECIPE.items()} | {"hyp.nbs": nbs}


def test_training_under_a_scaler_is_training_without_one(runs_dir: Path) -> None:
    """Bit for bit, also where options of `quant` change the scaled gradients; the scale doubles on the way."""
    options = {"quant.learned_scale": True, "quant.dampening": 1.0}
    recorders = []
    for name in ("without", "with"):
        config, run = settle(runs_dir, name, "qat", settings(6, 1, 2) | options)
        recorder = Recorder()
        if name == "with":
            with enabled_scaler(growth_interval=2):
                folder = train_recorded(config, run, recorder)
                assert load_checkpoint(folder / "weights" / "last.pt")["scaler"]["scale"] == 2 * SCALE
        else:
            train_recorded(config, run, recorder)
        recorders.append(recorder)
    assert len(recorders[0].updates) == 3
    for plain, scaled in zip(recorders[0].updates, recorders[1].updates, strict=True):
        assert torch.equal(plain.network, scaled.network)


def test_a_resumed_training_has_the_state_of_the_scaler(runs_dir: Path) -> None:
    """Six steps, the scale doubles after four: it is doubled once, and two steps have been counted since."""
    config, run = settle(runs_dir, "resumed", "fp16", settings(4, 3, 2) | AT_EVERY_STEP)
    recorder = Recorder(crash_before=(5,))
    with enabled_scaler(growth_interval=4):
        folder = train_recorded(config, run, recorder)
    assert len(recorder.steps) == 6
    scaler = load_checkpoint(folder / "weights" / "last.pt")["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2 * SCALE, 2)


BAD = 2  # the batch, from 0, with an infinite gradient: the first of the second step's two


@pytest.fixture(scope="module")
def skipped(runs_dir: Path) -> tuple[Recorder, Recorder, dict[str, Any]]:
    """Our training and Ultralytics' with one skipped step of four, two batches each, and our last checkpoint."""
    config, run = settle(runs_dir, "skipped", "fp16", settings(8, 2, 4))
    ours = Recorder(factors={BAD: float("inf")})
    with enabled_scaler():
        folder = train_recorded(config, run, ours)
        stock = train_stock(config, run, RECIPE | {"nbs": 4}, factors={BAD: float("inf")})
    return ours, stock, load_checkpoint(folder / "weights" / "last.pt")


def test_a_skipped_step_leaves_the_weights_and_the_next_one_is_taken(skipped: tuple[Recorder, Recorder, Any]) -> None:
    ours = skipped[0]
    assert [step.batch for step in ours.steps] == [1, 5, 7]  # not 3; the bad gradient is not part of the next one
    before, after, later = (update.parameters for update in ours.updates[:3])
    assert torch.equal(after, before)
    assert not torch.equal(later, after)


def test_a_skipped_step_counts_for_the_average_and_is_no_fault(skipped: tuple[Recorder, Recorder, Any]) -> None:
    """As in Ultralytics' loop; the GradScaler alone deals with it."""
    ours, _, last = skipped
    assert [(update.batch, update.count) for update in ours.updates] == [(1, 1), (3, 2), (5, 3), (7, 4)]
    assert last["ema_updates"] == 4
    assert last["faults"] == []
    assert (last["scaler"]["scale"], last["scaler"]["_growth_tracker"]) == (SCALE / 2, 2)


def test_the_steps_around_a_skipped_one_are_ultralytics(skipped: tuple[Recorder, Recorder, Any]) -> None:
    ours, stock, _ = skipped
    assert [step.batch for step in ours.steps] == [step.batch for step in stock.steps]
    for update, other in zip(ours.updates, stock.updates, strict=True):
        assert (update.batch, update.count) == (other.batch, other.count)
        assert distance(update.network, other.network, ours.initial) < SGD_ERROR
        assert distance(update.average, other.average, ours.initial) < SGD_ERROR
