"""The training fast path: all fake-quantized weights of a model in one autograd node, bit-equal to Brevitas.

Brevitas' modules remain the definition and do the export. In the forward of a model with the fast path attached, all
layers' fake-quantized weights are computed together before the first layer runs; in any other forward each layer
quantizes its own weight, as in Brevitas.

Forward for a weight w, with Brevitas' order of operations (0.13.4):
    absmax = max |w|                        over an output channel, or over the tensor
    scale  = max(absmax, 1e-10) / -lowest   lowest code: -7 at 4 bits and -127 at 8, in a full range -8 and -128
    code   = min(round(w / scale), largest) halves to even; only in a full range is anything clipped, to 7 or 127
    q      = code * scale
Backward, with g the gradient of q and the straight-through estimator for the rounding:
    scale_grad = sum(g * code) - sum(g * scale * ((w / scale) / scale))
    grad       = g * scale / scale, plus sign(w) * scale_grad / -lowest where |w| is the absmax: at the first such
                 element of a channel (torch.max over a dim), in equal shares if the scale is per tensor (torch.max over
                 all)
A clipped weight gets its gradient too, as Brevitas' TensorClampSte gives it. max(absmax, 1e-10) passes the gradient on
in both cases, as Brevitas' clamp does. A channel of zeros gives zeros. A channel with an infinite or NaN weight gives
NaN, as in Brevitas, so the loss shows it at once. For trained scales see app/quant/learned.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from brevitas.core.function_wrapper import RoundSte, TensorClampSte
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.quant.int import DecoupledRescalingIntQuant
from brevitas.core.restrict_val import FloatRestrictValue, LogFloatRestrictValue
from brevitas.core.scaling import (
    ParameterFromStatsFromParameterScaling,
    ParameterScaling,
    StatsFromParameterScaling,
)
from brevitas.core.stats import AbsMax, AbsMaxL2
from brevitas.nn import QuantConv2d
from torch import nn
from torch.autograd.function import once_differentiable

from app.core.config import UserError
from app.quant import kernels, learned
from app.quant.kernels import Kind, Layout, Spec

Tensors = tuple[torch.Tensor, ...]
# The hooks run eagerly between the graphs of torch.compile; a compiled layer gets its weight as an input.
_not_compiled: Any = torch.compiler.disable


class FastQuantConv2d(QuantConv2d):
    """QuantConv2d that takes its weight from the fast path during a forward of the model with the fast path.

    Without such a model around it, in export, or with its quantizer disabled it works like QuantConv2d. Its state_dict
    has the same keys.
    """

    _fast_weight: torch.Tensor | None = None

    def forward(self, input: Any) -> Any:
        weight, quantizer = self._fast_weight, cast(Any, self.weight_quant)
        if weight is None or self.export_mode or quantizer.disable_quant:
            return super().forward(input)
        return self.inner_forward_impl(input, weight, self.bias)


def attach(model: nn.Module) -> None:
    """Makes every forward of `model` compute the weights of its FastQuantConv2d layers together.

    Call it again after layers were replaced or their bits changed. A deepcopy of the model gets its own fast path.

    Raises:
        UserError: the fast path does not support a layer's quantizer.
    """
    detach(model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FastQuantConv2d) and cast(Any, layer.weight_quant).is_quant_enabled
    }
    if layers:
        # In the module's __dict__, so that deepcopy copies it; Ultralytics' EMA does not copy names with an underscore.
        vars(model)["_fast_path"] = FastPath(model, layers)


def detach(model: nn.Module) -> None:
    """Removes the fast path, so that every layer quantizes its own weight again."""
    if "_fast_path" in vars(model):
        vars(model).pop("_fast_path").remove()


class FastPath:
    """The layers of one model and the hooks around its forward."""

    def __init__(self, model: nn.Module, layers: dict[str, FastQuantConv2d]) -> None:
        self.layers = list(layers.values())
        self.specs = [_spec(name, layer) for name, layer in layers.items()]
        if len({spec.kind for spec in self.specs}) > 1:
            raise UserError("the layers' scales are made in different ways; set quant.fast_path=false")
        self.kind: Kind = self.specs[0].kind
        self.layout: Layout | None = None
        self.handles = (
            model.register_forward_pre_hook(self.compute),
            model.register_forward_hook(self.clear, always_call=True),
        )

    @_not_compiled
    def compute(self, model: nn.Module, args: Any) -> None:
        """Gives every layer its fake-quantized weight, in the dtype that autocast would cast it to."""
        weights = [layer.weight for layer in self.layers]
        if weights[0].dtype != torch.float32 or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return  # in a model of another dtype and in a trace the layers quantize their own weights
        device_type = weights[0].device.type
        dtype = torch.float32
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        for layer, weight in zip(self.layers, self.quantize(weights, dtype), strict=True):
            vars(layer)["_fast_weight"] = weight  # nn.Module.__setattr__ would cost 2 us a layer

    def quantize(self, weights: list[torch.Tensor], dtype: torch.dtype) -> Tensors:
        """The fake-quantized weights of all layers in `dtype`, in one autograd node."""
        if self.kind != "abs-max":
            return learned.quantize(self.layers, self.layout_of(weights), self.kind, dtype)
        if weights[0].is_cuda:
            return cast(Tensors, _Together.apply(self.layout_of(weights), dtype, *weights))
        return cast(Tensors, _EachInTurn.apply(self.specs, dtype, *weights))

    @_not_compiled
    def clear(self, model: nn.Module, args: Any, output: Any) -> None:
        """Drops the fake-quantized weights, so that no layer uses one after the optimizer has changed its weight."""
        for layer in self.layers:
            vars(layer).pop("_fast_weight", None)

    def layout_of(self, weights: list[torch.Tensor]) -> Layout:
        """The layout of these weights, rebuilt when their device or memory format has changed."""
        if self.layout is None or not self.layout.fits(weights):
            self.layout = Layout(weights, self.specs)
        return self.layout

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _spec(name: str, layer: FastQuantConv2d) -> Spec:
    """What the layer's Brevitas quantizer computes.

    Raises:
        UserError: the fast path does not support it.
    """
    for other in cast(Any, [layer.input_quant, layer.output_quant, layer.bias_quant]):
        if other.is_quant_enabled:
            raise UserError(f"layer {name}: quantized activations need quant.fast_path=false")
    quant = cast(Any, layer.weight_quant).tensor_quant
    kind: Kind
    int_quant: Any
    if isinstance(quant, DecoupledRescalingIntQuant):
        kind, int_quant = "decoupled", quant.decoupled_int_quant
        scale_shape = _decoupled_shape(quant)
    elif isinstance(quant, RescalingIntQuant) and isinstance(quant.scaling_impl, ParameterScaling):
        kind, int_quant = "lsq", quant.int_quant
        scale_shape = _lsq_shape(quant.scaling_impl)
    elif isinstance(quant, RescalingIntQuant):
        kind, int_quant = "abs-max", quant.int_quant
        scale_shape = _absmax_shape(quant.scaling_impl)
    else:
        raise UserError(f"layer {name}: not a quantizer that the fast path computes; set quant.fast_path=false")
    per_tensor = scale_shape == () and kind != "lsq"
    per_channel = scale_shape == (layer.out_channels, 1, 1, 1)
    rounds = isinstance(int_quant.float_to_int_impl, RoundSte)
    passes_clamp = isinstance(int_quant.tensor_clamp_impl, TensorClampSte)
    fits_range = int_quant.narrow_range or (kind == "abs-max" and passes_clamp)
    if not (rounds and int_quant.signed and fits_range and (per_tensor or per_channel)):
        raise UserError(f"layer {name}: not a symmetric abs-max or trained scale; set quant.fast_path=false")
    largest = int(int_quant.max_int(quant.msb_clamp_bit_width_impl()))
    return Spec(largest, per_tensor, kind, int_quant.narrow_range)


# The shape of a quantizer's scale; None if the scale is not computed as the function that returns the shape says.
Shape = tuple[int, ...] | None


def _decoupled_shape(quant: Any) -> Shape:
    """Codes come from the L2 mean of the channels' abs-max, and their scale is one trained number for the layer."""
    step, scale = quant.pre_scaling_impl, quant.scaling_impl
    is_decoupled = (
        isinstance(step, StatsFromParameterScaling)
        and isinstance(step.parameter_list_stats.stats.stats_impl, AbsMaxL2)
        and isinstance(scale, ParameterFromStatsFromParameterScaling)
        and _is_absolute(step.stats_scaling_impl)
        and _is_absolute(scale.stats_scaling_impl)
        and isinstance(quant.decoupled_int_quant.tensor_clamp_impl, TensorClampSte)
        and scale.value.shape == ()
    )
    return () if is_decoupled else None


