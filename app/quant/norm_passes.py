"""How BatchNorm's kernels (norm_kernels.py) are launched: a tensor as a matrix, how it is cut, and the four passes."""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton

from app.quant import norm_kernels
from app.quant.norm_kernels import VECTOR

BLOCK_C, BLOCK_M = 128, 16  # columns and rows that a program reads at a time
MAX_FOLD = 8
N_PROGRAMS = 1056  # of a pass, at most, about: eight for each multiprocessor of an H100
N_WARPS = 4
FINISH_C, FINISH_N = 8, 512  # channels of a program that adds up partial sums, and partial sums it reads at a time


@dataclass(frozen=True)
class Matrix:
    """A tensor as rows of channels: its storage begins at `tensor`, and two rows lie `stride` elements apart."""

    tensor: torch.Tensor
    stride: int


def as_matrix(tensor: torch.Tensor) -> Matrix:
    """[N,C,H,W] as a matrix without a copy where its channels lie side by side and its rows at one distance.

    Channel slices of a channels_last tensor are of this kind. Any other tensor is copied into channels_last.
    """
    stride = _row_stride(tensor)
    if stride is None:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
        stride = tensor.shape[1]
    return Matrix(tensor, stride)


def _row_stride(tensor: torch.Tensor) -> int | None:
    """Distance of two rows in elements; None where it is not the same everywhere."""
    n_channels = tensor.shape[1]
    if n_channels > 1 and tensor.stride(1) != 1:
        return None
    stride, n_inner = 0, 1
    for dim in (3, 2, 0):  # from the innermost
        size = tensor.shape[dim]
        if size > 1:
            if not stride:
                stride = tensor.stride(dim) // n_inner
            if tensor.stride(dim) != stride * n_inner:
                return None
        n_inner *= size
    return n_channels if n_inner == 1 else (stride if stride >= n_channels else None)


@dataclass(frozen=True)
class Plan:
    """How a matrix is cut. A network asks for it in every layer and forward, so all of it is computed once.

    Attributes:
        n_rows, n_channels: of the matrix.
        n_halves: 2 where the halves of the channels lie in two tensors, else 1.
        fold: rows side by side.
        block_c: columns of a program.
    """

    n_rows: int
    n_channels: int
    n_halves: int
    fold: int
    block_c: int

    @property
    def n_part(self) -> int:
        """Channels of a half."""
        return self.n_channels // self.n_halves

    @property
    def n_folded(self) -> int:
        return self.n_rows // self.fold

    @cached_property
    def n_blocks(self) -> int:
        """Blocks of columns in a half."""
        return _cdiv(self.n_part * self.fold, self.block_c)

    @property
    def block_m(self) -> int:
        return BLOCK_M * BLOCK_C // self.block_c

    @cached_property
    def loops(self) -> int:
        """Tiles of a program: a power of two, so that few kernels are compiled."""
        n_tiles = _cdiv(self.n_folded, self.block_m) * self.n_blocks * self.n_halves
        return triton.next_power_of_2(_cdiv(n_tiles, N_PROGRAMS))

    @cached_property
    def n_runs(self) -> int:
        """Programs for the same columns."""
        return _cdiv(self.n_folded, self.block_m * self.loops)

    @cached_property
    def grid(self) -> tuple[int, int]:
        return self.n_runs, self.n_blocks * self.n_halves

    @cached_property
    def finish_grid(self) -> tuple[int]:
        return (_cdiv(self.n_channels, FINISH_C),)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.n_folded, self.n_channels, self.n_part, self.fold, self.n_blocks

    def constants(self, *strides: int) -> dict[str, Any]:
        """Compile-time arguments: the tile, and whether groups of VECTOR columns lie together in every matrix."""
        together = all(size % VECTOR == 0 for size in (self.n_part, *strides))
        return {
            "LOOPS": self.loops, "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "TOGETHER": together,
            "num_warps": N_WARPS,
        }  # fmt: skip


