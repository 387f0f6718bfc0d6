"""Triton kernels of BatchNorm with SiLU and an added shortcut: two passes forward, of which eval mode needs the second
alone, and two backward.

A tensor [N,C,H,W] in channels_last memory is a matrix of n_rows = N*H*W rows and C channels; `stride` is the distance
of two rows in elements, C or more. A program reduces a run of rows for a block of columns and writes its partial sums;
a second kernel adds the partial sums up in a fixed order. There are no atomics, so equal inputs give equal bits.

With y_hat = (x - mean) * inv, inv = 1 / sqrt(var + eps), and z = y_hat * weight + bias:
    forward     y  = act(z) + shortcut               act: SiLU, z * sigmoid(z), or none
    backward    dz = dy * act'(z),  bias_grad = sum(dz),  weight_grad = sum(dz * y_hat)
                dx = weight * inv * (dz - bias_grad / n_rows - y_hat * weight_grad / n_rows)
Everything is computed in float32 and rounded once. Variances are safe where |mean| >> std: each program sums x - x0, x0
being its first row, and the runs are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances" (1979).

`fold` rows lie side by side as one row of columns, so that a block of 128 columns reads whole lines of memory also
where there are 48 channels: column v is channel v % n_part of row v // n_part.
"""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

VECTOR = 8  # elements that a thread loads together
N_STAGES = 3  # tiles whose loads are on their way at a time

_VECTOR: Any = tl.constexpr(VECTOR)
_N_STAGES: Any = tl.constexpr(N_STAGES)


