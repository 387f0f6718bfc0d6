"""The fused optimizer through a first step that the GradScaler skips, as nearly every training in FP16 begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from app.train.checkpoint import optimizer_state
from app.train.step import fuse

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
WEIGHT_DECAYS_PART = 0.01  # of a step


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """So that a read of it shows."""
    torch.use_deterministic_algorithms(True)
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def step(optimizer: torch.optim.Optimizer, scaler: GradScaler, parameter: torch.Tensor, grad: float) -> None:
    parameter.grad = torch.full_like(parameter, grad) * scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def after(make: Any, grads: list[float], fused: bool, ours: bool = True) -> torch.Tensor:
    """Weights after steps with these gradients."""
    parameter = torch.nn.Parameter(torch.ones(5))
    settings: dict[str, Any] = SETTINGS if make is torch.optim.SGD else {"lr": 0.1}
    plain = make([parameter], **settings)
    optimizer = (fuse(plain) if ours else make([parameter], **settings, fused=True)) if fused else plain
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))  # makes the scale
    for grad in grads:
        step(optimizer, scaler, parameter, grad)
    return parameter.detach()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("grads", [[1.0, -0.5, 2.0], [float("inf"), 1.0, -0.5], [1.0, float("inf"), 2.0]])
def test_fused_is_the_plain_optimizer(make: Any, grads: list[float]) -> None:
    torch.testing.assert_close(after(make, grads, fused=True), after(make, grads, fused=False))


def test_pytorch_still_needs_it() -> None:
    """When this fails, torch has mended its fused SGD, and the zeros in app/train/step.py can go."""
    assert after(torch.optim.SGD, [float("inf"), 1.0], fused=True, ours=False).isnan().all()


@pytest.mark.parametrize("fused", [True, False])
def test_a_learned_scale_that_a_branch_adds_begins_as_in_a_new_optimizer(fused: bool) -> None:
    """The momentum of the weights goes on; the fused SGD takes no weight without one beside weights with one."""

    def make(*parameters: torch.nn.Parameter) -> torch.optim.Optimizer:
        plain = torch.optim.SGD(parameters, **SETTINGS)
        return fuse(plain) if fused else plain

    weight, scale = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    weight.grad, scale.grad = torch.full((3,), 2.0), torch.full((3,), -1.0)
    trunk = make(weight)
    trunk.step()
    branch = make(weight, scale)
    branch.load_state_dict(optimizer_state(branch, trunk.state_dict()))
    before = weight.detach().clone()
    branch.step()
    alone = torch.nn.Parameter(torch.ones(3))
    alone.grad = scale.grad.clone()
    make(alone).step()
    torch.testing.assert_close(scale, alone)
    second_step = 0.1 * (2.0 + 0.9 * (2.0 + 0.9 * 2.0))  # Nesterov's, with the momentum of the first
    torch.testing.assert_close(before - weight, torch.full((3,), second_step), rtol=WEIGHT_DECAYS_PART, atol=0)