def plan(tensor: torch.Tensor, n_channels: int, n_halves: int) -> Plan:
    """The plan for the first n_channels of [N,C,H,W]."""
    return _plan(tensor.numel() // tensor.shape[1], n_channels, n_halves)


@lru_cache(maxsize=4096)  # layers times sizes of images
def _plan(n_rows: int, n_channels: int, n_halves: int) -> Plan:
    n_part = n_channels // n_halves
    fold = 1
    while fold < MAX_FOLD and n_part * fold % BLOCK_C and n_rows % (2 * fold) == 0:
        fold *= 2
    return Plan(n_rows, n_channels, n_halves, fold, min(BLOCK_C, triton.next_power_of_2(n_part * fold)))


@dataclass(frozen=True)
class Norm:
    """Parameters and running statistics [C] of a BatchNorm, in float32; n_batches: int64, counts its forwards."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    n_batches: torch.Tensor
    eps: float
    momentum: float


@dataclass(frozen=True)
class Output:
    """What follows the normalization.

    Attributes:
        act: SiLU, or nothing.
        parts: the tensor that holds the result, or its gradient, or two of them for the halves of the channels.
        copy: a second tensor for the same result as the last part, or its gradient; both gradients are added.
        shortcut: is added to the result; of gradients: where the gradient of the shortcut is written, dense.
    """

    act: bool
    parts: list[Matrix]
    copy: Matrix | None
    shortcut: Matrix | None = None

    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, last = self.parts[0].tensor, self.parts[-1].tensor
        return first, last, self.copy.tensor if self.copy else last

    def strides(self) -> tuple[int, int, int]:
        first, last = self.parts[0].stride, self.parts[-1].stride
        return first, last, self.copy.stride if self.copy else last

    def flags(self) -> dict[str, Any]:
        return {"ACT": self.act, "COPIES": self.copy is not None}


def statistics(x: Matrix, cut: Plan, norm: Norm) -> torch.Tensor:
    """Mean and 1 / sqrt(var + eps) of every channel, float32 [2,C]; updates the running statistics as PyTorch does."""
    device = x.tensor.device
    n_partial = cut.n_runs * cut.fold
    partial = torch.empty(2, n_partial, cut.n_channels, dtype=torch.float32, device=device)
    stats = torch.empty(2, cut.n_channels, dtype=torch.float32, device=device)
    norm_kernels.moments_kernel[cut.grid](x.tensor, partial, *cut.sizes, x.stride, n_partial, **cut.constants(x.stride))
    rows_per_run = cut.block_m * cut.loops
    running: Any = (norm.running_mean, norm.running_var, norm.n_batches)
    numbers: Any = (cut.n_folded, cut.fold, cut.n_channels, n_partial, rows_per_run, norm.eps, norm.momentum)
    norm_kernels.finish_moments_kernel[cut.finish_grid](partial, stats, *running, *numbers, **_finish_constants())
    return stats


def apply(x: Matrix, cut: Plan, stats: torch.Tensor | None, norm: Norm, out: Output) -> None:
    """Writes act(z) + shortcut into out.parts and out.copy; without `stats` z is of the running statistics."""
    shortcut = out.shortcut or x
    strides = (x.stride, shortcut.stride, *out.strides())
    mean = norm.running_mean if stats is None else stats
    pointers = (x.tensor, mean, norm.running_var, norm.weight, norm.bias, shortcut.tensor, *out.pointers())
    constants = {"RUNNING": stats is None, "ADDS": out.shortcut is not None, **out.flags(), **cut.constants(*strides)}
    norm_kernels.apply_kernel[cut.grid](*pointers, *cut.sizes, *strides, norm.eps, **constants)


def gradients(
    x: Matrix, cut: Plan, stats: torch.Tensor, params: tuple[torch.Tensor, torch.Tensor], grad: Output
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; `params` are weight and bias, `grad` holds the gradient of the output.

    Channels of x beyond those of the plan are padding and get the gradient 0.
    Where grad.shortcut is given, the gradient of the output is written there: the sum of grad.parts and grad.copy.
    """
    n_channels, n_partial, device = cut.n_channels, cut.n_runs * cut.fold, x.tensor.device
    partial = torch.empty(2, n_partial, n_channels, dtype=torch.float32, device=device)
    sums = torch.empty(2, n_channels, dtype=torch.float32, device=device)
    strides = (x.stride, *grad.strides())
    constants = {**grad.flags(), **cut.constants(*strides)}
    pointers = (x.tensor, stats, *params, *grad.pointers())
    make = torch.empty_like if x.tensor.shape[1] == n_channels else torch.zeros_like
    x_grad = make(x.tensor, memory_format=torch.channels_last)
    norm_kernels.sums_kernel[cut.grid](*pointers, partial, *cut.sizes, *strides, n_partial, **constants)
    numbers: Any = (n_channels, n_partial)
    norm_kernels.finish_sums_kernel[cut.finish_grid](partial, stats, sums, *numbers, **_finish_constants())
    shared = grad.shortcut.tensor if grad.shortcut else x_grad
    constants["SHARES"] = grad.shortcut is not None
    numbers = (cut.n_rows, *cut.sizes, *strides, x_grad.shape[1])
    norm_kernels.apply_gradient_kernel[cut.grid](*pointers, sums, x_grad, shared, *numbers, **constants)
    return x_grad, sums[1], sums[0]


def _cdiv(a: int, b: int) -> int:
    """Rounded up; Triton's own function takes ten times as long."""
    return -(-a // b)


def _finish_constants() -> dict[str, Any]:
    return {"BLOCK_N": FINISH_N, "BLOCK_C": FINISH_C, "num_warps": 8}
