"""Forward, loss and backward of a training batch as one CUDA graph.

Launching the 2,700 kernels of an eager step takes longer than the GPU needs for a small batch. The graph is captured at
the first batch of full size, and again when the weights are quantized in another way. What changes between batches lies
in tensors that are filled before a replay: images, labels, loss scale, and the weights of the two heads.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from brevitas.nn import QuantConv2d
from torch import nn
from torch.func import functional_call

from app.core.config import Train
from app.train.assign_kernels import COLUMNS
from app.train.colours import Palette, recolour
from app.train.distill import Teacher
from app.train.loader import COLOURS
from app.train.loss import HeadLoss, capacity, label_rows, pad_rows
from app.train.state import State
from app.train.step import criterion_of_part, unwritten_inputs, watched_terms

N_WARM_UPS = 2  # passes before the capture: they compile kernels and make what is made once
_many = cast(Any, torch)  # its stubs do not list the operations on many tensors
log = logging.getLogger(__name__)


class Gradients:
    """One flat float32 buffer of the gradients of some weights, and a view of it for each weight, strided like it."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.flat = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
        self.views: list[torch.Tensor] = []
        start = 0
        for weight in weights:
            self.views.append(self.flat.as_strided(weight.shape, weight.stride(), start))
            start += weight.numel()

    def bind(self) -> None:
        """Makes the views the weights' .grad. They keep what another backward pass has left there, or become zero."""
        is_fresh = all(weight.grad is None for weight in self.weights)
        if is_fresh:
            self.flat.zero_()
        for weight, view in zip(self.weights, self.views, strict=True):
            if weight.grad is None and not is_fresh:
                view.zero_()
            elif weight.grad is not None and weight.grad is not view:
                view.copy_(weight.grad)
            weight.grad = view


class Passes:
    """Forward, loss and backward of a network for images and labels in tensors of fixed place: what a graph holds.

    Args:
        state: of the training.
        shape: of a batch of images, [N,3,S,S].
        teacher: whose distillation is added to the loss; None without any.
    """

    def __init__(self, state: State, shape: torch.Size, teacher: Teacher | None = None) -> None:
        self.net, self.amp, self.teacher = state.net, state.scaler.is_enabled(), teacher
        self.loss = HeadLoss(criterion_of_part(self.net, state.ranks), state.ranks)
        trained = {name: weight for name, weight in self.net.named_parameters() if weight.requires_grad}
        device = next(iter(trained.values())).device
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.rows = torch.zeros(capacity(shape[0]), COLUMNS, device=device)
        self.head_weights = torch.zeros(2, device=device)
        self.scale = torch.ones(1, device=device)
        self.inputs = unwritten_inputs(shape, device, self.amp)
        halved = _plain_weights(self.net) if self.amp else []
        self.half = {name: torch.empty_like(trained[name], dtype=self.inputs.dtype).requires_grad_() for name in halved}
        self.masters = [trained[name] for name in self.half]
        self.others = [weight for name, weight in trained.items() if name not in self.half]
        self.weights = [*self.masters, *self.others]

    def run(self) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Loss terms of the one2one head [3], and the gradients of `weights`, times the loss scale.

        All plain convolutions' weights are cast to float16 together, and their gradients back; autocast would cast one
        after the other. The values are the same.
        """
        torch.div(self.images, 255.0, out=self.inputs)
        if self.half:
            halves = [half.detach() for half in self.half.values()]
            _many._foreach_copy_(halves, [master.detach() for master in self.masters])
        with torch.autocast("cuda", torch.float16, enabled=self.amp, cache_enabled=False):
            preds = functional_call(self.net, self.half, (self.inputs,)) if self.half else self.net(self.inputs)
            loss, items = self.loss(preds, self.rows, self.head_weights)
            if self.teacher:
                loss = loss + self.teacher.loss(self.inputs, preds, self.head_weights)
            terms = watched_terms(loss, items)
        sources = [*self.half.values(), *self.others]
        grads = torch.autograd.grad(loss * self.scale, sources, allow_unused=True)
        return terms, [*_as_float(list(grads[: len(self.half)])), *grads[len(self.half) :]]


def _plain_weights(net: nn.Module) -> list[str]:
    """Names of the trained parameters of convolutions that are not quantized."""
    names = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, QuantConv2d):
            parts = layer.named_parameters(prefix=name, recurse=False)
            names += [part for part, weight in parts if weight.requires_grad]
    return names


def _as_float(grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients in float32, converted together."""
    given = [grad for grad in grads if grad is not None]
    if not given:
        return grads
    floats = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
    _many._foreach_copy_(floats, given)
    converted = iter(floats)
    return [None if grad is None else next(converted) for grad in grads]