@triton.jit
def _columns(n_part, fold, n_blocks, BLOCK_C: tl.constexpr):
    """Half of a program's columns, their rows within a folded row, their channels in the half, and which exist."""
    block = tl.program_id(1)
    half = block // n_blocks
    column = (block - half * n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return half, column // n_part, column % n_part, column < n_part * fold


@triton.jit
def _places(row, channel, stride, TOGETHER: tl.constexpr):
    """Offsets of columns from the start of a folded row."""
    place = row * stride + channel
    if TOGETHER:
        place = tl.max_contiguous(tl.multiple_of(place, _VECTOR), _VECTOR)
    return place


@triton.jit
def _tile(first, n_folded, exists, BLOCK_M: tl.constexpr):
    """Rows of a tile from its first, [BLOCK_M,1], and which elements exist."""
    row = tl.arange(0, BLOCK_M)
    return row[:, None], (row < n_folded - first)[:, None] & exists[None, :]


@triton.jit
def moments_kernel(  # noqa: PLR0913 - a kernel takes pointers
    x, partial, n_folded, n_channels, n_part, fold, n_blocks, stride, n_partial, LOOPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    half, row_in, channel, exists = _columns(n_part, fold, n_blocks, BLOCK_C)
    place = _places(row_in, half * n_part + channel, stride, TOGETHER)
    begin = tl.program_id(0) * LOOPS * BLOCK_M
    step = stride * fold
    shift = tl.load(x + begin.to(tl.int64) * step + place, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for loop in tl.range(LOOPS, num_stages=_N_STAGES):
        first = begin + loop * BLOCK_M
        row, mask = _tile(first, n_folded, exists, BLOCK_M)
        at = x + first.to(tl.int64) * step + row * step + place[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - shift[None, :], 0.0)
        total += value
        squares += value * value
    count = tl.minimum(n_folded - begin, LOOPS * BLOCK_M).to(tl.float32)
    total_c = tl.sum(total, axis=0)
    mean = total_c / count
    out = (tl.program_id(0) * fold + row_in) * n_channels + half * n_part + channel
    tl.store(partial + out, shift + mean, mask=exists)
    # Not tl.maximum, which drops NaN: an infinite or NaN input must show in the output.
    deviation = tl.sum(squares, axis=0) - total_c * mean
    tl.store(partial + n_partial * n_channels + out, tl.where(deviation < 0.0, 0.0, deviation), mask=exists)


@triton.jit
def finish_moments_kernel(  # noqa: PLR0913
    partial, stats, running_mean, running_var, n_batches, n_folded, fold, n_channels, n_partial, rows_per_run, eps,
    momentum, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < n_channels
    n_rows = (n_folded * fold).to(tl.float32)
    shift = tl.load(partial + channel, mask=exists, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_partial:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_partial)[:, None] & exists[None, :]
        count = tl.minimum(n_folded - run // fold * rows_per_run, rows_per_run).to(tl.float32)
        mean = tl.load(partial + run[:, None] * n_channels + channel[None, :], mask=mask, other=0.0)
        total += tl.where(mask, (mean - shift[None, :]) * count[:, None], 0.0)
        i += BLOCK_N
    mean_all = shift + tl.sum(total, axis=0) / n_rows
    squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_partial:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_partial)[:, None] & exists[None, :]
        count = tl.minimum(n_folded - run // fold * rows_per_run, rows_per_run).to(tl.float32)
        place = run[:, None] * n_channels + channel[None, :]
        off = tl.load(partial + place, mask=mask, other=0.0) - mean_all[None, :]
        inside = tl.load(partial + n_partial * n_channels + place, mask=mask, other=0.0)
        squares += tl.where(mask, inside + off * off * count[:, None], 0.0)
        i += BLOCK_N
    deviation = tl.sum(squares, axis=0)
    inv = tl.math.div_rn(1.0, tl.math.sqrt_rn(deviation / n_rows + eps))
    tl.store(stats + channel, mean_all, mask=exists)
    tl.store(stats + n_channels + channel, inv, mask=exists)
    old_mean = tl.load(running_mean + channel, mask=exists)
    tl.store(running_mean + channel, old_mean + momentum * (mean_all - old_mean), mask=exists)
    old_var = tl.load(running_var + channel, mask=exists)
    tl.store(running_var + channel, old_var + momentum * (deviation / (n_rows - 1.0) - old_var), mask=exists)
    if tl.program_id(0) == 0:
        tl.store(n_batches, tl.load(n_batches) + 1)


@triton.jit
def _factors(stats, weight, bias, n_channels, channel, exists):  # noqa: PLR0913
    """Mean, inv, weight * inv and bias of columns: z = (x - mean) * (weight * inv) + bias."""
    inv = tl.load(stats + n_channels + channel, mask=exists, other=0.0)
    factor = tl.load(weight + channel, mask=exists, other=0.0) * inv
    mean = tl.load(stats + channel, mask=exists, other=0.0)
    return mean, inv, factor, tl.load(bias + channel, mask=exists, other=0.0)


@triton.jit
def _running_factors(running_mean, running_var, weight, bias, eps, channel, exists):  # noqa: PLR0913
    """As _factors, without inv, from the running statistics."""
    mean = tl.load(running_mean + channel, mask=exists, other=0.0)
    var = tl.load(running_var + channel, mask=exists, other=1.0)
    factor = tl.load(weight + channel, mask=exists, other=0.0) * tl.math.div_rn(1.0, tl.math.sqrt_rn(var + eps))
    return mean, factor, tl.load(bias + channel, mask=exists, other=0.0)


@triton.jit
def apply_kernel(  # noqa: PLR0913
    x, stats, running_var, weight, bias, shortcut, out_first, out_last, out_copy, n_folded, n_channels, n_part, fold,
    n_blocks, stride, shortcut_stride, first_stride, last_stride, copy_stride, eps, RUNNING: tl.constexpr,
    ACT: tl.constexpr, COPIES: tl.constexpr, ADDS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """With RUNNING, `stats` is the running mean; else running_var is not read."""
    half, row_in, channel, exists = _columns(n_part, fold, n_blocks, BLOCK_C)
    own = half * n_part + channel
    if RUNNING:
        mean, factor, shift = _running_factors(stats, running_var, weight, bias, eps, own, exists)
    else:
        mean, _, factor, shift = _factors(stats, weight, bias, n_channels, own, exists)
    is_first = (half == 0) & (n_channels > n_part)
    out, out_stride = out_last, last_stride
    if is_first:
        out, out_stride = out_first, first_stride
    place = _places(row_in, half * n_part + channel, stride, TOGETHER)
    out_place = _places(row_in, channel, out_stride, TOGETHER)
    copy_place = _places(row_in, channel, copy_stride, TOGETHER)
    shortcut_place = _places(row_in, channel, shortcut_stride, TOGETHER)
    begin = tl.program_id(0) * LOOPS * BLOCK_M
    for loop in tl.range(LOOPS, num_stages=_N_STAGES):
        first = begin + loop * BLOCK_M
        row, mask = _tile(first, n_folded, exists, BLOCK_M)
        at = first.to(tl.int64) * fold
        value = tl.load(x + at * stride + row * (stride * fold) + place[None, :], mask=mask, other=0.0)
        z = (value.to(tl.float32) - mean[None, :]) * factor[None, :] + shift[None, :]
        if ACT:
            z = z * _sigmoid(z)
        if ADDS:
            source = shortcut + at * shortcut_stride + row * (shortcut_stride * fold) + shortcut_place[None, :]
            z += tl.load(source, mask=mask, other=0.0).to(tl.float32)
        result = z.to(out_first.dtype.element_ty)
        tl.store(out + at * out_stride + row * (out_stride * fold) + out_place[None, :], result, mask=mask)
        if COPIES:  # noqa: SIM102 - known when the kernel is compiled, the other is not
            if not is_first:
                target = out_copy + at * copy_stride + row * (copy_stride * fold) + copy_place[None, :]
                tl.store(target, result, mask=mask)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)): the square of one instruction's result is cheaper than a division, and good to 3e-7."""
    root = tl.math.rsqrt(1.0 + tl.exp(-z))
    return root * root


@triton.jit
def _inner_gradient(grad, z, ACT: tl.constexpr):
    """Gradient of z from that of act(z)."""
    if ACT:
        sigmoid = _sigmoid(z)
        grad = grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return grad


@triton.jit
def sums_kernel(  # noqa: PLR0913
    x, stats, weight, bias, grad_first, grad_last, grad_copy, partial, n_folded, n_channels, n_part, fold, n_blocks,
    stride, first_stride, last_stride, copy_stride, n_partial, ACT: tl.constexpr, COPIES: tl.constexpr,
    LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Partial sums of dz and of dz * (x - mean)."""
    half, row_in, channel, exists = _columns(n_part, fold, n_blocks, BLOCK_C)
    mean, _, factor, shift = _factors(stats, weight, bias, n_channels, half * n_part + channel, exists)
    is_first = (half == 0) & (n_channels > n_part)
    source, grad_stride = grad_last, last_stride
    if is_first:
        source, grad_stride = grad_first, first_stride
    place = _places(row_in, half * n_part + channel, stride, TOGETHER)
    grad_place = _places(row_in, channel, grad_stride, TOGETHER)
    copy_place = _places(row_in, channel, copy_stride, TOGETHER)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    begin = tl.program_id(0) * LOOPS * BLOCK_M
    for loop in tl.range(LOOPS, num_stages=_N_STAGES):
        first = begin + loop * BLOCK_M
        row, mask = _tile(first, n_folded, exists, BLOCK_M)
        at = first.to(tl.int64) * fold
        value = tl.load(x + at * stride + row * (stride * fold) + place[None, :], mask=mask, other=0.0)
        grad_at = source + at * grad_stride + row * (grad_stride * fold) + grad_place[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        if COPIES:  # noqa: SIM102 - known when the kernel is compiled, the other is not
            if not is_first:
                copy_at = grad_copy + at * copy_stride + row * (copy_stride * fold) + copy_place[None, :]
                grad += tl.load(copy_at, mask=mask, other=0.0).to(tl.float32)
        centred = value.to(tl.float32) - mean[None, :]
        inner = _inner_gradient(grad, centred * factor[None, :] + shift[None, :], ACT)
        total += inner  # 0 outside the mask, where the gradient is 0
        weighted += inner * centred
    out = (tl.program_id(0) * fold + row_in) * n_channels + half * n_part + channel
    tl.store(partial + out, tl.sum(total, axis=0), mask=exists)
    tl.store(partial + n_partial * n_channels + out, tl.sum(weighted, axis=0), mask=exists)


@triton.jit
def finish_sums_kernel(partial, stats, sums, n_channels, n_partial, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # noqa: PLR0913
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < n_channels
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    i = 0
    while i < n_partial:
        run = i + tl.arange(0, BLOCK_N)
        mask = (run < n_partial)[:, None] & exists[None, :]
        place = run[:, None] * n_channels + channel[None, :]
        total += tl.load(partial + place, mask=mask, other=0.0)
        weighted += tl.load(partial + n_partial * n_channels + place, mask=mask, other=0.0)
        i += BLOCK_N
    inv = tl.load(stats + n_channels + channel, mask=exists, other=0.0)
    tl.store(sums + channel, tl.sum(total, axis=0), mask=exists)
    tl.store(sums + n_channels + channel, tl.sum(weighted, axis=0) * inv, mask=exists)


@triton.jit
def apply_gradient_kernel(  # noqa: PLR0913
    x, stats, weight, bias, grad_first, grad_last, grad_copy, sums, out, shared, n_rows, n_folded, n_channels, n_part,
    fold, n_blocks, stride, first_stride, last_stride, copy_stride, out_stride, ACT: tl.constexpr, COPIES: tl.constexpr,
    SHARES: tl.constexpr, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    half, row_in, channel, exists = _columns(n_part, fold, n_blocks, BLOCK_C)
    own = half * n_part + channel
    mean, inv, factor, shift = _factors(stats, weight, bias, n_channels, own, exists)
    is_first = (half == 0) & (n_channels > n_part)
    source, grad_stride = grad_last, last_stride
    if is_first:
        source, grad_stride = grad_first, first_stride
    place = _places(row_in, own, stride, TOGETHER)
    out_place = _places(row_in, own, out_stride, TOGETHER)
    shared_place = _places(row_in, own, n_channels, TOGETHER)
    grad_place = _places(row_in, channel, grad_stride, TOGETHER)
    copy_place = _places(row_in, channel, copy_stride, TOGETHER)
    mean_grad = tl.load(sums + own, mask=exists, other=0.0) / n_rows * factor
    slope = tl.load(sums + n_channels + own, mask=exists, other=0.0) / n_rows * factor * inv
    begin = tl.program_id(0) * LOOPS * BLOCK_M
    for loop in tl.range(LOOPS, num_stages=_N_STAGES):
        first = begin + loop * BLOCK_M
        row, mask = _tile(first, n_folded, exists, BLOCK_M)
        at = first.to(tl.int64) * fold
        value = tl.load(x + at * stride + row * (stride * fold) + place[None, :], mask=mask, other=0.0)
        grad_at = source + at * grad_stride + row * (grad_stride * fold) + grad_place[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        if COPIES:  # noqa: SIM102 - known when the kernel is compiled, the other is not
            if not is_first:
                copy_at = grad_copy + at * copy_stride + row * (copy_stride * fold) + copy_place[None, :]
                grad += tl.load(copy_at, mask=mask, other=0.0).to(tl.float32)
        if SHARES:
            beside = shared + at * n_channels + row * (n_channels * fold) + shared_place[None, :]
            tl.store(beside, grad.to(shared.dtype.element_ty), mask=mask)
        centred = value.to(tl.float32) - mean[None, :]
        inner = _inner_gradient(grad, centred * factor[None, :] + shift[None, :], ACT)
        result = inner * factor[None, :] - (mean_grad[None, :] + centred * slope[None, :])
        into = out + at * out_stride + row * (out_stride * fold) + out_place[None, :]
        tl.store(into, result.to(out.dtype.element_ty), mask=mask)
