"""Re-estimation of BatchNorm as a CUDA graph: the host launches its forwards more slowly than a GPU computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from app.core.config import UserError
from app.quant.batchnorm import from_zero, normalised_by_batch

_many = cast(Any, torch)  # its stubs do not list the operations on many tensors


class Replay:
    """Work on tensors on a GPU: the first call is made, the second captured as a CUDA graph, the next are replays.

    From the first tensor of another shape on, all calls are made: the work may have replaced what the graph reads.

    Args:
        work: reads and writes the same memory at every call with one shape, but for its argument.

    Raises:
        UserError: the work cannot be captured. PyTorch's allocator does not recover from that (torch/cuda/graphs.py,
            2.10), so the work is not called instead.
    """

    def __init__(self, work: Callable[[torch.Tensor], None]) -> None:
        self.work = work
        self.given: torch.Tensor | None = None  # where the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_over = False

    def __call__(self, given: torch.Tensor) -> None:
        if self.given is None:  # this call compiles kernels, and makes what is made once
            self.given = given
            self.work(given)
            return
        if given.shape != self.given.shape or given.stride() != self.given.stride():
            self.release()
        if self.is_over:
            self.work(given)
            return
        self.given.copy_(given)
        if self.graph is None:
            self.graph = self._capture(self.given)
        self.graph.replay()

    def _capture(self, given: torch.Tensor) -> torch.cuda.CUDAGraph:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread pins memory meanwhile
                self.work(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"BatchNorm's re-estimation cannot be captured as a CUDA graph ({reason}): "
                "go on without graphs, ARGS='--set train.graph=false'"
            ) from error
        return graph

    def release(self) -> None:
        """Gives the memory of the graph back. No call is a replay any more."""
        self.is_over = True
        if self.graph:
            self.graph = None
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


@torch.no_grad()
def reestimate_by_replay(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """`reestimate_batchnorm` of a network on a GPU that calls each BatchNorm once, with one CUDA graph for all batches.

    A graph repeats its numbers, so no momentum changes from batch to batch: it is 1, each forward leaves the statistics
    of its batch, and their sum over all batches is divided at the end.

    Args:
        batches: as for reestimate_batchnorm; the first one is written over.

    Raises:
        UserError: the forward cannot be captured.
    """
    n_batches = 0
    with normalised_by_batch(model) as norms:
        running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
        sums = [torch.zeros_like(tensor) for tensor in running]
        for norm in norms:
            norm.momentum = 1.0

        def add(images: torch.Tensor) -> None:
            model(images)
            _many._foreach_add_(sums, running)

        replay = Replay(add)
        for images in from_zero(norms, batches):
            n_batches += 1
            replay(images)
        if n_batches:
            _many._foreach_div_(sums, n_batches)
            _many._foreach_copy_(running, sums)
        replay.release()
    return n_batches
