"""Triton kernels of the fast path: one launch quantizes all weights of a model, and one computes their gradients.

All weights lie one after the other in one flat buffer. A row is a run of elements that share one scale: an output
channel, or a whole weight where the scale is per tensor. One program of the kernel handles one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

# A smaller abs-max is raised to this before the scale is computed: scaling_min_val of
# brevitas.quant.base.MaxStatsScaling, 0.13.4.
MIN_ABSMAX = 1e-10
LONG_ROW = 65536  # elements; longer rows, which only per-tensor scales have, are faster with a wider program

_MIN_ABSMAX: Any = tl.constexpr(MIN_ABSMAX)
# Adding and then subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, halves to even, by IEEE
# arithmetic alone. |weight / scale| is at most -lowest code * (1 + 2**-22), which is below 2**22 and rounds to the
# lowest code at least. It is above the largest code only where the range is full.
_ROUND: Any = tl.constexpr(12582912.0)
_NO_ELEMENT: Any = tl.constexpr(2**31 - 1)
# Typed as Any, because pyright infers that a function never returns if it calls tl.load.
jit: Any = triton.jit

Kind = Literal["abs-max", "lsq", "decoupled"]


@dataclass(frozen=True)
class Spec:
    """What a layer's quantizer computes: codes lowest..largest with one scale per output channel or per tensor.

    `kind` says where the scale comes from: the abs-max of the weights, which is -lowest steps, or a trained parameter
    as app/quant/learned.py describes for "lsq" and "decoupled".
    """

    largest: int
    per_tensor: bool
    kind: Kind = "abs-max"
    is_narrow: bool = True

    @property
    def lowest(self) -> int:
        """The lowest code: -largest in a narrow range, -7 at 4 bits; one below it in a full one, -8."""
        return -self.largest if self.is_narrow else -self.largest - 1


class Layout:
    """Where each weight lies in the flat buffer: one after another, each in its own memory order.

    `table` int32 [n_rows, 7] describes the rows: first element in the flat buffer; number of elements; n_inner and
    stride, which turn the position k in memory into the logical one, k % n_inner * stride + k // n_inner; largest code;
    1 if the scale is per tensor; lowest code. `largest` float32 [n_rows] is the largest code of each row;
    `rows_per_weight` the number of rows of each weight.
    """

    def __init__(self, weights: list[torch.Tensor], specs: list[Spec]) -> None:
        self.device = weights[0].device
        self.shapes = [weight.shape for weight in weights]
        self.strides = [weight.stride() for weight in weights]
        self.memory_formats = [_memory_format(weight) for weight in weights]
        self.starts: list[int] = []
        tables = []
        n_elements = 0
        for weight, spec in zip(weights, specs, strict=True):
            self.starts.append(n_elements)
            tables.append(_rows(weight, n_elements, spec))
            n_elements += weight.numel()
        self.rows_per_weight = [len(rows) for rows in tables]
        table = torch.cat(tables)
        longest = int(table[:, 1].max())
        self.table = table.to(self.device)
        self.largest = self.table[:, 4].float()
        self.launch = {"BLOCK": 4096, "num_warps": 16} if longest > LONG_ROW else {"BLOCK": 1024, "num_warps": 4}

    def fits(self, weights: list[torch.Tensor]) -> bool:
        """Whether the same weights still lie on this device in this memory order."""
        return weights[0].device == self.device and [weight.stride() for weight in weights] == self.strides

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One flat buffer of tensors shaped like the weights; a tensor in another memory order is copied first."""
        parts = []
        for tensor, memory_format in zip(tensors, self.memory_formats, strict=True):
            dense = tensor.contiguous(memory_format=memory_format)
            parts.append(dense.as_strided((dense.numel(),), (1,)))
        return torch.cat(parts)

    def join_grads(self, grads: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """`join` of the gradients, with zeros for a weight that has none; at least one weight has a gradient."""
        dtype = next(grad.dtype for grad in grads if grad is not None)
        zero = torch.zeros((), dtype=dtype, device=self.device)
        dense = [zero.expand(shape) if grad is None else grad for grad, shape in zip(grads, self.shapes, strict=True)]
        return self.join(dense)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of the flat buffer with the shapes and strides of the weights."""
        views = zip(self.shapes, self.strides, self.starts, strict=True)
        return [flat.as_strided(shape, stride, start) for shape, stride, start in views]

    def split_grads(self, flat: torch.Tensor, grads: tuple[torch.Tensor | None, ...]) -> Iterator[torch.Tensor | None]:
        """`split` of the weights' gradients, and None for a weight that had none in `join_grads`."""
        return (None if grad is None else part for grad, part in zip(grads, self.split(flat), strict=True))


def _memory_format(weight: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


def _rows(weight: torch.Tensor, start: int, spec: Spec) -> torch.Tensor:
    """The rows of Layout.table for a weight that begins at element `start` of the flat buffer."""
    n_rows = 1 if spec.per_tensor else weight.shape[0]
    length = weight.numel() // n_rows
    n_inner, stride = length, 1
    if not weight.is_contiguous():
        n_inner, stride = weight.shape[1], weight.shape[2] * weight.shape[3]
    row = [start, length, n_inner, stride, spec.largest, int(spec.per_tensor), spec.lowest]
    table = torch.tensor(row, dtype=torch.int32).repeat(n_rows, 1)
    table[:, 0] += torch.arange(n_rows, dtype=torch.int32) * length
    return table


def quantize(flat: torch.Tensor, layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake-quantizes all weights.

    Args:
        flat: the weights, float32 [n].
        layout: where each weight lies in `flat`.
        dtype: of the fake-quantized weights, which are computed in float32 and rounded once.

    Returns:
        out [n] in `dtype`; absmax float32 [n_rows], NaN where a weight is not finite; pick int32 [n_rows], which says
        which elements get the scale's gradient: the logical position of the first element that is the absmax, or, where
        the scale is per tensor, the number of elements that are the absmax.
    """
    n_rows = len(layout.table)
    out = torch.empty_like(flat, dtype=dtype)
    absmax = torch.empty(n_rows, dtype=torch.float32, device=flat.device)
    pick = torch.empty(n_rows, dtype=torch.int32, device=flat.device)
    with torch.cuda.device_of(flat):  # Triton launches on the current device
        _quantize[(n_rows,)](flat, layout.table, out, absmax, pick, **layout.launch)
    return out, absmax, pick


def gradient(
    grads: torch.Tensor, flat: torch.Tensor, layout: Layout, absmax: torch.Tensor, pick: torch.Tensor
) -> torch.Tensor:
    """Gradient of the weights, float32 [n], from the gradient `grads` [n] of the fake-quantized weights in any dtype.

    `absmax` and `pick` come from `quantize`.
    """
    out = torch.empty_like(flat)
    with torch.cuda.device_of(flat):
        _gradient[(len(layout.table),)](grads, flat, layout.table, absmax, pick, out, **layout.launch)
    return out


@jit
def load_row(table, row):
    """One row of Layout.table: start, length, n_inner, stride, largest code, per_tensor, lowest code.

    The codes are floats.
    """
    start = tl.load(table + row * 7)
    length = tl.load(table + row * 7 + 1)
    n_inner = tl.load(table + row * 7 + 2)
    stride = tl.load(table + row * 7 + 3)
    largest = tl.load(table + row * 7 + 4).to(tl.float32)
    per_tensor = tl.load(table + row * 7 + 5)
    lowest = tl.load(table + row * 7 + 6).to(tl.float32)
    return start, length, n_inner, stride, largest, per_tensor, lowest


@jit
def to_code(weight, scale):
    """The nearest integer to weight / scale, halves to even; see _ROUND for the range."""
    return tl.math.div_rn(weight, scale) + _ROUND - _ROUND


@jit
def _clipped(code, largest):
    return tl.where(code > largest, largest, code)  # NaN stays NaN


@jit
def _scale(absmax, lowest):
    # Not tl.maximum, which drops NaN. div_rn: a plain / is approximate on a GPU.
    return tl.math.div_rn(tl.where(absmax < _MIN_ABSMAX, _MIN_ABSMAX, absmax), -lowest)


@jit
def _quantize(flat, table, out, absmax_out, pick_out, BLOCK: tl.constexpr):  # noqa: PLR0913 - a kernel takes pointers
    row = tl.program_id(0)
    start, length, n_inner, stride, largest, per_tensor, lowest = load_row(table, row)
    lanes = tl.arange(0, BLOCK)

    largest_seen = tl.zeros([BLOCK], tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)  # 0, or NaN once an element is infinite or NaN
    i = 0  # not range(): Triton 3.6's interpreter fails on a bound that is loaded from memory (numpy 2.4)
    while i < length:
        weight = tl.load(flat + start + i + lanes, mask=i + lanes < length, other=0.0)
        largest_seen = tl.maximum(largest_seen, tl.abs(weight))
        poison += weight * 0.0
        i += BLOCK
    absmax = tl.max(largest_seen, axis=0) + tl.sum(poison, axis=0)
    scale = _scale(absmax, lowest)

    first = tl.full([BLOCK], _NO_ELEMENT, tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    i = 0
    while i < length:
        k = i + lanes
        mask = k < length
        weight = tl.load(flat + start + k, mask=mask, other=0.0)
        code = _clipped(to_code(weight, scale), largest)
        tl.store(out + start + k, (code * scale).to(out.dtype.element_ty), mask=mask)
        is_max = mask & (tl.abs(weight) == absmax)
        first = tl.minimum(first, tl.where(is_max, k % n_inner * stride + k // n_inner, _NO_ELEMENT))
        count += is_max.to(tl.int32)
        i += BLOCK
    tl.store(absmax_out + row, absmax)
    tl.store(pick_out + row, tl.where(per_tensor == 1, tl.sum(count, axis=0), tl.min(first, axis=0)))


@jit
def _gradient(grads, flat, table, absmax_in, pick_in, out, BLOCK: tl.constexpr):  # noqa: PLR0913
    row = tl.program_id(0)
    start, length, n_inner, stride, largest, per_tensor, lowest = load_row(table, row)
    absmax = tl.load(absmax_in + row)
    pick = tl.load(pick_in + row)
    scale = _scale(absmax, lowest)
    lanes = tl.arange(0, BLOCK)

    scale_grad = tl.zeros([BLOCK], tl.float32)
    i = 0
    while i < length:
        k = i + lanes
        weight = tl.load(flat + start + k, mask=k < length, other=0.0)
        grad = tl.load(grads + start + k, mask=k < length, other=0.0).to(tl.float32)
        ratio = tl.math.div_rn(weight, scale)
        code = _clipped(ratio + _ROUND - _ROUND, largest)
        scale_grad += grad * code - grad * scale * tl.math.div_rn(ratio, scale)
        i += BLOCK
    share = tl.math.div_rn(tl.sum(scale_grad, axis=0), -lowest)
    if per_tensor == 1:
        share = tl.math.div_rn(share, pick.to(tl.float32))

    i = 0
    while i < length:
        k = i + lanes
        mask = k < length
        weight = tl.load(flat + start + k, mask=mask, other=0.0)
        grad = tl.load(grads + start + k, mask=mask, other=0.0).to(tl.float32)
        is_max = tl.where(per_tensor == 1, tl.abs(weight) == absmax, k % n_inner * stride + k // n_inner == pick)
        from_scale = tl.where(weight > 0, share, tl.where(weight < 0, -share, 0.0))
        straight = tl.math.div_rn(grad * scale, scale)
        tl.store(out + start + k, straight + tl.where(is_max, from_scale, 0.0), mask=mask)
        i += BLOCK
