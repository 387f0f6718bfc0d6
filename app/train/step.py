"""One step of the optimizer, its warm-up, the EMA's decay after it, and the loss of one rank's part of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from app.core.config import Hyp, Train
from app.quant.norm import is_installed
from app.train.loss import GpuLoss
from app.train.processes import Ranks

MAX_NORM = 10.0  # of a step's gradients, as Ultralytics has it
IMPLEMENTATION = ("fused", "foreach")  # keys of an optimizer's groups that say how it computes, and not what
FurtherLoss = Callable[[torch.Tensor, dict[str, Any], Any], torch.Tensor]


def unwritten_inputs(shape: torch.Size, device: torch.device, amp: bool) -> torch.Tensor:
    """Room for images [N,3,H,W] on a GPU, in the type and layout of the first convolution."""
    dtype = torch.float16 if amp else torch.float32
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Rise:
    """A step, counted from 0, of a warm-up of n_steps."""

    step: int
    n_steps: int

    def between(self, start: float, end: float) -> float:
        """The number on the line from `start` at step 0 to `end` at n_steps."""
        return float(np.interp(self.step, [0, self.n_steps], [start, end]))


def warm_up(optimizer: torch.optim.Optimizer, hyp: Hyp, rise: Rise, lr_factor: float) -> None:
    """Sets learning rates and momentum of a step of the warm-up; `lr_factor` is the schedule's at this epoch.

    Ultralytics' rule (engine/trainer.py _do_train, 8.4.190): the rate of biases begins at warmup_bias_lr, others at 0.
    """
    for group in optimizer.param_groups:
        start = hyp.warmup_bias_lr if group.get("param_group") == "bias" else 0.0
        group["lr"] = rise.between(start, group["initial_lr"] * lr_factor)
        if "momentum" in group:
            group["momentum"] = rise.between(hyp.warmup_momentum, hyp.momentum)


def trained_weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The trained weights. A quantized YOLOv10m has 6,420 modules, and to ask all of them takes 9 ms."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def clipped_step(
    optimizer: torch.optim.Optimizer, scaler: GradScaler, watch: Callable[[torch.Tensor | None], None]
) -> None:
    """Ultralytics' optimizer_step without the EMA (engine/trainer.py, 8.4.190).

    Args:
        watch: receives the 2-norm of all gradients before they are used, or None where the GradScaler looks at them.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained_weights(optimizer), MAX_NORM)
    watch(None if scaler.is_enabled() else norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def ema_decay(settings: Train, n_updates: int) -> float:
    """Ultralytics' ramp: the average of the weights follows fast at first."""
    return settings.ema_decay * (1 - math.exp(-n_updates / settings.ema_tau))


def fuse(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, groups and settings with PyTorch's fused kernel, which does not wait for the GradScaler."""
    groups = []
    for group in optimizer.param_groups:
        groups.append({key: value for key, value in group.items() if key not in IMPLEMENTATION})
    fused = cast(Any, type(optimizer))(groups, fused=True)
    fill_momentum(fused)
    return fused


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives each weight of a fused SGD that has no momentum yet one of zeros, which gives the same first step.

    By itself the fused SGD makes the momentum from unwritten memory in its first step. If the GradScaler skips that
    step (infinite gradients are normal while its scale settles), the momentum stays unwritten, and every weight becomes
    noise or NaN (torch/optim/sgd.py _fused_sgd, 2.10).
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for weight in group["params"] if group["fused"] and group["momentum"] else []:
            if optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer the state of one of the same kind, which may have trained on another device.

    The implementation stays its own: the GradScaler leaves it to an optimizer that was made fused to skip a step with
    infinite gradients, and only the fused kernels do so. They take momentum that is strided like its weight; weights
    are channels_last on a GPU alone.
    """
    groups = []
    for own, group in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        groups.append({**group, **{key: own[key] for key in IMPLEMENTATION}})
    optimizer.load_state_dict({**state, "param_groups": groups})
    for weight, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                entries[name] = torch.empty_like(weight).copy_(value)
    fill_momentum(optimizer)


def loss_of(
    net: Any, batch: dict[str, Any], beside: FurtherLoss | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a network for a batch on its device, a scalar, and the detection's terms by name.

    Args:
        batch: images float32 0..1, labels as Ultralytics has them.
        beside: a loss that is added; it takes the images, the outputs of both heads and the criterion.
    """
    preds = net(batch["img"])
    loss, items = net.loss(batch, preds)
    loss = loss.sum()
    return loss + beside(batch["img"], preds, net.criterion) if beside else loss, items


def watched_terms(loss: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """The terms, detached, and all NaN where the trained loss is not finite.

    They are those of the one2one head; the loss has the one2many head and what is added beside it too.

    Args:
        loss: that is trained, a scalar.
        terms: of the one2one head, float32 [3].
    """
    return terms.detach() + loss.detach() * 0


def criterion_of_part(net: Any, ranks: Ranks) -> E2ELoss:
    """Ultralytics' loss of both heads: its own for a whole batch, PartLoss where each rank has a part of the batch.

    Of a network with our kernels it computes in kernels of fixed size too, app/train/loss.py.
    """
    loss: Any = partial(PartLoss, ranks) if ranks.n > 1 else v8DetectionLoss
    return GpuLoss(net, ranks, loss) if is_installed(net) else E2ELoss(net, loss)


def criterion_after(n_epochs: int, net: Any, ranks: Ranks) -> E2ELoss:
    """The same loss, with the weights of the two heads that it has after `n_epochs`."""
    criterion = criterion_of_part(net, ranks)
    criterion.updates = n_epochs - 1
    criterion.update()
    return criterion


class PartLoss(v8DetectionLoss):
    """Ultralytics' loss, normalised over all ranks.

    Ultralytics divides sums over a batch by the batch's sum of target scores, and multiplies them by the number of
    images (utils/loss.py v8DetectionLoss, 8.4.190). With the sums of its own part, N ranks would train on another loss
    than one rank does: parts with few objects would weigh more. Here both numbers are those of the whole batch, so
    losses and gradients, summed over the ranks, are the whole batch's.
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
        own = torch.stack([self.score_sum.float(), self.score_sum.new_tensor(preds["boxes"].shape[0]).float()])
        score_sum, n_images = self.ranks.all_reduce(own)
        share = self.score_sum.clamp(min=1) / score_sum.clamp(min=1)
        return loss * share * n_images, {name: value * share for name, value in items.items()}
