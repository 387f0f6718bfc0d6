"""A loss or a gradient that is not finite: seen without waiting for the GPU, explained, kept for study."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import autocast

GPU_LAG = 2  # values on their way from the GPU while the next steps are launched: reading the oldest waits for nothing
NO_CAUSE = "no layer: it does not happen again with the same batch"
N_NAMES = 4  # images of a batch that a message names

Batch = tuple[int, dict[str, Any]]  # number of the batch since the training's start, and what the loader gave


class NonFinite(Exception):
    """`what` (loss, gradient, weights) was not finite with `batches`, those of one optimizer step at most."""

    def __init__(self, what: str, batches: list[Batch]) -> None:
        super().__init__(f"the {what} is not finite")
        self.what, self.batches = what, batches


class Watch:
    """Looks at every loss and gradient norm, on a GPU two values late, so that no step waits for its own.

    Args:
        device: where the values come from.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Forgets everything, as after a step back."""
        self.pending: deque[tuple[str, torch.Tensor, Any, list[Batch]]] = deque()
        self.of_step: list[Batch] = []
        self.newest: list[Batch] = []

    def next(self, number: int, batch: dict[str, Any]) -> None:
        """The batch whose loss and gradient come next; kept as it is now, on the CPU."""
        self.of_step.append((number, dict(batch)))

    def add_loss(self, loss: torch.Tensor) -> None:
        """`loss`: one number, of the batch that was named last."""
        self._add("loss", loss, self.of_step[-1:])

    def add_step(self, norm: torch.Tensor | None) -> None:
        """An optimizer step follows; `norm` is that of its gradient, None where a GradScaler looks at it."""
        batches = self.newest = self.of_step
        self.of_step = []
        if norm is not None:
            self._add("gradient", norm, batches)

    def _add(self, what: str, value: torch.Tensor, batches: list[Batch]) -> None:
        host, event = value.detach().to("cpu", non_blocking=True), None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.pending.append((what, host, event, batches))
        self.check(GPU_LAG if self.on_gpu else 0)

    def check(self, n_unread: int = 0) -> None:
        """Reads all values but the newest n_unread.

        Raises:
            NonFinite: with the oldest value that is not finite.
        """
        while len(self.pending) > n_unread:
            what, host, event, batches = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if not host.isfinite():
                raise NonFinite(what, batches)


def first_cause(trainer: Any, batches: list[Batch]) -> str:
    """Where it begins: the first weight, layer output or gradient that is not finite, in the order of the network."""
    for name, weight in trainer.net.named_parameters():
        if not weight.isfinite().all():
            return f"weight {name}"
    causes = (_cause_in(trainer, dict(batch)) for _, batch in batches)
    return next((cause for cause in causes if cause), NO_CAUSE)


def _cause_in(trainer: Any, batch: dict[str, Any]) -> str:
    """Runs one batch forward and backward; gradients go the other way, so the last layer with a bad one comes first.

    The wrapped network is left out and no .grad is written: other processes of the training do not take part.
    """
    batch, bad = trainer.preprocess_batch(batch), []
    if not batch["img"].isfinite().all():
        return "the images"

    def look(name: str, out: Any) -> None:
        if torch.is_tensor(out) and not out.isfinite().all():
            bad.append(name)

    layers = trainer.net.named_modules()
    handles = [layer.register_forward_hook(lambda _, __, out, name=name: look(name, out)) for name, layer in layers]
    try:
        with autocast(trainer.amp, device=trainer.device.type):
            loss = trainer.net(batch)[0].sum()
        named = [(name, weight) for name, weight in trainer.net.named_parameters() if weight.requires_grad]
        grads = torch.autograd.grad(trainer.scaler.scale(loss), [weight for _, weight in named], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"output of {bad[0]}"
    if not loss.isfinite():
        return "the loss itself, all layers are finite"
    pairs = zip(named, grads, strict=True)
    wrong = [name for (name, _), grad in pairs if grad is not None and not grad.isfinite().all()]
    return f"gradient of {wrong[-1]}" if wrong else ""


def to_keep(batches: list[Batch]) -> list[dict[str, Any]]:
    """The batches as tensors and plain values."""
    return [
        {
            "number": number,
            "im_file": [str(path) for path in batch["im_file"]],
            **{key: value for key, value in batch.items() if torch.is_tensor(value)},
        }
        for number, batch in batches
    ]


def describe(batches: list[Batch], n_batches: int) -> str:
    """'epoch 2, batch 3 of 5 (a.jpg, b.jpg and 6 more)'; n_batches: of an epoch. Mosaic partners are not named."""
    epoch, first = divmod(batches[0][0], n_batches)
    names = [Path(path).name for _, batch in batches for path in batch["im_file"]]
    more = f" and {len(names) - N_NAMES} more" if len(names) > N_NAMES else ""
    last = f" to {first + len(batches)}" if len(batches) > 1 else ""
    return f"epoch {epoch + 1}, batch {first + 1}{last} of {n_batches} ({', '.join(names[:N_NAMES])}{more})"
