"""Triton kernels of BatchNorm in training mode, with SiLU and an added shortcut: two passes forward, two backward.

A tensor [N,C,H,W] in channels_last memory is a matrix of n_rows = N*H*W rows and C channels; `stride` is the distance
of two rows in elements, C or more. A program reduces a run of rows for BLOCK_C channels and writes its partial sums; a
second kernel adds the partial sums up in a fixed order. There are no atomics, so equal inputs give equal bits.

With y_hat = (x - mean) * inv, inv = 1 / sqrt(var + eps), and z = y_hat * weight + bias:
    forward     y  = act(z) + shortcut               act: SiLU, z * sigmoid(z), or none
    backward    dz = dy * act'(z),  bias_grad = sum(dz),  weight_grad = sum(dz * y_hat)
                dx = weight * inv * (dz - bias_grad / n_rows - y_hat * weight_grad / n_rows)
Everything is computed in float32 and rounded once. Variances are safe where |mean| >> std: each program sums x - x0, x0
being its first row, and the runs are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

N_PROGRAMS = 1056  # at most, about, in a reduction: eight for each multiprocessor of an H100
TILE = 2048  # elements that a program of a reduction reads at a time
APPLY_TILE = 4096  # elements of a program that writes
FINISH_C, FINISH_N = 16, 128  # channels of a program that adds up partial sums, and programs it reads at a time


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
    """How a matrix is cut: BLOCK_M rows times BLOCK_C channels at a time, `loops` times a program of a reduction."""

    n_rows: int
    n_channels: int
    n_halves: int
    block_c: int

    @property
    def block_m(self) -> int:
        return max(TILE // self.block_c, 1)

    @property
    def apply_block_m(self) -> int:
        return max(APPLY_TILE // self.block_c, 1)

    @property
    def n_blocks_c(self) -> int:
        return triton.cdiv(self.n_channels, self.block_c)

    @property
    def loops(self) -> int:
        """A power of two, so that few kernels are compiled."""
        n_tiles = triton.cdiv(self.n_rows, self.block_m) * self.n_blocks_c
        return triton.next_power_of_2(triton.cdiv(n_tiles, N_PROGRAMS))

    @property
    def n_runs(self) -> int:
        """Programs of a reduction for the same channels."""
        return triton.cdiv(self.n_rows, self.block_m * self.loops)

    @property
    def reduce_grid(self) -> tuple[int, int]:
        return self.n_runs, self.n_blocks_c

    @property
    def apply_grid(self) -> tuple[int, int]:
        return triton.cdiv(self.n_rows, self.apply_block_m), self.n_blocks_c

    @property
    def finish_grid(self) -> tuple[int]:
        return (triton.cdiv(self.n_channels, FINISH_C),)


def plan(tensor: torch.Tensor, n_halves: int) -> Plan:
    """The plan for [N,C,H,W]; with n_halves 2 the output is two tensors, so no block of channels crosses the middle."""
    n_channels = tensor.shape[1]
    n_rows = tensor.numel() // n_channels
    return Plan(n_rows, n_channels, n_halves, _block_c(n_channels // n_halves, n_halves > 1))


def _block_c(n_channels: int, divides: bool) -> int:
    """Channels of a block: the largest power of two up to 128 that divides them, unless that is small.

    48 channels in blocks of 16 read whole sectors of 32 bytes; a masked block of 64 would leave a quarter idle.
    """
    largest = min(n_channels & -n_channels, 128)
    if divides or largest >= 16:
        return largest
    return min(triton.next_power_of_2(n_channels), 128)


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


def statistics(x: Matrix, cut: Plan, norm: Norm) -> torch.Tensor:
    """Mean and 1 / sqrt(var + eps) of every channel, float32 [2,C]; updates the running statistics as PyTorch does."""
    device = x.tensor.device
    partial = torch.empty(2, cut.n_runs, cut.n_channels, dtype=torch.float32, device=device)
    stats = torch.empty(2, cut.n_channels, dtype=torch.float32, device=device)
    n_rows, n_channels = cut.n_rows, cut.n_channels
    _moments[cut.reduce_grid](
        x.tensor, partial, n_rows, n_channels, x.stride, cut.n_runs,
        LOOPS=_constant(cut.loops), BLOCK_M=_constant(cut.block_m), BLOCK_C=_constant(cut.block_c), num_warps=8,
    )  # fmt: skip
    _finish_moments[cut.finish_grid](
        partial, stats, norm.running_mean, norm.running_var, norm.n_batches, n_rows, n_channels, cut.n_runs,
        cut.block_m * cut.loops, norm.eps, norm.momentum,
        BLOCK_N=_constant(FINISH_N), BLOCK_C=_constant(FINISH_C), num_warps=4,
    )  # fmt: skip
    return stats


def apply(x: Matrix, cut: Plan, stats: torch.Tensor, norm: Norm, out: Output) -> None:
    """Writes act(z) + shortcut into out.parts."""
    shortcut = out.shortcut or x
    first, last = out.parts[0], out.parts[-1]
    _apply[cut.apply_grid](
        x.tensor, stats, norm.weight, norm.bias, shortcut.tensor, first.tensor, last.tensor, cut.n_rows,
        cut.n_channels, cut.n_channels // cut.n_halves, x.stride, shortcut.stride, first.stride, last.stride,
        ACT=_constant(out.act), ADDS=_constant(out.shortcut is not None), HALVES=_constant(cut.n_halves > 1),
        BLOCK_M=_constant(cut.apply_block_m), BLOCK_C=_constant(cut.block_c), num_warps=8,
    )  # fmt: skip


@dataclass(frozen=True)
class Output:
    """What follows the normalization: SiLU or nothing, an added tensor, and the tensors (one, or two halves of the
    channels) that hold the result, or its gradient."""

    act: bool
    shortcut: Matrix | None
    parts: list[Matrix]


def gradients(
    x: Matrix, cut: Plan, stats: torch.Tensor, params: tuple[torch.Tensor, torch.Tensor], grad: Output
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; `params` are weight and bias, grad.parts hold the gradient of the output."""
    n_rows, n_channels, device = cut.n_rows, cut.n_channels, x.tensor.device
    partial = torch.empty(2, cut.n_runs, n_channels, dtype=torch.float32, device=device)
    sums = torch.empty(2, n_channels, dtype=torch.float32, device=device)
    first, last = grad.parts[0], grad.parts[-1]
    n_first = n_channels // cut.n_halves
    flags = {"ACT": _constant(grad.act), "HALVES": _constant(cut.n_halves > 1), "BLOCK_C": _constant(cut.block_c)}
    inputs = (x.tensor, stats, *params, first.tensor, last.tensor)
    strides = (x.stride, first.stride, last.stride)
    _sums[cut.reduce_grid](
        *inputs, partial, n_rows, n_channels, n_first, *strides, cut.n_runs,
        LOOPS=_constant(cut.loops), BLOCK_M=_constant(cut.block_m), **flags, num_warps=8,
    )  # fmt: skip
    _finish_sums[cut.finish_grid](
        partial, sums, n_channels, cut.n_runs, BLOCK_N=_constant(FINISH_N), BLOCK_C=_constant(FINISH_C), num_warps=4
    )
    x_grad = torch.empty_like(x.tensor, memory_format=torch.channels_last)
    _apply_gradient[cut.apply_grid](
        *inputs, sums, x_grad, n_rows, n_channels, n_first, *strides,
        BLOCK_M=_constant(cut.apply_block_m), **flags, num_warps=8,
    )  # fmt: skip
    return x_grad, sums[1], sums[0]


