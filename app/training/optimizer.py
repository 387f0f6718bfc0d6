"""The optimizer: its step, and one fused pass over all weights on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.amp.grad_scaler import GradScaler

MAX_NORM = 10.0  # of a step's gradients, as Ultralytics has it


def clipped_step(
    optimizer: torch.optim.Optimizer, scaler: GradScaler, watch: Callable[[torch.Tensor | None], None]
) -> None:
    """Ultralytics' optimizer_step without the EMA (engine/trainer.py, 8.4.190).

    That one asks the model for its parameters. Of a quantized YOLOv10m these are 6,420 modules to walk through, 9 ms,
    where the float model has 498: the optimizer's own list holds the same weights.

    Args:
        watch: is told the 2-norm of all gradients before they are used; None where the GradScaler looks at them.
    """
    scaler.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
    watch(None if scaler.is_enabled() else norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def fuse(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, groups and settings with PyTorch's fused kernel; it does not wait for the GradScaler.

    SGD's momentum starts as zeros, which gives the same first step. Left to itself the fused SGD makes it from
    unwritten memory in its first step, and a first step that the GradScaler skips (infinite gradients while its scale
    settles are normal) leaves it so: from then on every weight is noise or NaN (torch/optim/sgd.py _fused_sgd, 2.10).
    """
    own = ("fused", "foreach")
    groups = [{key: value for key, value in group.items() if key not in own} for group in optimizer.param_groups]
    fused = cast(Any, type(optimizer))(groups, fused=True)
    if isinstance(fused, torch.optim.SGD):
        for group in fused.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                fused.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return fused
