"""Re-estimation of BatchNorm as a CUDA graph: the host launches its forwards more slowly than a GPU computes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from app.quant.batchnorm import normalised_by_batch, zero_statistics

_many = cast(Any, torch)  # its stubs do not list the operations on many tensors
log = logging.getLogger(__name__)


class Replay:
    """Work on tensors of one shape on a GPU. The second call with that shape is captured, the next ones are replays.

    Tensors of another shape go to `work` itself, and so do all where it cannot be captured; then one line says why.

    Args:
        work: reads and writes the same memory at every call, but for its argument.
    """

    def __init__(self, work: Callable[[torch.Tensor], None]) -> None:
        self.work = work
        self.graph: torch.cuda.CUDAGraph | None = None
        self.first: torch.Tensor | None = None
        self.enabled = True

    def __call__(self, given: torch.Tensor) -> None:
        if self.first is None:  # this call compiles kernels, and makes what is made once
            self.first = given
            self.work(given)
            return
        fits = given.shape == self.first.shape and given.stride() == self.first.stride()
        if fits and self.graph is None and self.enabled:
            self._capture(self.first)
        if fits and self.graph:
            self.first.copy_(given)
            self.graph.replay()
        else:
            self.work(given)

    def _capture(self, given: torch.Tensor) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            is_current = torch.cuda.stream(torch.cuda.current_stream())  # again where a capture fails
            with is_current, torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread pins memory
                self.work(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            reason = str(error).strip().splitlines()[0]
            log.warning("train.graph: no CUDA graph, BatchNorm is re-estimated without (%s)", reason)
        else:
            self.graph = graph


@torch.no_grad()
def reestimate_by_replay(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """`reestimate_batchnorm` on a GPU, with one CUDA graph for all batches of full size.

    A graph repeats its numbers, so no momentum changes from batch to batch: it is 1, each forward begins with
    statistics of 0 and leaves those of its batch, and their sum over all batches is divided at the end.

    Args:
        batches: as for reestimate_batchnorm; the first one is written over.
    """
    n_batches = 0
    with normalised_by_batch(model) as norms:
        for norm in norms:
            norm.momentum = 1.0
        running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
        sums = [torch.zeros_like(tensor) for tensor in running]

        def add(images: torch.Tensor) -> None:
            _many._foreach_zero_(running)
            model(images)
            _many._foreach_add_(sums, running)

        replay = Replay(add)
        for images in batches:
            if n_batches == 0:
                zero_statistics(norms)
            n_batches += 1
            replay(images)
        if n_batches:
            _many._foreach_div_(sums, n_batches)
            _many._foreach_copy_(running, sums)
    return n_batches
