"""BatchNorm is re-estimated on the images that the averaged weights have seen: with mosaic, then a mixture."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.config import Config, load
from app.core.run import RunRoot
from app.train.bn_images import N_PINNING, mosaic_share, pinned_ahead
from app.train.ptq import bn_images
from tests.support.settle import sets_of, settle

N_BATCHES = 4
SETTINGS = {
    "data.n_train": 16, "data.n_val": 4, "train.batch": 4, "train.epochs": 8, "train.bn_batches": 4,
    "train.ema_decay": 0.9, "train.ema_tau": 0.1, "hyp.nbs": 8, "hyp.close_mosaic": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def settled(runs_dir: Path) -> tuple[Config, RunRoot]:
    return settle(runs_dir, "r", "fp16", SETTINGS)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    ("settings", "epoch", "share"),
    [
        ({}, 4, 1.0),  # the last epoch with mosaic
        ({}, 5, 0.9**2),  # two optimizer steps of two batches each
        ({}, 7, 0.9**6),
        ({"hyp.nbs": 4}, 5, 0.9**4),
        ({"train.ema_tau": 10}, 5, 0.9**2 * (1 - exp(-1.1)) * (1 - exp(-1.2))),  # updates 11 and 12
        ({"hyp.close_mosaic": 0}, 7, 1.0),
        ({"hyp.close_mosaic": 9}, 0, 0.0),  # it was never on
    ],
)
def test_share_is_the_weight_of_old_steps_in_the_average(settings: dict[str, Any], epoch: int, share: float) -> None:
    config = load("fp16", sets=sets_of(SETTINGS | settings))
    assert mosaic_share(config, N_BATCHES, epoch) == pytest.approx(share)


def test_share_of_the_full_run_at_its_end() -> None:
    assert mosaic_share(load("qat"), 3697, 299) == pytest.approx(0.157, abs=1e-3)


def test_images_become_those_without_mosaic_one_after_the_other(settled: tuple[Config, RunRoot]) -> None:
    images = bn_images(*settled, workers=0)
    before, again = list(images.after(3)), list(images.after(4))
    assert len(before) == N_BATCHES
    assert all(same(before, again))
    mixed = list(images.after(5))  # round(4 * 0.81)
    assert same(before, mixed) == [True, True, True, False]
    assert same(mixed, list(images.after(7))) == [True, True, False, True]  # round(4 * 0.53)


def test_images_are_not_kept_in_shared_memory(settled: tuple[Config, RunRoot]) -> None:
    """What a loader process hands over stays there as long as somebody holds it, and a container has little of it."""
    assert not any(images.is_shared() for images in bn_images(*settled, workers=1).after(0))


def test_a_training_that_goes_on_draws_the_same(settled: tuple[Config, RunRoot]) -> None:
    whole, resumed = (bn_images(*settled, workers=0) for _ in range(2))
    whole.after(4)
    resumed.dataset.close_mosaic(resumed.hyp.__class__(**vars(resumed.hyp)))  # as the trainer has by then
    transforms = resumed.dataset.transforms
    assert all(same(whole.after(6), resumed.after(6)))
    assert resumed.dataset.transforms is transforms


def test_batches_are_pinned_ahead_of_their_use_and_come_in_order() -> None:
    begun: list[int] = []

    class Batch:
        def __init__(self, number: int) -> None:
            self.number = number

        def pin_memory(self) -> int:
            begun.append(self.number)
            return self.number

    batches: Any = map(Batch, range(5))
    used = []
    for number in pinned_ahead(batches):
        used.append(number)
        assert len(begun) <= number + 1 + N_PINNING
    assert used == sorted(begun) == list(range(5))
    assert list(pinned_ahead([])) == []
