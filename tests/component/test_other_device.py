"""A training that goes on with a GPU after it began without one, and the other way round.

The GPU's part is played by what a training has on it alone: an enabled GradScaler and a fused optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from app.quant.model import load_checkpoint
from app.train.loop import Loop
from app.train.step import fuse, load_optimizer
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network

# 16 images in batches of 8, one to an optimizer step.
SETTINGS = {
    "data.n_train": 16, "data.n_val": 4, "train.batch": 8, "train.epochs": 2, "hyp.nbs": 8, "hyp.warmup_epochs": 0,
    "hyp.close_mosaic": 0, **AT_EVERY_STEP,
}  # fmt: skip
SCALE = 1024.0
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    build_optimizer = Trainer.build_optimizer

    def fused(self: Trainer, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return fuse(build_optimizer(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "build_optimizer", fused)
        patch.setattr("torch.amp.GradScaler", lambda *_, **__: GradScaler("cpu", init_scale=SCALE))
        yield


@contextmanager
def stopped_before(step: int) -> Iterator[None]:
    """The block's training is killed before its optimizer step of this number, counted from 1."""
    optimizer_step = Loop.optimizer_step

    def stop(self: Loop) -> None:
        if self.state.ema.updates == step - 1:
            raise KeyboardInterrupt
        optimizer_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_training_that_began_without_a_gpu_goes_on_with_one(runs_dir: Path, optimizer: str) -> None:
    config, run = settle(runs_dir, f"to-{optimizer}", "qat", {**SETTINGS, "hyp.optimizer": optimizer})
    with stopped_before(3):
        train(config, run, force=False)
    with as_on_a_gpu():
        train(config, run, force=False)
    last = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert last["ema_updates"] == 4
    assert (last["scaler"]["scale"], last["scaler"]["_growth_tracker"]) == (SCALE, 2), "it began with the third step"
    assert all(group["fused"] for group in last["optimizer"]["param_groups"])


def test_a_training_that_began_with_a_gpu_goes_on_without_one(runs_dir: Path) -> None:
    config, run = settle(runs_dir, "back", "qat", SETTINGS)
    with as_on_a_gpu(), stopped_before(3):
        train(config, run, force=False)
    train(config, run, force=False)
    last = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert (last["ema_updates"], last["scaler"]) == (4, {})
    assert not any(group["fused"] for group in last["optimizer"]["param_groups"])


def test_a_branch_of_a_training_without_a_gpu(runs_dir: Path) -> None:
    """Its learned scales are further parameters of the optimizer."""
    config, run = settle(runs_dir, "branch", "fp16", {**SETTINGS, "train.save_period": 1})
    train(config, run, force=False)
    warm_up = {"quant.warmup_share": 0.5, "quant.warmup_bits": "float", "quant.learned_scale": True}
    kept = run.variant_dir("fp16") / "weights" / "epoch1.pt"
    config, run = settle(runs_dir, "branch", "qat", SETTINGS | warm_up | {"quant.warmup_from": kept})
    with as_on_a_gpu():
        train(config, run, force=False)
    last = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert last["scaler"]["scale"] == SCALE
    assert all(group["fused"] for group in last["optimizer"]["param_groups"])


def weight_with_grad(memory_format: torch.memory_format) -> torch.nn.Parameter:
    values = torch.linspace(-1, 1, 2 * 3 * 2 * 2).view(2, 3, 2, 2)
    weight = torch.nn.Parameter(values.to(memory_format=memory_format))
    weight.grad = values.square().to(memory_format=memory_format)
    return weight


@pytest.mark.parametrize("n_steps_before", [0, 1])
@pytest.mark.parametrize("to_fused", [True, False])
def test_the_momentum_goes_on_in_the_other_implementation_and_layout(n_steps_before: int, to_fused: bool) -> None:
    """The first step there is one that the GradScaler skips; the one after it is that of a plain optimizer."""
    formats = (torch.contiguous_format, torch.channels_last)
    first, second = (weight_with_grad(memory_format) for memory_format in (formats if to_fused else formats[::-1]))
    made = [torch.optim.SGD([weight], **SGD) for weight in (first, second)]
    before, after = (made[0], fuse(made[1])) if to_fused else (fuse(made[0]), made[1])
    for _ in range(n_steps_before):
        before.step()
    second.data.copy_(first.data)
    load_optimizer(after, deepcopy(before.state_dict()))
    assert all(value.stride() == second.stride() for value in after.state[second].values())
    scaler = GradScaler("cpu", init_scale=1.0)
    for grad in (float("inf"), 0.5):
        second.grad = torch.full_like(second, grad)
        scaler.scale(torch.ones(1))
        scaler.step(after)
        scaler.update(1.0)
    assert after.param_groups[0]["fused"] is (True if to_fused else None)
    first.grad = torch.full_like(first, 0.5)
    before.step()
    torch.testing.assert_close(second, first, check_stride=False)