def _is_absolute(stats_scaling: Any) -> bool:
    """Whether it returns the absolute value of its input without a lower bound."""
    is_float = isinstance(stats_scaling.restrict_clamp_scaling.restrict_value_impl, FloatRestrictValue)
    return is_float and stats_scaling.clamp_scaling.min_val is None


def _absmax_shape(scaling: Any) -> Shape:
    """The scale is max |w|, at least MIN_ABSMAX."""
    if not isinstance(scaling, StatsFromParameterScaling):
        return None
    stats, stats_scaling = scaling.parameter_list_stats.stats, scaling.stats_scaling_impl
    is_absmax = (
        isinstance(stats.stats_impl, AbsMax)
        and isinstance(stats_scaling.restrict_clamp_scaling.restrict_value_impl, FloatRestrictValue)
        and stats_scaling.clamp_scaling.min_val == kernels.MIN_ABSMAX
    )
    return tuple(stats.stats_output_shape) if is_absmax else None


def _lsq_shape(scaling: Any) -> Shape:
    """The scale is 2**value, over the largest code as it is."""
    in_log = isinstance(scaling.restrict_clamp_scaling.restrict_value_impl, LogFloatRestrictValue)
    plain = isinstance(scaling.restrict_clamp_threshold.restrict_value_impl, FloatRestrictValue)
    return tuple(scaling.value.shape) if in_log and plain else None


