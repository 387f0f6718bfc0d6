"""Trained scales: where Brevitas' modules keep those of LSQ, and the fast path of weights with trained scales.

Forward for a weight w and its trained parameter v, with Brevitas' order of operations (0.13.4):
    q = clamp(round(w / step), -largest, largest) * scale
    LSQ, one v per channel:       step = scale = max(2**v, 1e-10) / largest
    decoupled, one v per layer:   step = |(max |w| of each channel)|_2 / sqrt(channels) / largest, scale = |v| / largest
Autograd differentiates step and scale, which are computed for all layers at once. Backward of the rest, with g the
gradient of q and the straight-through estimator for the rounding:
    ratio_grad = g * scale                  LSQ: 0 where |round(w / step)| > largest
    grad       = ratio_grad / step
    scale_grad = sum(g * code)
    step_grad  = -sum(ratio_grad * ((w / step) / step))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import triton.language as tl
from brevitas.core.scaling import ParameterScaling
from brevitas.nn import QuantConv2d
from torch import nn
from torch.autograd.function import once_differentiable

from app.quant.kernels import MIN_ABSMAX, Kind, Layout, jit, load_row, to_code

Tensors = tuple[torch.Tensor, ...]


def scale_parameter(layer: QuantConv2d) -> nn.Parameter | None:
    """LSQ's parameter: log2 of the largest weight that is not clipped, [out_channels,1,1,1]; None for other scales."""
    scaling = cast(Any, layer.weight_quant).tensor_quant.scaling_impl
    return scaling.value if isinstance(scaling, ParameterScaling) else None


def learned_layers(model: nn.Module) -> dict[str, QuantConv2d]:
    """The layers with an LSQ scale, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantConv2d) and scale_parameter(layer) is not None
    }


@torch.no_grad()
def reset_scales(model: nn.Module) -> None:
    """Sets every LSQ scale to the scale of the abs-max quantizer."""
    for layer in learned_layers(model).values():
        absmax = layer.weight.abs().amax((1, 2, 3), keepdim=True)
        cast(nn.Parameter, scale_parameter(layer)).copy_(absmax.clamp_min(MIN_ABSMAX).log2())


def quantize(layers: list[Any], layout: Layout, kind: Kind, dtype: torch.dtype) -> Tensors:
    """Fake-quantized weights in `dtype`, differentiable in the weights and in the layers' scale parameters."""
    weights = [layer.weight for layer in layers]
    steps, scales = _steps_and_scales(layers, layout, kind)
    node = _Together if weights[0].is_cuda else _EachInTurn
    return cast(Tensors, node.apply(layout, kind == "decoupled", dtype, steps, scales, *weights))