class StepGraph:
    """The graph of a training: captured when it is first needed, replayed for every batch of full size.

    It holds the quantization that was in force when it was captured: call `release` where bits change.

    Args:
        state: of the training.
        n_images: of this rank's part of a full batch.
        train: section of the configuration; a graph takes train.graph, train.kernels and a GPU.
        palette: for batches whose images get their colours here.
        teacher: as for Passes.
    """

    def __init__(
        self,
        state: State,
        n_images: int,
        train: Train,
        palette: Palette | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.state, self.n_images, self.palette, self.teacher = state, n_images, palette, teacher
        self.device = next(state.net.parameters()).device
        self.enabled = train.graph and train.kernels and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Adds the gradients of a batch, times the loss scale, to .grad, as loss.backward() does.

        Args:
            batch: as the loader gives it, images uint8.

        Returns:
            the loss terms of the one2one head, float32 [3]; or None, with nothing done, where there is no graph for
            this batch. All ranks get the same answer.
        """
        if not self.enabled:
            return None
        if self.state.ranks.maximum([int(not self._fits(batch))])[0]:
            return None
        if self.graph is None and not self._capture(batch):
            return None
        self._fill(batch)
        self.gradients.bind()
        for weight in self.untouched:
            weight.grad = None
        cast(torch.cuda.CUDAGraph, self.graph).replay()
        return self.terms.clone()

    def _fits(self, batch: dict[str, Any]) -> bool:
        n_images = len(batch["img"])
        return n_images == self.n_images and len(batch["batch_idx"]) <= capacity(n_images)

    def _fill(self, batch: dict[str, Any]) -> None:
        """Copies a batch, the loss scale and the heads' weights to where the graph reads them.

        The images cross on a stream of their own, so that they are on their way while the GPU still computes.
        """
        passes, criterion, current = self.passes, self.state.net.criterion, torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            names = [name for name in ("img", COLOURS) if name in batch]
            images, *colours = (batch[name].to(self.device, non_blocking=True) for name in names)
        current.wait_stream(self.copies)
        if colours:
            recolour(images, colours[0], cast(Palette, self.palette), passes.images)
        else:
            passes.images.copy_(images)
        for part in (images, *colours):
            part.record_stream(current)
        # From memory that is not pinned a copy may wait for the GPU.
        pad_rows(label_rows(batch).pin_memory(), passes.rows, self.n_images)
        passes.head_weights[0].fill_(criterion.o2m)
        passes.head_weights[1].fill_(criterion.o2o)
        passes.scale.copy_(self.state.scaler.scale(self.one))

    def _capture(self, batch: dict[str, Any]) -> bool:
        """Captures the graph; False, and one line that says why, where that fails: then training goes on without.

        Of several ranks each must fail, or fail after the warm-up: those in the warm-up's all_reduce wait for one that
        has left it until the process group's time is up (PeerLost).
        """
        log.info("train.graph: compiling kernels and capturing the step as a CUDA graph")
        self.copies = torch.cuda.Stream(self.device)
        self.one = torch.ones(1, device=self.device)
        failed = ""
        buffers = list(self.state.net.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            self.passes = Passes(self.state, batch["img"].shape, self.teacher)
            self._fill(batch)
            self._warm_up()
            self._record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failed = str(error).strip().splitlines()[0]
        for buffer, value in zip(buffers, kept, strict=True):  # BatchNorm's, which the warm-up has moved
            buffer.copy_(value)
        if self.state.ranks.maximum([int(bool(failed))])[0]:
            self.release()
            self.enabled = False
            log.warning("train.graph: no CUDA graph, training goes on without (%s)", failed or "another process failed")
        return self.enabled

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(N_WARM_UPS):
                _, grads = self.passes.run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        weights = self.passes.weights
        with_grad = [weight for weight, grad in zip(weights, grads, strict=True) if grad is not None]
        self.untouched = [weight for weight, grad in zip(weights, grads, strict=True) if grad is None]
        self.gradients = Gradients(with_grad)
        del grads
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph keeps memory of its own

    def _record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.terms, grads = self.passes.run()
            _many._foreach_add_(self.gradients.views, [grad for grad in grads if grad is not None])

    def release(self) -> None:
        """Gives the memory of the graph back; the next batch captures it anew, with the bits that are in force then.

        .grad may still hold gradients of earlier batches of a step.
        """
        self.graph = None
        for name in ("passes", "terms"):
            vars(self).pop(name, None)
        torch.cuda.empty_cache()