class _Parts(NamedTuple):
    """What the backward of one weight needs."""

    scale: torch.Tensor  # [out_channels,1,1,1], or [] per tensor
    where: torch.Tensor  # position of the absmax, as _scale returns it
    ratio: torch.Tensor  # weight / scale
    codes: torch.Tensor  # the ratio, rounded and clipped


class _EachInTurn(torch.autograd.Function):
    """One autograd node that computes layer after layer, for the CPU: a layer's tensors stay in the cache."""

    @staticmethod
    def forward(ctx: Any, specs: list[Spec], dtype: torch.dtype, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.specs = specs
        saved: list[torch.Tensor] = []
        quantized = []
        for weight, spec in zip(weights, specs, strict=True):
            scale, where = _scale(weight, spec)
            ratio = weight / scale
            codes = ratio.round().clamp_max_(spec.largest)
            saved += _Parts(scale, where, ratio, codes)
            quantized.append((codes * scale).to(dtype))
        ctx.save_for_backward(*saved)
        return tuple(quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved, n_parts = ctx.saved_tensors, len(_Parts._fields)
        weight_grads = []
        for index, (grad, spec) in enumerate(zip(grads, ctx.specs, strict=True)):
            parts = _Parts(*saved[index * n_parts : (index + 1) * n_parts])
            weight_grads.append(None if grad is None else _gradient(grad.float(), parts, spec))
        return None, None, *weight_grads


def codes_of(layer: QuantConv2d, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's codes, as floats shaped like the weight, and their scale: [out_channels,1,1,1], or [] per tensor."""
    if spec.kind == "abs-max":
        scale, _ = _scale(layer.weight, spec)
        step = scale
    else:
        step_limit, scale_limit = learned.limits(layer, spec.kind)
        step, scale = step_limit / spec.largest, scale_limit / spec.largest
    codes = (layer.weight / step).round_().clamp_(spec.lowest, spec.largest)
    return codes, scale


def _scale(weight: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale, and where the absmax is.

    Per channel that is the index of its first element [out_channels,1], from torch.max as in Brevitas; per tensor it is
    a mask, shaped like the weight, of all elements that are the absmax.
    """
    sizes = weight.abs()
    if spec.per_tensor:
        absmax = sizes.amax()
        where = sizes == absmax
    else:
        absmax, where = sizes.flatten(1).max(1, keepdim=True)
        absmax = absmax.view(-1, 1, 1, 1)
    return absmax.clamp_min(kernels.MIN_ABSMAX) / -spec.lowest, where


def _gradient(grad: torch.Tensor, parts: _Parts, spec: Spec) -> torch.Tensor:
    """Gradient of one weight from `grad`, that of its fake-quantized weight, by the formulas at the top of the file."""
    scale, where, ratio, codes = parts
    codes_grad = grad * scale
    # Two sums over the shapes that autograd sums over, because the order of additions decides the last bit.
    from_codes = (grad * codes).sum_to_size(scale.shape)
    from_ratio = (ratio / scale * codes_grad).sum_to_size(scale.shape)
    absmax_grad = (from_codes - from_ratio) / -spec.lowest
    weight_grad = codes_grad.div_(scale)
    if spec.per_tensor:
        return weight_grad.add_(where * (absmax_grad / where.sum()) * ratio.sign())
    weight_grad = weight_grad.contiguous()  # the indices of scatter_add_ count in logical order
    sign = ratio.flatten(1).gather(1, where).sign()
    weight_grad.view(len(weight_grad), -1).scatter_add_(1, where, absmax_grad.view(-1, 1) * sign)
    return weight_grad


class _Together(torch.autograd.Function):
    """One autograd node with one kernel for all layers, for the GPU: small kernels cost mostly their launch."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, dtype: torch.dtype, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        flat = layout.join(list(weights))
        out, absmax, pick = kernels.quantize(flat, layout, dtype)
        ctx.save_for_backward(flat, absmax, pick)
        return tuple(layout.split(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        layout: Layout = ctx.layout
        flat, absmax, pick = ctx.saved_tensors
        flat_grads = kernels.gradient(layout.join_grads(grads), flat, layout, absmax, pick)
        return None, None, *layout.split_grads(flat_grads, grads)
