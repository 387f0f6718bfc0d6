"""Post-hoc quantization correction: a scale and a shift for every output channel of a quantized convolution."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from brevitas.nn import QuantConv2d
from torch import nn
from torch.amp.grad_scaler import GradScaler

from app.core.config import Config
from app.quant.model import cpu_state_dict, save_checkpoint
from app.train.processes import ALONE
from app.train.state import State
from app.train.step import criterion_after

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Correction:
    """z = scale * conv(x) + shift, [channels,1,1] each; `norm` follows the convolution, or it has a bias."""

    conv: QuantConv2d
    norm: nn.BatchNorm2d | None
    scale: nn.Parameter
    shift: nn.Parameter

    def __call__(self, conv: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * self.scale.to(out.dtype) + self.shift.to(out.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """BN(scale y + shift) = w' (y - mu) / sigma + b', w' = w scale, b' = b + w / sigma (shift + mu (scale - 1)).

        Without a BatchNorm the shift goes into the bias.
        """
        scale, shift = self.scale.flatten(), self.shift.flatten()
        if self.norm is None:
            cast(torch.Tensor, self.conv.bias).add_(shift)
            return
        mean, variance = cast(Any, self.norm.running_mean), cast(Any, self.norm.running_var)
        self.norm.bias.add_(self.norm.weight / (variance + self.norm.eps).sqrt() * (shift + mean * (scale - 1)))
        self.norm.weight.mul_(scale)


def correct(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    lr: float,
    accumulate: int = 1,
) -> int:
    """Trains scale and shift of every quantized convolution, everything else and BatchNorm's statistics fixed, and
    folds them into the BatchNorm that follows.

    Gupta & Asthana, "Reducing the Side-Effects of Oscillations in Training of Quantized YOLO Networks", WACV 2024,
    section 3.3. Adam at a constant `lr` is ours. A convolution without BatchNorm (the last of a head branch) gets a
    shift alone, in its bias: a scale would have to go into its quantized weights.

    Args:
        model: in the state that is scored: EMA weights, BatchNorm re-estimated (not after this again). Only weight and
            bias of its BatchNorm layers and biases of convolutions change; modes and requires_grad are restored.
        batches: one epoch of what `loss_of` takes, on the model's device.
        loss_of: gives the scalar loss of the model, in training mode, for one batch.
        lr: learning rate.
        accumulate: batches of an optimizer step.

    Returns:
        the number of steps.
    """
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    corrections = list(_corrections(model))
    handles = [correction.conv.register_forward_hook(correction) for correction in corrections]
    try:
        losses = (loss_of(model, batch) for batch in batches)
        n_steps = _train(corrections, losses, lr, accumulate) if corrections else 0
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
    for correction in corrections:
        correction.fold()
    return n_steps


def _corrections(model: nn.Module) -> Iterator[_Correction]:
    for parent in model.modules():
        children = list(parent.children())
        for layer, following in itertools.zip_longest(children, children[1:]):
            if not isinstance(layer, QuantConv2d):
                continue
            norm = following if isinstance(following, nn.BatchNorm2d) else None
            if norm is None and layer.bias is None:
                continue  # DFL, a fixed sum: there is nothing to fold into
            ones = torch.ones(layer.out_channels, 1, 1, device=layer.weight.device)
            trained_scale = nn.Parameter(ones.clone(), requires_grad=norm is not None)
            yield _Correction(layer, norm, trained_scale, nn.Parameter(torch.zeros_like(ones)))


def _train(corrections: list[_Correction], losses: Iterator[torch.Tensor], lr: float, accumulate: int) -> int:
    """One Adam step for so many losses, the last one for those that are left; gives the number of steps."""
    parameters = []
    for correction in corrections:
        parameters += [part for part in (correction.scale, correction.shift) if part.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    scaler = GradScaler(enabled=parameters[0].is_cuda)  # losses may come from FP16 autocast

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    n_losses = 0
    for n_losses, loss in enumerate(losses, 1):
        scaler.scale(loss).backward()
        if n_losses % accumulate == 0:
            step()
    if n_losses % accumulate:
        step()
    return math.ceil(n_losses / accumulate)


def model_of(state: State, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A model with these weights, and with the loss that the last epoch had, on one rank."""
    model: Any = deepcopy(state.ema.ema)
    model.load_state_dict(weights)
    model.criterion = criterion_after(state.net.criterion.updates, model, ALONE)
    return model


def keep_better(path: Path, config: Config, best: dict[str, Any], model: nn.Module, ap: float) -> float:
    """Replaces the checkpoint `best` at `path` by the corrected model if its AP is not lower; gives the higher AP.

    The new checkpoint says that it is corrected.
    """
    is_better = ap >= best["fitness"]
    if is_better:
        entries = {**best, "scored": cpu_state_dict(model), "fitness": ap, "corrected": True}
        save_checkpoint(path, config, entries)
    log.info("correction: AP %.3f -> %.3f, best.pt %s", best["fitness"], ap, "replaced" if is_better else "kept")
    return max(ap, best["fitness"])
