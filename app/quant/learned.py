"""Learned scales (LSQ): where they lie in Brevitas' modules, and the fast path of weights that have them.

What is computed for a weight w and its channel's parameter v, with Brevitas' order of operations (0.13.4):
    scale = max(2**v, 1e-10) / largest      in autograd, all channels of the model at once
    q     = clamp(round(w / scale), -largest, largest) * scale
Backward, with g the gradient of q, straight through the rounding and 0 where the clamp acts:
    of_ratio = g * scale, 0 where |round(w / scale)| > largest
    grad     = of_ratio / scale
    of_scale = sum(g * code) - sum(of_ratio * ((w / scale) / scale))
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from brevitas.core.scaling import ParameterScaling
from brevitas.nn import QuantConv2d
from torch import nn
from torch.autograd.function import once_differentiable

from app.quant.kernels import MIN_ABSMAX, Layout, _code

Tensors = tuple[torch.Tensor, ...]


def scale_parameter(layer: QuantConv2d) -> nn.Parameter | None:
    """log2 of the largest weight that is not clipped, [out_channels,1,1,1]; None where the scale is not learned."""
    scaling = cast(Any, layer.weight_quant).tensor_quant.scaling_impl
    return scaling.value if isinstance(scaling, ParameterScaling) else None


def learned_layers(model: nn.Module) -> dict[str, QuantConv2d]:
    """The layers with a learned scale, by name."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantConv2d))
    return {name: layer for name, layer in layers if scale_parameter(layer) is not None}


@torch.no_grad()
def reset_scales(model: nn.Module) -> None:
    """Sets every learned scale to what the abs-max quantizer would use."""
    for layer in learned_layers(model).values():
        absmax = layer.weight.abs().amax((1, 2, 3), keepdim=True)
        cast(nn.Parameter, scale_parameter(layer)).copy_(absmax.clamp_min(MIN_ABSMAX).log2())


def quantize(layers: list[Any], layout: Layout, dtype: torch.dtype, weights: list[torch.Tensor]) -> Tensors:
    """Fake-quantized weights in `dtype`, with gradients for the weights and the layers' scale parameters."""
    values = [cast(nn.Parameter, scale_parameter(layer)) for layer in layers]
    restrict = layers[0].weight_quant.tensor_quant.scaling_impl.restrict_clamp_scaling
    if weights[0].is_cuda:
        node, limits = _Together, restrict(torch.cat([value.flatten() for value in values]))
    else:  # a CPU's last bit of 2**v depends on where v lies in its tensor
        node, limits = _EachInTurn, torch.cat([restrict(value).flatten() for value in values])
    return cast(Tensors, node.apply(layout, dtype, limits / layout.largest, *weights))


class _EachInTurn(torch.autograd.Function):
    """One autograd node, layer after layer, for the CPU."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, dtype: torch.dtype, scales: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        ctx.save_for_backward(scales, *weights)
        layers = zip(weights, _split(scales, layout), _split(layout.largest, layout), strict=True)
        return tuple(_clamp((weight / scale).round_(), most).mul_(scale).to(dtype) for weight, scale, most in layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        scales, *weights = ctx.saved_tensors
        of_scales = torch.zeros_like(scales)
        parts = zip(weights, *(_split(rows, ctx.layout) for rows in (scales, ctx.layout.largest)), strict=True)
        rows = _split(of_scales, ctx.layout)
        return None, None, of_scales, *(map(_gradient, grads, parts, rows))


def _split(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """One number a channel -> a view [out_channels,1,1,1] a layer."""
    return [part.view(-1, 1, 1, 1) for part in rows.split([shape[0] for shape in layout.shapes])]


def _clamp(rounded: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    return rounded.clamp_(-most, most)  # NaN stays NaN


def _gradient(grad: torch.Tensor | None, layer: Tensors, of_scale: torch.Tensor) -> torch.Tensor | None:
    """Gradient of one weight; that of its scales is written to `of_scale`."""
    if grad is None:
        return None
    weight, scale, most = layer
    grad, ratio = grad.float(), weight / scale
    rounded = ratio.round()
    of_ratio = (grad * scale).masked_fill_(rounded.abs() > most, 0.0)
    # Two sums of the shapes autograd sums, because the order of additions decides the last bit.
    through_range = (of_ratio * (ratio / scale)).sum_to_size(scale.shape)
    of_scale.copy_((grad * _clamp(rounded, most)).sum_to_size(scale.shape) - through_range)
    return of_ratio.div_(scale)


class _Together(torch.autograd.Function):
    """One autograd node, all layers in one kernel, for the GPU."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, dtype: torch.dtype, scales: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        flat = layout.join(list(weights))
        ctx.save_for_backward(flat, scales)
        out = torch.empty_like(flat, dtype=dtype)
        with torch.cuda.device_of(flat):  # Triton launches on the current device
            _quantize_kernel[(len(scales),)](flat, layout.table, scales, out, **cast(Any, layout.launch))
        return tuple(layout.split(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        layout: Layout = ctx.layout
        flat, scales = ctx.saved_tensors
        upstream, out, of_scales = layout.join_grads(grads), torch.empty_like(flat), torch.empty_like(scales)
        args = (upstream, flat, layout.table, scales, out, of_scales)
        with torch.cuda.device_of(flat):
            _gradient_kernel[(len(scales),)](*args, **cast(Any, layout.launch))
        of_weights = (None if g is None else part for g, part in zip(grads, layout.split(out), strict=True))
        return None, None, of_scales, *of_weights


@triton.jit
def _rounded(ratio, most):
    # The nearest integer, or one beyond the last code: _code rounds only small numbers. NaN stays NaN.
    ratio = tl.where(ratio > most + 1, most + 1, ratio)
    return _code(tl.where(ratio < -most - 1, -most - 1, ratio), 1.0)


@triton.jit
def _clamped(rounded, most):
    return tl.where(rounded > most, most, tl.where(rounded < -most, -most, rounded))


@triton.jit
def _quantize_kernel(flat, table, scales, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = tl.load(table + row * 6)
    length = tl.load(table + row * 6 + 1)
    most = tl.load(table + row * 6 + 4).to(tl.float32)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        code = _clamped(_rounded(tl.math.div_rn(weight, scale), most), most)
        tl.store(out + start + i + lanes, (code * scale).to(out.dtype.element_ty), mask=mask)
        i += BLOCK


@triton.jit
def _gradient_kernel(grads, flat, table, scales, out, of_scales, BLOCK: tl.constexpr):  # noqa: PLR0913
    row = tl.program_id(0)
    start = tl.load(table + row * 6)
    length = tl.load(table + row * 6 + 1)
    most = tl.load(table + row * 6 + 4).to(tl.float32)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    of_scale = tl.zeros([BLOCK], tl.float32)
    i = 0
    while i < length:
        mask = i + lanes < length
        weight = tl.load(flat + start + i + lanes, mask=mask, other=0.0)
        grad = tl.load(grads + start + i + lanes, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.math.div_rn(weight, scale)
        rounded = _rounded(ratio, most)
        of_ratio = tl.where(tl.abs(rounded) > most, 0.0, grad * scale)
        of_scale += grad * _clamped(rounded, most) - of_ratio * tl.math.div_rn(ratio, scale)
        tl.store(out + start + i + lanes, tl.math.div_rn(of_ratio, scale), mask=mask)
        i += BLOCK
    tl.store(of_scales + row, tl.sum(of_scale, axis=0))
