"""Records what a training gives to the loss, the optimizer and the EMA, whichever trainer runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.torch_utils import ModelEMA


@dataclass(frozen=True)
class Batch:
    """A training batch: the gains of the two heads' losses, and the images by file name."""

    one2many: float
    one2one: float
    images: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """A parameter group as the optimizer reads it; `momentum` is AdamW's first beta."""

    lr: float
    momentum: float
    weight_decay: float
    n_matrices: int  # parameters of two or more dimensions: convolution weights
    n_vectors: int  # parameters of one dimension: biases and BatchNorm weights


@dataclass(frozen=True)
class Step:
    """An optimizer step: the number of the training batch before it, the groups, and the norm of all gradients."""

    batch: int
    groups: list[Group]
    grad_norm: float


@dataclass(frozen=True)
class Update:
    """An update of the EMA: the number of the batch before it, `updates` after it, the trained parameters, and these
    with BatchNorm's statistics, of the network and of its average."""

    batch: int
    count: int
    parameters: torch.Tensor
    network: torch.Tensor
    average: torch.Tensor


def distance(values: torch.Tensor, others: torch.Tensor, initial: torch.Tensor) -> float:
    """Distance of two trained states as a share of the way from the initial one."""
    return float((values - others).norm() / (others - initial).norm())


class Recorder:
    """Lists of what happened, in order. A batch whose gradient a crash has lost is trained and recorded again.

    Args:
        crash_before: numbers of optimizer steps, from 0, before which the process is interrupted, once each.
        factors: of the gradient, not the loss, of training batches: number of the batch -> factor of the gradient
            that the scores of the one2many head get.
    """

    def __init__(self, crash_before: tuple[int, ...] = (), factors: dict[int, float] | None = None) -> None:
        self.batches: list[Batch] = []
        self.steps: list[Step] = []
        self.updates: list[Update] = []
        self.initial = torch.zeros(0)
        self.values: list[list[torch.Tensor]] = []
        self.crash_before, self.factors = set(crash_before), factors or {}

    def add_batch(self, loss: E2ELoss, preds: dict[str, Any], batch: dict[str, Any]) -> None:
        factor = self.factors.get(len(self.batches), 1.0)
        preds["one2many"]["scores"].register_hook(lambda grad: grad * factor)
        names = [Path(path).name for path in batch["im_file"]]
        images = dict(zip(names, batch["img"].clone(), strict=True))
        self.batches.append(Batch(loss.o2m, loss.o2o, images))

    def add_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        number = len(self.steps)
        if number in self.crash_before:
            self.crash_before.remove(number)
            del self.batches[self.steps[-1].batch + 1 if self.steps else 0 :]
            raise KeyboardInterrupt
        groups = [group_of(group) for group in optimizer.param_groups]
        grads = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        squares = [float(grad.double().square().sum()) for grad in grads if grad is not None]
        self.steps.append(Step(len(self.batches) - 1, groups, sum(squares) ** 0.5))

    def begin(self, ema: ModelEMA, model: Any) -> None:
        """Keeps the tensors of both networks, which a training changes in place."""
        states = [network.state_dict() for network in (model, ema.ema)]
        floats = [[value for value in state.values() if value.is_floating_point()] for state in states]
        self.values = [list(model.parameters()), *floats]
        if not self.initial.numel():  # else it is a training that continues
            self.initial = flat(floats[1])

    def add_update(self, ema: ModelEMA) -> None:
        values = (flat(values) for values in self.values)
        self.updates.append(Update(len(self.batches) - 1, ema.updates, *values))


def group_of(group: dict[str, Any]) -> Group:
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    n_matrices = sum(weight.ndim > 1 for weight in group["params"])
    n_vectors = len(group["params"]) - n_matrices
    return Group(group["lr"], momentum, group["weight_decay"], n_matrices, n_vectors)


def flat(values: list[torch.Tensor]) -> torch.Tensor:
    """The values of all tensors as one FP64 vector."""
    return torch.cat([value.detach().double().flatten() for value in values])


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Fills the recorder while the block runs."""
    loss_of, update, make = E2ELoss.__call__, ModelEMA.update, ModelEMA.__init__

    def call(self: E2ELoss, preds: Any, batch: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():  # else it is a validation
            recorder.add_batch(self, preds, batch)
        return loss_of(self, preds, batch)

    def update_and_add(self: ModelEMA, model: Any) -> None:
        update(self, model)
        recorder.add_update(self)

    def make_and_add(self: ModelEMA, model: Any, *args: Any, **kwargs: Any) -> None:
        make(self, model, *args, **kwargs)
        recorder.begin(self, model)

    handle = register_optimizer_step_pre_hook(recorder.add_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E2ELoss, "__call__", call)
        patch.setattr(ModelEMA, "update", update_and_add)
        patch.setattr(ModelEMA, "__init__", make_and_add)
        try:
            yield recorder
        finally:
            handle.remove()
