"""Our loop and Ultralytics' own, with the same recipe on the same batches: the same steps.

Four batches an epoch and two to a step, so that an epoch of Ultralytics' ends with a step, as ours does by design.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.recorder import Recorder, Update, distance
from tests.support.settle import settle
from tests.support.tiny import tiny_network, train_recorded, train_stock

SIZE = {"data.n_train": 8, "data.n_val": 2, "train.batch": 2, "train.epochs": 4, "train.val_every": 4}
RECIPE = {
    "lr0": 0.01, "lrf": 0.1, "momentum": 0.937, "weight_decay": 0.0005, "warmup_epochs": 1.0, "warmup_momentum": 0.8,
    "warmup_bias_lr": 0.1, "nbs": 4, "close_mosaic": 2, "mosaic": 1.0, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
    "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "copy_paste": 0.0, "mixup": 0.0,
}  # fmt: skip
# Warm-up: a step takes 1, 1.25, 1.5 and 1.75 batches, which round to 1, 1, 2 and 2.
STEPS = [0, 1, 3, 5, 7, 9, 11, 13, 15]
FACTORS = {6: 1e5}  # of the gradient of one batch, so that its step is clipped
EXACT = 1e-12  # relative: the same FP64 numbers, one of them in another order of operations
# Relative: the norm of the gradients is summed in another order, an error of 1e-7 a step, which training carries on: it
# grows to 2e-5 of the way from the initial weights in nine steps.
SAME = 1e-3
FP32 = 1e-4  # absolute: a decay from FP32 averages that lie far apart from the weights


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@pytest.fixture(scope="module", params=["SGD", "AdamW"])
def pair(request: pytest.FixtureRequest, runs_dir: Path) -> tuple[str, Recorder, Recorder]:
    """Name of the optimizer, our training, Ultralytics' training."""
    recipe: dict[str, Any] = {"optimizer": request.param, **RECIPE}
    config, run = settle(runs_dir, request.param, "fp16", SIZE | {f"hyp.{key}": value for key, value in recipe.items()})
    ours = Recorder(factors=FACTORS)
    train_recorded(config, run, ours)
    return request.param, ours, train_stock(config, run, recipe, FACTORS)


def test_steps_are_taken_after_the_same_batches(pair: tuple[str, Recorder, Recorder]) -> None:
    _, ours, stock = pair
    assert [step.batch for step in ours.steps] == [step.batch for step in stock.steps] == STEPS


def test_every_group_has_the_same_rate_momentum_and_decay(pair: tuple[str, Recorder, Recorder]) -> None:
    for ours, stock in zip(pair[1].steps, pair[2].steps, strict=True):
        assert len(ours.groups) == len(stock.groups) == 3
        for group, other in zip(ours.groups, stock.groups, strict=True):
            assert astuple(group) == pytest.approx(astuple(other), rel=EXACT)


def test_batches_and_head_weights_are_the_same(pair: tuple[str, Recorder, Recorder]) -> None:
    """So is mosaic, which the images show."""
    assert len(pair[1].batches) == len(pair[2].batches) == 16
    for ours, stock in zip(pair[1].batches, pair[2].batches, strict=True):
        assert (ours.one2many, ours.one2one) == pytest.approx((stock.one2many, stock.one2one), rel=EXACT)
        assert list(ours.images) == list(stock.images)
        assert all(torch.equal(image, stock.images[name]) for name, image in ours.images.items())


def test_the_default_average_decays_as_theirs(pair: tuple[str, Recorder, Recorder]) -> None:
    ours, stock = (decays(recorder) for recorder in pair[1:])
    assert ours == pytest.approx(stock, abs=FP32)


def decays(recorder: Recorder) -> list[float]:
    """The share of the average before each update that is in the one after it."""
    before = [recorder.initial, *(update.average for update in recorder.updates)]
    return [share_of(average, update) for average, update in zip(before, recorder.updates, strict=False)]


def share_of(before: torch.Tensor, update: Update) -> float:
    difference = before - update.network
    return float(((update.average - update.network) @ difference) / (difference @ difference))


def test_weights_gradients_and_averages_are_the_same(pair: tuple[str, Recorder, Recorder]) -> None:
    _, ours, stock = pair
    assert torch.equal(ours.initial, stock.initial)
    norms = [[step.grad_norm for step in recorder.steps] for recorder in (ours, stock)]
    assert norms[0] == pytest.approx(norms[1], rel=SAME)
    for update, other in zip(ours.updates, stock.updates, strict=True):
        assert update.count == other.count
        assert distance(update.network, other.network, ours.initial) < SAME
        assert distance(update.average, other.average, ours.initial) < SAME
