"""Trained scales: where LSQ's lie in Brevitas' modules, and the fast path of weights that have trained ones.

What is computed for a weight w and its parameter v, with Brevitas' order of operations (0.13.4):
    q = clamp(round(w / step), -largest, largest) * scale
    LSQ, one v a channel:       step = scale = max(2**v, 1e-10) / largest
    decoupled, one v a layer:   step = |(max |w| of each channel)|_2 / sqrt(channels) / largest, scale = |v| / largest
The scales are made in autograd, those of all layers at once. Backward of the rest, with g the gradient of q, straight
through the rounding:
    of_ratio = g * scale                    LSQ: 0 where |round(w / step)| > largest
    grad     = of_ratio / step
    of_scale = sum(g * code)
    of_step  = -sum(of_ratio * ((w / step) / step))
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from brevitas.core.scaling import ParameterScaling
from brevitas.nn import QuantConv2d
from torch import nn
from torch.autograd.function import once_differentiable

from app.quant.kernels import MIN_ABSMAX, Kind, Layout, _code

Tensors = tuple[torch.Tensor, ...]


def scale_parameter(layer: QuantConv2d) -> nn.Parameter | None:
    """log2 of the largest weight that is not clipped, [out_channels,1,1,1]; None where the scale is not LSQ's."""
    scaling = cast(Any, layer.weight_quant).tensor_quant.scaling_impl
    return scaling.value if isinstance(scaling, ParameterScaling) else None


def learned_layers(model: nn.Module) -> dict[str, QuantConv2d]:
    """The layers with an LSQ scale, by name."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantConv2d))
    return {name: layer for name, layer in layers if scale_parameter(layer) is not None}


@torch.no_grad()
def reset_scales(model: nn.Module) -> None:
    """Sets every LSQ scale to what the abs-max quantizer would use."""
    for layer in learned_layers(model).values():
        absmax = layer.weight.abs().amax((1, 2, 3), keepdim=True)
        cast(nn.Parameter, scale_parameter(layer)).copy_(absmax.clamp_min(MIN_ABSMAX).log2())


def quantize(layers: list[Any], layout: Layout, kind: Kind, dtype: torch.dtype) -> Tensors:
    """Fake-quantized weights in `dtype`, with gradients for the weights and the layers' scale parameters."""
    weights = [layer.weight for layer in layers]
    steps, scales = _steps_and_scales(layers, layout, kind)
    node = _Together if weights[0].is_cuda else _EachInTurn
    return cast(Tensors, node.apply(layout, kind == "decoupled", dtype, steps, scales, *weights))