def _constant(value: int) -> Any:
    """A compile-time argument; Triton's types name only tl.constexpr."""
    return value


@triton.jit
def _rows(run, n_rows, BLOCK_M: tl.constexpr):
    """Rows of a tile, counted from its first, and which of them exist; `run` counts tiles."""
    first = run * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    return first.to(tl.int64), local, local < n_rows - first


@triton.jit
def _moments(  # noqa: PLR0913 - a kernel takes pointers
    x, partial, n_rows, n_channels, stride, n_runs, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    run = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < n_channels
    start = run * LOOPS * BLOCK_M
    shift = tl.load(x + start.to(tl.int64) * stride + channel, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        first, local, in_rows = _rows(run * LOOPS + loop, n_rows, BLOCK_M)
        mask = in_rows[:, None] & exists[None, :]
        value = tl.load(x + first * stride + local[:, None] * stride + channel[None, :], mask=mask, other=0.0)
        value = tl.where(mask, value.to(tl.float32) - shift[None, :], 0.0)
        total += value
        squares += value * value
    count = tl.minimum(n_rows - start, LOOPS * BLOCK_M).to(tl.float32)
    total_c = tl.sum(total, axis=0)
    mean = total_c / count
    place = run * n_channels + channel
    tl.store(partial + place, shift + mean, mask=exists)
    # Not tl.maximum, which drops NaN: an infinite or NaN input must show in the output.
    deviation = tl.sum(squares, axis=0) - total_c * mean
    tl.store(partial + n_runs * n_channels + place, tl.where(deviation < 0.0, 0.0, deviation), mask=exists)


@triton.jit
def _finish_moments(  # noqa: PLR0913
    partial, stats, running_mean, running_var, n_batches, n_rows, n_channels, n_runs, rows_per_run, eps, momentum,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < n_channels
    shift = tl.load(partial + channel, mask=exists, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_runs:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_runs)[:, None] & exists[None, :]
        count = tl.minimum(n_rows - run * rows_per_run, rows_per_run).to(tl.float32)
        mean = tl.load(partial + run[:, None] * n_channels + channel[None, :], mask=mask, other=0.0)
        total += tl.where(mask, (mean - shift[None, :]) * count[:, None], 0.0)
        i += BLOCK_N
    mean_all = shift + tl.sum(total, axis=0) / n_rows
    squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_runs:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_runs)[:, None] & exists[None, :]
        count = tl.minimum(n_rows - run * rows_per_run, rows_per_run).to(tl.float32)
        place = run[:, None] * n_channels + channel[None, :]
        off = tl.load(partial + place, mask=mask, other=0.0) - mean_all[None, :]
        inside = tl.load(partial + n_runs * n_channels + place, mask=mask, other=0.0)
        squares += tl.where(mask, inside + off * off * count[:, None], 0.0)
        i += BLOCK_N
    deviation = tl.sum(squares, axis=0)
    inv = tl.math.div_rn(1.0, tl.math.sqrt_rn(deviation / n_rows + eps))
    tl.store(stats + channel, mean_all, mask=exists)
    tl.store(stats + n_channels + channel, inv, mask=exists)
    old_mean = tl.load(running_mean + channel, mask=exists)
    tl.store(running_mean + channel, old_mean + momentum * (mean_all - old_mean), mask=exists)
    old_var = tl.load(running_var + channel, mask=exists)
    unbiased = deviation / (n_rows - 1)
    tl.store(running_var + channel, old_var + momentum * (unbiased - old_var), mask=exists)
    if tl.program_id(0) == 0:
        tl.store(n_batches, tl.load(n_batches) + 1)


@triton.jit
def _normalize(value, stats, weight, bias, n_channels, channel, exists):  # noqa: PLR0913
    """(y_hat, z, weight * inv) of a tile of x."""
    mean = tl.load(stats + channel, mask=exists, other=0.0)
    inv = tl.load(stats + n_channels + channel, mask=exists, other=0.0)
    weight_c = tl.load(weight + channel, mask=exists, other=0.0)
    bias_c = tl.load(bias + channel, mask=exists, other=0.0)
    normal = (value.to(tl.float32) - mean[None, :]) * inv[None, :]
    return normal, normal * weight_c[None, :] + bias_c[None, :], weight_c * inv


@triton.jit
def _part(first, last, n_first, first_channel, HALVES: tl.constexpr):
    """Where a block of channels lies: in the one tensor or, of two, in that which holds its half."""
    if HALVES:
        pointer = tl.where(first_channel < n_first, first, last)
        return pointer, tl.where(first_channel < n_first, first_channel, first_channel - n_first)
    else:
        return first, first_channel


@triton.jit
def _part_stride(first_stride, last_stride, n_first, first_channel, HALVES: tl.constexpr):
    if HALVES:
        return tl.where(first_channel < n_first, first_stride, last_stride)
    else:
        return first_stride


@triton.jit
def _apply(  # noqa: PLR0913
    x, stats, weight, bias, shortcut, out_first, out_last, n_rows, n_channels, n_first, stride, shortcut_stride,
    first_stride, last_stride, ACT: tl.constexpr, ADDS: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    first_channel = tl.program_id(1) * BLOCK_C
    lane = tl.arange(0, BLOCK_C)
    channel = first_channel + lane
    exists = channel < n_channels
    first, local, in_rows = _rows(tl.program_id(0), n_rows, BLOCK_M)
    mask = in_rows[:, None] & exists[None, :]
    value = tl.load(x + first * stride + local[:, None] * stride + channel[None, :], mask=mask, other=0.0)
    _, z, _ = _normalize(value, stats, weight, bias, n_channels, channel, exists)
    if ACT:
        z = z * tl.sigmoid(z)
    if ADDS:
        place = first * shortcut_stride + local[:, None] * shortcut_stride + channel[None, :]
        z += tl.load(shortcut + place, mask=mask, other=0.0).to(tl.float32)
    out, at = _part(out_first, out_last, n_first, first_channel, HALVES)
    out_stride = _part_stride(first_stride, last_stride, n_first, first_channel, HALVES)
    place = first * out_stride + local[:, None] * out_stride + (at + lane)[None, :]
    tl.store(out + place, z.to(out_first.dtype.element_ty), mask=mask)


@triton.jit
def _inner_gradient(grad, z, ACT: tl.constexpr):
    """Gradient of z from that of act(z)."""
    grad = grad.to(tl.float32)
    if ACT:
        sigmoid = tl.sigmoid(z)
        grad = grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return grad


@triton.jit
def _sums(  # noqa: PLR0913
    x, stats, weight, bias, grad_first, grad_last, partial, n_rows, n_channels, n_first, stride, first_stride,
    last_stride, n_runs, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    first_channel = tl.program_id(1) * BLOCK_C
    lane = tl.arange(0, BLOCK_C)
    channel = first_channel + lane
    exists = channel < n_channels
    source, at = _part(grad_first, grad_last, n_first, first_channel, HALVES)
    grad_stride = _part_stride(first_stride, last_stride, n_first, first_channel, HALVES)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        first, local, in_rows = _rows(run * LOOPS + loop, n_rows, BLOCK_M)
        mask = in_rows[:, None] & exists[None, :]
        value = tl.load(x + first * stride + local[:, None] * stride + channel[None, :], mask=mask, other=0.0)
        place = first * grad_stride + local[:, None] * grad_stride + (at + lane)[None, :]
        grad = tl.load(source + place, mask=mask, other=0.0)
        normal, z, _ = _normalize(value, stats, weight, bias, n_channels, channel, exists)
        inner = _inner_gradient(grad, z, ACT)
        total += inner  # 0 outside the mask, where the gradient is 0
        weighted += inner * normal
    place = run * n_channels + channel
    tl.store(partial + place, tl.sum(total, axis=0), mask=exists)
    tl.store(partial + n_runs * n_channels + place, tl.sum(weighted, axis=0), mask=exists)


@triton.jit
def _finish_sums(partial, sums, n_channels, n_runs, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < n_channels
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_runs:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_runs)[:, None] & exists[None, :]
        place = run[:, None] * n_channels + channel[None, :]
        total += tl.load(partial + place, mask=mask, other=0.0)
        weighted += tl.load(partial + n_runs * n_channels + place, mask=mask, other=0.0)
        i += BLOCK_N
    tl.store(sums + channel, tl.sum(total, axis=0), mask=exists)
    tl.store(sums + n_channels + channel, tl.sum(weighted, axis=0), mask=exists)


@triton.jit
def _apply_gradient(  # noqa: PLR0913
    x, stats, weight, bias, grad_first, grad_last, sums, out, n_rows, n_channels, n_first, stride, first_stride,
    last_stride, BLOCK_M: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first_channel = tl.program_id(1) * BLOCK_C
    lane = tl.arange(0, BLOCK_C)
    channel = first_channel + lane
    exists = channel < n_channels
    first, local, in_rows = _rows(tl.program_id(0), n_rows, BLOCK_M)
    mask = in_rows[:, None] & exists[None, :]
    value = tl.load(x + first * stride + local[:, None] * stride + channel[None, :], mask=mask, other=0.0)
    source, at = _part(grad_first, grad_last, n_first, first_channel, HALVES)
    grad_stride = _part_stride(first_stride, last_stride, n_first, first_channel, HALVES)
    place = first * grad_stride + local[:, None] * grad_stride + (at + lane)[None, :]
    grad = tl.load(source + place, mask=mask, other=0.0)
    normal, z, factor = _normalize(value, stats, weight, bias, n_channels, channel, exists)
    inner = _inner_gradient(grad, z, ACT)
    mean_grad = tl.load(sums + channel, mask=exists, other=0.0) / n_rows
    mean_weighted = tl.load(sums + n_channels + channel, mask=exists, other=0.0) / n_rows
    result = factor[None, :] * (inner - mean_grad[None, :] - normal * mean_weighted[None, :])
    place = first * n_channels + local[:, None] * n_channels + channel[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
