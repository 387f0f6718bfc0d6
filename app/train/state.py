"""The state of a training: what its next step depends on, as one value. last.pt holds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch.amp.grad_scaler import GradScaler
from ultralytics.utils.torch_utils import ModelEMA

from app.core.results import Rows
from app.quant.model import cpu_state_dict
from app.quant.options import Stabiliser
from app.train.processes import Ranks
from app.train.step import criterion_after, load_optimizer

ADDED = ("trained_s",)  # fields that checkpoints of an earlier version lack


@dataclass(kw_only=True)
class Progress:
    """What a training has counted and written. last.pt holds every field under its own name.

    Attributes:
        epoch: counts from 0: the epoch in work or, where batch_in_epoch is 0, the last one that has ended; at first -1.
        batch_in_epoch: how many batches of that epoch have been trained.
        last_step: number of the batch that ended the last optimizer step; batches count from the training's start.
        accumulate: batches of an optimizer step.
        trained_s: seconds that the batches of that epoch took, in all processes; an earlier version has kept none.
        loss_sum: sums of the epoch's loss terms [n_terms], named by loss_names; 0.0 before the first batch.
        best_fitness, best_epoch: AP in best.pt and its epoch from 1; None and 0 where there is no best.pt.
        rows: of results.csv.
        scored: weights of the last validated state.
        codes_before: codes of the raw weights at the last validation, int8 [n].
        faults: {"what", "cause", "batches"} of every loss, gradient or weight that was not finite.
    """

    epoch: int = -1
    batch_in_epoch: int = 0
    trained_s: float = 0.0
    last_step: int = -1
    accumulate: int = 1
    loss_sum: torch.Tensor | float = 0.0
    loss_names: list[str] = field(default_factory=list)
    best_fitness: float | None = None
    best_epoch: int = 0
    rows: Rows = field(default_factory=list)
    scored: dict[str, torch.Tensor] = field(default_factory=dict)
    codes_before: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int8))
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def next_epoch(self) -> int:
        """The epoch that training goes on with: the one in work, or the one after the last."""
        return self.epoch if self.batch_in_epoch else self.epoch + 1

    @property
    def left_out(self) -> set[int]:
        """Numbers of the batches that are not trained, because a loss or gradient was not finite with them."""
        return {number for fault in self.faults for number in fault["batches"]}

    def mean_losses(self, n_batches: int) -> dict[str, float]:
        """Means of the loss terms over the epoch so far, by column of results.csv; waits for the GPU.

        They are NaN where no batch has been trained, because all are left out.

        Args:
            n_batches: of an epoch.
        """
        first = self.epoch * n_batches
        so_far = range(first, first + self.batch_in_epoch)
        n_trained = self.batch_in_epoch - sum(number in so_far for number in self.left_out)
        if n_trained == 0:
            return {f"train/{name}": math.nan for name in self.loss_names}
        means = cast(torch.Tensor, self.loss_sum / n_trained).tolist()
        return {f"train/{name}": round(mean, 5) for name, mean in zip(self.loss_names, means, strict=True)}


@dataclass(kw_only=True)
class State(Progress):
    """Progress, and the objects that a training step changes; the network carries its criterion."""

    net: Any
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    stabilisers: list[Stabiliser]
    ranks: Ranks

    def add_losses(self, terms: torch.Tensor) -> torch.Tensor:
        """Adds the loss terms [n_terms] of a batch, each rank those of its part, and gives their sum over all ranks."""
        terms = self.ranks.all_reduce(terms)
        self.loss_sum = self.loss_sum + terms
        return terms.sum()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; those of the model and of its EMA are FP32 copies on the CPU.

        What the scored weights have in common with the EMA, after a validation all but BatchNorm's statistics, is the
        same tensor: a file holds it once.
        """
        progress = {name: vars(self)[name] for name in _progress_names()}
        ema = cpu_state_dict(self.ema.ema)
        scored = {}
        for name, weights in self.scored.items():
            scored[name] = ema[name] if name in ema and torch.equal(ema[name], weights) else weights
        return {
            **progress,
            "names": list(self.net.names.values()),
            "scored": scored,
            "model": cpu_state_dict(self.net),
            "ema": ema,
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "criterion_updates": self.net.criterion.updates,
            "stabilisers": [stabiliser.state_dict() for stabiliser in self.stabilisers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, also that of a training on another device."""
        for name in _progress_names():
            setattr(self, name, state.get(name, 0.0) if name in ADDED else state[name])
        if isinstance(self.loss_sum, torch.Tensor):
            self.loss_sum = self.loss_sum.to(next(self.net.parameters()).device)
        self.net.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # it is empty where the scaler was off, as on a CPU: one that is on begins anew
            self.scaler.load_state_dict(state["scaler"])
        self.net.criterion = criterion_after(state["criterion_updates"], self.net, self.ranks)
        for stabiliser, its_state in zip(self.stabilisers, state["stabilisers"], strict=True):
            stabiliser.load_state_dict(its_state)


def _progress_names() -> Iterator[str]:
    return (part.name for part in fields(Progress))