def _steps_and_scales(layers: list[Any], layout: Layout, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [n_rows], a row being a channel or, decoupled, a layer; the same tensor for LSQ, whose gradients add up."""
    if kind == "lsq" and layout.table.is_cuda:
        scalings = [layer.weight_quant.tensor_quant.scaling_impl for layer in layers]
        scales = scalings[0].restrict_clamp_scaling(torch.cat([scaling.value.flatten() for scaling in scalings]))
        scales = scales / layout.largest
        return scales, scales
    # A CPU's last bit of 2**v depends on where v lies in its tensor, so there they are made layer by layer.
    pairs = [limits(layer, kind) for layer in layers]
    scales = torch.cat([scale.flatten() for _, scale in pairs]) / layout.largest
    return scales if kind == "lsq" else torch.stack([step for step, _ in pairs]) / layout.largest, scales


def limits(layer: QuantConv2d, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step and the scale are times the largest code: each [out_channels,1,1,1], or [] where it is per tensor."""
    scaling = cast(Any, layer.weight_quant).tensor_quant.scaling_impl
    if kind == "lsq":
        limit = scaling.restrict_clamp_scaling(scaling.value)
        return limit, limit
    absmax = layer.weight.abs().flatten(1).max(1)[0]  # max over a dim, which gives one of two equal maxima the gradient
    return absmax.norm() / math.sqrt(len(absmax)), scaling.value.abs()


class _EachInTurn(torch.autograd.Function):
    """One autograd node, layer after layer, for the CPU."""

    @staticmethod
    def forward(  # noqa: PLR0913 - one argument a tensor
        ctx: Any, layout: Layout, passes_clamp: bool, dtype: torch.dtype, steps: torch.Tensor, scales: torch.Tensor,
        *weights: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.passes_clamp = layout, passes_clamp
        ctx.save_for_backward(steps, scales, *weights)
        layers = zip(weights, *(_split(rows, layout) for rows in (steps, scales, layout.largest)), strict=True)
        return tuple(_clamp((w / step).round_(), most).mul_(scale).to(dtype) for w, step, scale, most in layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        steps, scales, *weights = ctx.saved_tensors
        of_steps, of_scales = torch.zeros_like(steps), torch.zeros_like(scales)
        rows = (_split(rows, ctx.layout) for rows in (steps, scales, ctx.layout.largest, of_steps, of_scales))
        parts = zip(grads, weights, *rows, strict=True)
        of_weights = (_gradient(grad, ctx.passes_clamp, *part) for grad, *part in parts)
        return None, None, None, of_steps, of_scales, *of_weights


def _split(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """One number a row -> a view [n_rows,1,1,1] a layer."""
    return [part.view(-1, 1, 1, 1) for part in rows.split(layout.rows_of)]


def _clamp(rounded: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    return rounded.clamp_(-most, most)  # NaN stays NaN


def _gradient(  # noqa: PLR0913 - one argument a tensor
    grad: torch.Tensor | None, passes_clamp: bool, weight: torch.Tensor, step: torch.Tensor, scale: torch.Tensor,
    most: torch.Tensor, of_step: torch.Tensor, of_scale: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """Gradient of one weight; those of its steps and scales are written to `of_step` and `of_scale`."""
    if grad is None:
        return None
    grad, ratio = grad.float(), weight / step
    rounded = ratio.round()
    of_ratio = grad * scale
    if not passes_clamp:
        of_ratio.masked_fill_(rounded.abs() > most, 0.0)
    # Sums of the shapes autograd sums, because the order of additions decides the last bit.
    of_step.copy_(-(of_ratio * (ratio / step)).sum_to_size(step.shape))
    of_scale.copy_((grad * _clamp(rounded, most)).sum_to_size(scale.shape))
    return of_ratio.div_(step)


class _Together(torch.autograd.Function):
    """One autograd node, all layers in one kernel, for the GPU."""

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
            _quantize_kernel[(len(scales),)](flat, layout.table, steps, scales, out, **cast(Any, layout.launch))
        return tuple(layout.split(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        layout: Layout = ctx.layout
        flat, steps, scales = ctx.saved_tensors
        upstream, out = layout.join_grads(grads), torch.empty_like(flat)
        of_steps, of_scales = torch.empty_like(steps), torch.empty_like(scales)
        args = (upstream, flat, layout.table, steps, scales, out, of_steps, of_scales)
        with torch.cuda.device_of(flat):
            _gradient_kernel[(len(scales),)](*args, PASSES_CLAMP=ctx.passes_clamp, **cast(Any, layout.launch))
        of_weights = (None if g is None else part for g, part in zip(grads, layout.split(out), strict=True))
        return None, None, None, of_steps, of_scales, *of_weights


@triton.jit
def _rounded(ratio, most):
    # The nearest integer, or one beyond the last code: _code rounds only small numbers. NaN stays NaN.
    ratio = tl.where(ratio > most + 1, most + 1, ratio)
    return _code(tl.where(ratio < -most - 1, -most - 1, ratio), 1.0)


@triton.jit
def _clamped(rounded, most):
    return tl.where(rounded > most, most, tl.where(rounded < -most, -most, rounded))


@triton.jit
def _quantize_kernel(flat, table, steps, scales, out, BLOCK: tl.constexpr):  # noqa: PLR0913
    row = tl.program_id(0)
    start = tl.load(table + row * 6)
    length = tl.load(table + row * 6 + 1)
    most = tl.load(table + row * 6 + 4).to(tl.float32)
    step = tl.load(steps + row)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        code = _clamped(_rounded(tl.math.div_rn(weight, step), most), most)
        tl.store(out + start + i + lanes, (code * scale).to(out.dtype.element_ty), mask=mask)
        i += BLOCK


@triton.jit
def _gradient_kernel(  # noqa: PLR0913
    grads, flat, table, steps, scales, out, of_steps, of_scales, PASSES_CLAMP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.load(table + row * 6)
    length = tl.load(table + row * 6 + 1)
    most = tl.load(table + row * 6 + 4).to(tl.float32)
    step = tl.load(steps + row)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    of_step = tl.zeros([BLOCK], tl.float32)
    of_scale = tl.zeros([BLOCK], tl.float32)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        grad = tl.load(grads + start + i + lanes, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.math.div_rn(weight, step)
        rounded = _rounded(ratio, most)
        of_ratio = grad * scale
        if not PASSES_CLAMP:
            of_ratio = tl.where(tl.abs(rounded) > most, 0.0, of_ratio)
        of_step -= of_ratio * tl.math.div_rn(ratio, step)
        of_scale += grad * _clamped(rounded, most)
        tl.store(out + start + i + lanes, tl.math.div_rn(of_ratio, step), mask=mask)
        i += BLOCK
    tl.store(of_steps + row, tl.sum(of_step, axis=0))
    tl.store(of_scales + row, tl.sum(of_scale, axis=0))
