"""A loss, gradient or weight that is not finite: noticed without a wait for the GPU, explained, kept for study."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from app.quant.model import cpu_state_dict
from app.train.processes import ALONE, Ranks
from app.train.state import State
from app.train.step import criterion_after

GPU_LAG = 2  # values that may still be on their way from the GPU: reading the oldest one then waits for nothing
# The scale begins at 65,536 and is halved when a gradient is infinite; below 1 it is no longer the scale's fault.
SMALLEST_SCALE = 1.0
NO_CAUSE = "no layer: it does not happen again with the same batch"
N_NAMES = 4  # images of a batch that a message names

Batch = tuple[int, dict[str, Any]]  # number of the batch since the training's start, and what the loader gave
LossOf = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, Any]]  # network, batch -> loss, its terms by name


class NonFinite(Exception):
    """`what` (loss, gradient, weights) was not finite with `batches`, those of one optimizer step at most."""

    def __init__(self, what: str, batches: list[Batch]) -> None:
        super().__init__(f"the {what} is not finite")
        self.what, self.batches = what, batches


@dataclass(frozen=True)
class _Pending:
    """A value that may still be on its way from the GPU; `event` has passed when it has arrived."""

    what: str
    value: torch.Tensor
    event: Any
    batches: list[Batch]


class Watch:
    """Looks at every loss and gradient norm; on a GPU GPU_LAG values late, so that no step waits for its own values.

    Args:
        device: where the values come from.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Forgets everything; called after a rollback."""
        self.pending: deque[_Pending] = deque()
        self.of_step: list[Batch] = []
        self.newest: list[Batch] = []

    def next(self, number: int, batch: dict[str, Any]) -> None:
        """Names the batch whose loss and gradient come next. A copy of the batch is kept as it is now, on the CPU."""
        self.of_step.append((number, dict(batch)))

    def add_loss(self, loss: torch.Tensor) -> None:
        """`loss`: one number, of the batch that was named last."""
        self._add("loss", loss, self.of_step[-1:])

    def add_step(self, norm: torch.Tensor | None) -> None:
        """Called before an optimizer step. `norm` is that of its gradient, or None where a GradScaler looks at it."""
        batches = self.newest = self.of_step
        self.of_step = []
        if norm is not None:
            self._add("gradient", norm, batches)

    def _add(self, what: str, value: torch.Tensor, batches: list[Batch]) -> None:
        host, event = value.detach().to("cpu", non_blocking=True), None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.pending.append(_Pending(what, host, event, batches))
        self.check(GPU_LAG if self.on_gpu else 0)

    def check(self, n_unread: int = 0) -> None:
        """Reads all values but the newest n_unread.

        Raises:
            NonFinite: with the oldest value that is not finite.
        """
        while len(self.pending) > n_unread:
            oldest = self.pending.popleft()
            if oldest.event is not None:
                oldest.event.synchronize()
            if not oldest.value.isfinite():
                raise NonFinite(oldest.what, oldest.batches)


def check_finite(net: nn.Module, scaler: GradScaler, watch: Watch) -> None:
    """Weights or running statistics that are not finite, or a GradScaler that no scale is small enough for, must not
    replace a good state.

    Raises:
        NonFinite: with the batches of the newest step, or of the loss or gradient that was not finite.
    """
    watch.check()
    floats = [value for value in chain(net.parameters(), net.buffers()) if value.is_floating_point()]
    are_finite = torch.stack([value.isfinite().all() for value in floats])
    if not are_finite.all():
        raise NonFinite("weights", watch.newest)
    if scaler.get_scale() < SMALLEST_SCALE:
        raise NonFinite("gradient", watch.newest)


def find_cause(state: State, fault: NonFinite, loss_of: LossOf, n_batches: int) -> tuple[str, str]:
    """Where in the data and where in the network a fault began, as the first rank that can reproduce it says.

    The network's criterion is that of a single rank afterwards.
    """
    state.net.criterion = criterion_after(state.net.criterion.updates, state.net, ALONE)
    own = (describe(fault.batches, n_batches), first_cause(state, fault.batches, loss_of))
    for where, cause in state.ranks.gather(own):
        if cause != NO_CAUSE:
            return where, cause
    return own


def first_cause(state: State, batches: list[Batch], loss_of: LossOf) -> str:
    """The first weight, layer output or gradient that is not finite, in the order of the network; NO_CAUSE if none is.

    Runs the batches forward and backward again and writes no .grad. The other ranks do not take part.
    """
    for name, weight in state.net.named_parameters():
        if not weight.isfinite().all():
            return f"weight {name}"
    for _, batch in batches:
        if cause := _cause_in(state, dict(batch), loss_of):
            return cause
    return NO_CAUSE


def _cause_in(state: State, batch: dict[str, Any], loss_of: LossOf) -> str:
    """The same for one batch, or ''. Gradients flow backward, so the last layer with a bad gradient comes first."""
    if not batch["img"].isfinite().all():
        return "the images"
    bad_outputs: list[str] = []

    def look(name: str, out: Any) -> None:
        if torch.is_tensor(out) and not out.isfinite().all():
            bad_outputs.append(name)

    handles = []
    for name, layer in state.net.named_modules():
        handles.append(layer.register_forward_hook(lambda _, __, out, name=name: look(name, out)))
    trained = [(name, weight) for name, weight in state.net.named_parameters() if weight.requires_grad]
    try:
        loss, _ = loss_of(state.net, batch)
        weights = [weight for _, weight in trained]
        grads = torch.autograd.grad(state.scaler.scale(loss), weights, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if bad_outputs:
        return f"output of {bad_outputs[0]}"
    if not loss.isfinite():
        return "the loss itself, all layers are finite"
    for (name, _), grad in reversed(list(zip(trained, grads, strict=True))):
        if grad is not None and not grad.isfinite().all():
            return f"gradient of {name}"
    return ""


def to_keep(state: State, fault: NonFinite, cause: str) -> dict[str, Any]:
    """Entries of the file of a fault: its batches as tensors and plain values, and the weights that they met."""
    kept = []
    for number, batch in fault.batches:
        tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
        kept.append({"number": number, "im_file": [str(path) for path in batch["im_file"]], **tensors})
    return {"what": fault.what, "cause": cause, "batches": kept, "model": cpu_state_dict(state.net)}


def file_name(fault: NonFinite, ranks: Ranks) -> str:
    """batch-12.pt; of another rank than 0 batch-12-of-process-2.pt."""
    part = "" if ranks.is_main else f"-of-process-{ranks.rank + 1}"
    return f"batch-{fault.batches[0][0]}{part}.pt"


def describe(batches: list[Batch], n_batches: int) -> str:
    """'epoch 2, batch 3 of 5 (a.jpg, b.jpg and 6 more)', without mosaic partners; `n_batches` is that of an epoch."""
    epoch, first = divmod(batches[0][0], n_batches)
    names = [Path(path).name for _, batch in batches for path in batch["im_file"]]
    more = f" and {len(names) - N_NAMES} more" if len(names) > N_NAMES else ""
    last = f" to {first + len(batches)}" if len(batches) > 1 else ""
    return f"epoch {epoch + 1}, batch {first + 1}{last} of {n_batches} ({', '.join(names[:N_NAMES])}{more})"
