"""Post-hoc quantization correction: a scale and a shift for every channel that a quantized convolution gives."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from brevitas.nn import QuantConv2d
from torch import nn
from torch.amp.grad_scaler import GradScaler
from ultralytics.utils.torch_utils import autocast

from app.core.config import UserError
from app.core.progress import track
from app.core.results import write_rows
from app.quant.model import load_checkpoint, save_checkpoint, scored_state
from app.train.loader import train_loader
from app.train.processes import ALONE
from app.train.step import criterion_after
from app.train.validation import SCORES

if TYPE_CHECKING:
    from app.train.trainer import Trainer


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
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], torch.Tensor], lr: float
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

    Returns:
        the number of steps.
    """
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.train().requires_grad_(False)
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.eval()
    corrections = list(_corrections(model))
    handles = [correction.conv.register_forward_hook(correction) for correction in corrections]
    try:
        n_steps = _train(corrections, (loss_of(model, batch) for batch in batches), lr)
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
                raise UserError(f"quant.correction_epochs: {layer} has neither BatchNorm nor bias to fold into")
            ones = torch.ones(layer.out_channels, 1, 1, device=layer.weight.device)
            trained_scale = nn.Parameter(ones.clone(), requires_grad=norm is not None)
            yield _Correction(layer, norm, trained_scale, nn.Parameter(torch.zeros_like(ones)))


def _train(corrections: list[_Correction], losses: Iterator[torch.Tensor], lr: float) -> int:
    """One Adam step a loss."""
    parameters = [p for c in corrections for p in (c.scale, c.shift) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    scaler = GradScaler(enabled=parameters[0].is_cuda)  # losses may come from FP16 autocast
    n_steps = 0
    for loss in losses:
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        n_steps += 1
    return n_steps


log = logging.getLogger(__name__)


def correct_best(trainer: Trainer) -> None:
    """Corrects the state in best.pt on one epoch of train images (see `correct`); replaces it if its AP is not
    lower. results.csv gets AP/corrected in its last row. Does nothing where the option is off or all is done.
    """
    quant = trainer.config.quant
    if quant is None or not quant.correction_epochs or "AP/corrected" in trainer.rows[-1]:
        return
    best = load_checkpoint(trainer.best)
    held_out: Any = deepcopy(trainer.ema.ema)
    trainer.held_out = held_out
    held_out.load_state_dict(best["scored"])
    held_out.criterion = criterion_after(trainer.net.criterion.updates, held_out, ALONE)

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with autocast(trainer.amp, device=trainer.device.type):
            return model(batch)[0].sum()

    correct(held_out, _one_epoch(trainer), loss_of, quant.correction_lr)
    scores = trainer.validator(trainer)
    ap = scores[SCORES["AP"]]
    is_better = ap >= best["fitness"]
    if is_better:
        save_checkpoint(trainer.best, trainer.config, {**best, "scored": scored_state(held_out), "fitness": ap})
    log.info("correction: AP %.3f -> %.3f, best.pt %s", best["fitness"], ap, "replaced" if is_better else "kept")
    trainer.rows[-1]["AP/corrected"] = ap
    write_rows(trainer.save_dir / "results.csv", trainer.rows)
    trainer.monitor.writer.add_scalar("AP/corrected", ap, trainer.epochs)
    trainer.save_model()


def _one_epoch(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """The epoch after the last one, augmented as the last one was; whole batches, whatever the number of processes."""
    trainer.train_loader.close()
    dataset, pin_memory = trainer.train_loader.dataset, trainer.device.type == "cuda"
    loader = train_loader(dataset, trainer.args.workers, pin_memory, start=(trainer.epochs, 0))
    for batch in track(loader, "correction", len(loader), "batches"):
        yield trainer.preprocess_batch(batch)
    loader.close()
