"""The optimizer step, and the loss of one process's part of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from app.train.processes import Ranks


def criterion_of_part(net: Any, ranks: Ranks) -> E2ELoss:
    """Ultralytics' loss of both heads for one process's part of a batch; its own where that is the whole batch."""
    return E2ELoss(net, cast(Any, partial(PartLoss, ranks))) if ranks.n > 1 else net.init_criterion()


def criterion_after(n_epochs: int, net: Any, ranks: Ranks) -> E2ELoss:
    """The same with the weights of the two heads as they are after so many epochs."""
    criterion = criterion_of_part(net, ranks)
    criterion.updates = n_epochs - 1
    criterion.update()
    return criterion


class PartLoss(v8DetectionLoss):
    """Ultralytics' loss, normalised over all processes.

    It divides sums over a batch by the batch's sum of target scores, and multiplies them by the number of images
    (utils/loss.py v8DetectionLoss, 8.4.190). With a part's own sum, N processes would train on another loss than one
    process: parts with few objects would weigh more. Here both numbers are those of the whole batch: summed over the
    processes, losses and gradients are the whole batch's.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, **assigner: Any) -> None:
        super().__init__(model, **assigner)
        self.ranks = ranks
        self.score_sum = torch.zeros(())
        self.assigner.register_forward_hook(self._note_score_sum)

    def _note_score_sum(self, assigner: nn.Module, args: Any, targets: tuple[torch.Tensor, ...]) -> None:
        self.score_sum = targets[2].sum()

    def loss(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> Any:
        """As v8DetectionLoss.loss: box, class and DFL loss [3] times images, and the same detached, by name."""
        loss, items = self.get_assigned_targets_and_loss(preds, batch)[1:]
        n_images = preds["boxes"].shape[0]
        whole = self.ranks.add(torch.stack([self.score_sum.float(), self.score_sum.new_tensor(n_images).float()]))
        share = self.score_sum.clamp(min=1) / whole[0].clamp(min=1)
        return loss * share * whole[1], {name: value * share for name, value in items.items()}


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
