"""The optimizer on a GPU: one fused pass over all weights."""

from __future__ import annotations

from typing import Any, cast

import torch


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