def _steps_and_scales(layers: list[Any], layout: Layout, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and scales, each [n_rows]: one number a channel, or a layer if the scales are decoupled.

    LSQ's are the same tensor, so autograd adds the gradients of both uses.
    """
    if kind == "lsq" and layout.table.is_cuda:
        scalings = [layer.weight_quant.tensor_quant.scaling_impl for layer in layers]
        values = torch.cat([scaling.value.flatten() for scaling in scalings])
        scales = scalings[0].restrict_clamp_scaling(values) / layout.largest
        return scales, scales
    # On a CPU the last bit of 2**v depends on v's position in its tensor, so there it is computed layer by layer.
    step_limits, scale_limits = zip(*(limits(layer, kind) for layer in layers), strict=True)
    scales = torch.cat([limit.flatten() for limit in scale_limits]) / layout.largest
    if kind == "lsq":
        return scales, scales
    return torch.stack(step_limits) / layout.largest, scales


def limits(layer: QuantConv2d, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and scale times the largest code: each [out_channels,1,1,1], or [] where it is per tensor."""
    scaling = cast(Any, layer.weight_quant).tensor_quant.scaling_impl
    if kind == "lsq":
        limit = scaling.restrict_clamp_scaling(scaling.value)
        return limit, limit
    absmax, _ = layer.weight.abs().flatten(1).max(1)  # not amax, which spreads the gradient over equal maxima
    return absmax.norm() / math.sqrt(len(absmax)), scaling.value.abs()


class _Layer(NamedTuple):
    """One layer's tensors: its weight, and [n_rows,1,1,1] its steps, scales and largest codes."""

    weight: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor
    largest: torch.Tensor


def _layers(
    layout: Layout, steps: torch.Tensor, scales: torch.Tensor, weights: Sequence[torch.Tensor]
) -> Iterator[_Layer]:
    """The layers' tensors, cut from `steps` and `scales` [n_rows]."""
    rows = (_split(numbers, layout) for numbers in (steps, scales, layout.largest))
    for tensors in zip(weights, *rows, strict=True):
        yield _Layer(*tensors)


def _split(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """One number a row -> a view [n_rows,1,1,1] a layer."""
    return [part.view(-1, 1, 1, 1) for part in rows.split(layout.rows_per_weight)]


class _EachInTurn(torch.autograd.Function):
    """One autograd node that computes layer after layer, for the CPU."""

    @staticmethod
    def forward(  # noqa: PLR0913 - one argument a tensor
        ctx: Any, layout: Layout, passes_clamp: bool, dtype: torch.dtype, steps: torch.Tensor, scales: torch.Tensor,
        *weights: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.passes_clamp = layout, passes_clamp
        ctx.save_for_backward(steps, scales, *weights)
        quantized = []
        for weight, step, scale, largest in _layers(layout, steps, scales, weights):
            codes = _clamp((weight / step).round_(), largest)
            quantized.append(codes.mul_(scale).to(dtype))
        return tuple(quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        steps, scales, *weights = ctx.saved_tensors
        step_grads, scale_grads = torch.zeros_like(steps), torch.zeros_like(scales)
        step_views, scale_views = _split(step_grads, ctx.layout), _split(scale_grads, ctx.layout)
        weight_grads: list[torch.Tensor | None] = [None] * len(weights)
        for index, layer in enumerate(_layers(ctx.layout, steps, scales, weights)):
            grad = grads[index]
            if grad is not None:
                weight_grad, step_grad, scale_grad = _gradients(grad.float(), layer, ctx.passes_clamp)
                weight_grads[index] = weight_grad
                step_views[index].copy_(step_grad)
                scale_views[index].copy_(scale_grad)
        return None, None, None, step_grads, scale_grads, *weight_grads


def _clamp(rounded: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return rounded.clamp_(-largest, largest)  # NaN stays NaN


def _gradients(
    grad: torch.Tensor, layer: _Layer, passes_clamp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a layer's weight, steps and scales; the formulas are at the top of the file.

    With `passes_clamp` a clamped weight gets the gradient too, as Brevitas' TensorClampSte gives it.
    """
    weight, step, scale, largest = layer
    ratio = weight / step
    rounded = ratio.round()
    ratio_grad = grad * scale
    if not passes_clamp:
        ratio_grad.masked_fill_(rounded.abs() > largest, 0.0)
    # Sums over the shapes that autograd sums over, because the order of additions decides the last bit.
    step_grad = -(ratio_grad * (ratio / step)).sum_to_size(step.shape)
    scale_grad = (grad * _clamp(rounded, largest)).sum_to_size(scale.shape)
    return ratio_grad.div_(step), step_grad, scale_grad


class _Together(torch.autograd.Function):
    """One autograd node with one kernel for all layers, for the GPU."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, layout: Layout, passes_clamp: bool, dtype: torch.dtype, steps: torch.Tensor, scales: torch.Tensor,
        *weights: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.passes_clamp = layout, passes_clamp
        flat = layout.join(list(weights))
        ctx.save_for_backward(flat, steps, scales)
        out = torch.empty_like(flat, dtype=dtype)
        with torch.cuda.device_of(flat):  # Triton launches on the current device
            _quantize_kernel[(len(scales),)](flat, layout.table, steps, scales, out, **layout.launch)
        return tuple(layout.split(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        layout: Layout = ctx.layout
        flat, steps, scales = ctx.saved_tensors
        upstream, flat_grads = layout.join_grads(grads), torch.empty_like(flat)
        step_grads, scale_grads = torch.empty_like(steps), torch.empty_like(scales)
        pointers = (upstream, flat, layout.table, steps, scales, flat_grads, step_grads, scale_grads)
        with torch.cuda.device_of(flat):
            _gradient_kernel[(len(scales),)](*pointers, PASSES_CLAMP=ctx.passes_clamp, **layout.launch)
        return None, None, None, step_grads, scale_grads, *layout.split_grads(flat_grads, grads)


@jit
def _rounded(ratio, largest):
    # The nearest integer, but at most one beyond the largest code: to_code rounds only small numbers. NaN stays NaN.
    ratio = tl.where(ratio > largest + 1, largest + 1, ratio)
    return to_code(tl.where(ratio < -largest - 1, -largest - 1, ratio), 1.0)


@jit
def _clamped(rounded, largest):
    return tl.where(rounded > largest, largest, tl.where(rounded < -largest, -largest, rounded))


@jit
def _quantize_kernel(flat, table, steps, scales, out, BLOCK: tl.constexpr):  # noqa: PLR0913
    row = tl.program_id(0)
    start, length, _n_inner, _stride, largest, _per_tensor, _lowest = load_row(table, row)
    step = tl.load(steps + row)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        code = _clamped(_rounded(tl.math.div_rn(weight, step), largest), largest)
        tl.store(out + start + i + lanes, (code * scale).to(out.dtype.element_ty), mask=mask)
        i += BLOCK


@jit
def _gradient_kernel(  # noqa: PLR0913
    grads, flat, table, steps, scales, out, step_grads, scale_grads, PASSES_CLAMP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start, length, _n_inner, _stride, largest, _per_tensor, _lowest = load_row(table, row)
    step = tl.load(steps + row)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    step_grad = tl.zeros([BLOCK], tl.float32)
    scale_grad = tl.zeros([BLOCK], tl.float32)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        grad = tl.load(grads + start + i + lanes, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.math.div_rn(weight, step)
        rounded = _rounded(ratio, largest)
        ratio_grad = grad * scale
        if not PASSES_CLAMP:
            ratio_grad = tl.where(tl.abs(rounded) > largest, 0.0, ratio_grad)
        step_grad -= ratio_grad * tl.math.div_rn(ratio, step)
        scale_grad += grad * _clamped(rounded, largest)
        tl.store(out + start + i + lanes, tl.math.div_rn(ratio_grad, step), mask=mask)
        i += BLOCK
    tl.store(step_grads + row, tl.sum(step_grad, axis=0))
    tl.store(scale_grads + row, tl.sum(scale_grad, axis=0))
