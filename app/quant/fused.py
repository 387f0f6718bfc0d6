"""The training fast path: all fake-quantized weights of a model in one autograd node, bit-equal to Brevitas.

Brevitas' modules stay the definition and the exporter; they are what a layer does by itself. While a model with the
fast path attached runs forward, its layers use weights that were computed together when the forward began.

What is computed for a weight w, with Brevitas' order of operations (0.13.4):
    absmax = max |w|                        over an output channel, or over the tensor
    scale  = max(absmax, 1e-10) / largest   largest code: 7 at 4 bits, 127 at 8
    q      = round(w / scale) * scale       halves to even; Brevitas' clamp cannot act, |w| / scale rounds to <= largest
Backward, with g the gradient of q and the straight-through estimator for the rounding:
    of_scale = sum(g * round(w / scale)) - sum(g * scale * ((w / scale) / scale))
    grad     = g * scale / scale, plus sign(w) * of_scale / largest where |w| is the absmax: at the first such element
               of a channel (torch.max over a dim), in equal shares where the scale is per tensor (torch.max over all)
The 1e-10 passes the gradient on, as Brevitas' clamp does. A channel of zeros gives zeros. A channel with an infinite or
NaN weight gives NaN, as in Brevitas: the loss shows it at once. Trained scales are in app/quant/learned.py.
"""

from __future__ import annotations

from typing import Any, cast

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
# Hooks run between the graphs of torch.compile; compiled layers take their weight as an input.
_not_compiled: Any = torch.compiler.disable


class FastQuantConv2d(QuantConv2d):
    """QuantConv2d that takes its weight from the fast path inside a forward of the model it is attached to.

    Alone, in export, or with its quantizer off, it is QuantConv2d. Its state_dict is QuantConv2d's.
    """

    _fast_weight: torch.Tensor | None = None

    def forward(self, input: Any) -> Any:
        weight, quantizer = self._fast_weight, cast(Any, self.weight_quant)
        if weight is None or self.export_mode or quantizer.disable_quant:
            return super().forward(input)
        return self.inner_forward_impl(input, weight, self.bias)


def attach(model: nn.Module) -> None:
    """Makes every forward of `model` compute the weights of its FastQuantConv2d layers together.

    Again after layers were replaced, or their bits changed. A deepcopy of the model has a fast path of its own.

    Raises:
        UserError: a layer whose quantizer the fast path does not compute.
    """
    detach(model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FastQuantConv2d) and cast(Any, layer.weight_quant).is_quant_enabled
    }
    if layers:
        # In the module's dict, where deepcopy finds it; the underscore keeps Ultralytics' EMA from copying it over.
        vars(model)["_fast_path"] = FastPath(model, layers)


def detach(model: nn.Module) -> None:
    """Takes the fast path off: every layer computes its own weight again."""
    if "_fast_path" in vars(model):
        vars(model).pop("_fast_path").remove()


class FastPath:
    """The layers of one model and the hooks around its forward."""

    def __init__(self, model: nn.Module, layers: dict[str, FastQuantConv2d]) -> None:
        self.layers = list(layers.values())
        self.specs = [_spec(name, layer) for name, layer in layers.items()]
        if len({spec.kind for spec in self.specs}) > 1:
            raise UserError("the layers' scales are made in different ways; set quant.fast_path=false")
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
            return  # halved models and traces are left to Brevitas
        device_type = weights[0].device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else torch.float32
        kind = self.specs[0].kind
        if kind != "abs-max":
            quantized = learned.quantize(self.layers, self.layout_of(weights), kind, dtype)
        else:
            node, how = (_Together, self.layout_of(weights)) if weights[0].is_cuda else (_EachInTurn, self.specs)
            quantized = cast(Tensors, node.apply(how, dtype, *weights))
        for layer, weight in zip(self.layers, quantized, strict=True):
            vars(layer)["_fast_weight"] = weight  # nn.Module.__setattr__ would cost 2 us a layer

    @_not_compiled
    def clear(self, model: nn.Module, args: Any, output: Any) -> None:
        """Drops the weights, so that none is used after its latent weight has changed."""
        for layer in self.layers:
            vars(layer).pop("_fast_weight", None)

    def layout_of(self, weights: list[torch.Tensor]) -> Layout:
        """The layout of these weights, made anew when device or memory format have changed."""
        key = (weights[0].device, [weight.stride() for weight in weights])
        if self.layout is None or self.layout.key != key:
            self.layout = Layout(weights, self.specs)
        return self.layout

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _spec(name: str, layer: FastQuantConv2d) -> Spec:
    proxy, others = cast(Any, layer.weight_quant), cast(Any, [layer.input_quant, layer.output_quant, layer.bias_quant])
    quant = proxy.tensor_quant
    if any(other.is_quant_enabled for other in others):
        raise UserError(f"layer {name}: quantized activations need quant.fast_path=false")
    if isinstance(quant, DecoupledRescalingIntQuant):
        int_quant, kind, fits = quant.decoupled_int_quant, "decoupled", _is_decoupled(quant)
        per_tensor = True
    elif isinstance(quant, RescalingIntQuant):
        is_lsq, int_quant = isinstance(quant.scaling_impl, ParameterScaling), quant.int_quant
        kind = "lsq" if is_lsq else "abs-max"
        shape = _learned_shape(quant.scaling_impl) if is_lsq else _absmax_shape(quant.scaling_impl)
        per_tensor = shape == () and not is_lsq
        fits = per_tensor or shape == (layer.out_channels, 1, 1, 1)
    else:
        raise UserError(f"layer {name}: not a quantizer that the fast path computes; set quant.fast_path=false")
    rounds = isinstance(int_quant.float_to_int_impl, RoundSte)
    symmetric = (int_quant.signed, int_quant.narrow_range) == (True, True)
    if not (rounds and symmetric and fits):
        raise UserError(f"layer {name}: not a symmetric abs-max or trained scale; set quant.fast_path=false")
    largest = int(quant.int_scaling_impl(quant.msb_clamp_bit_width_impl()))
    return Spec(largest, per_tensor, cast(Kind, kind))


def _is_decoupled(quant: Any) -> bool:
    """Whether codes are made with the L2 mean of the channels' abs-max, and their scale is a trained number a layer."""
    pre, scaling = quant.pre_scaling_impl, quant.scaling_impl
    return (
        isinstance(pre, StatsFromParameterScaling)
        and isinstance(pre.parameter_list_stats.stats.stats_impl, AbsMaxL2)
        and isinstance(scaling, ParameterFromStatsFromParameterScaling)
        and all(_is_plain(of.stats_scaling_impl) for of in (pre, scaling))
        and isinstance(quant.decoupled_int_quant.tensor_clamp_impl, TensorClampSte)
        and scaling.value.shape == ()
    )


def _is_plain(stats_scaling: Any) -> bool:
    """Whether it gives the absolute value, without a smallest one."""
    is_float = isinstance(stats_scaling.restrict_clamp_scaling.restrict_value_impl, FloatRestrictValue)
    return is_float and stats_scaling.clamp_scaling.min_val is None


def _absmax_shape(scaling: Any) -> tuple[int, ...] | None:
    """Shape of the scales where they are max |w|, not below MIN_ABSMAX; None: they are something else."""
    if not isinstance(scaling, StatsFromParameterScaling):
        return None
    stats, scaling = scaling.parameter_list_stats.stats, scaling.stats_scaling_impl
    as_computed_here = (
        isinstance(stats.stats_impl, AbsMax)
        and isinstance(scaling.restrict_clamp_scaling.restrict_value_impl, FloatRestrictValue)
        and scaling.clamp_scaling.min_val == kernels.MIN_ABSMAX
    )
    return tuple(stats.stats_output_shape) if as_computed_here else None


def _learned_shape(scaling: Any) -> tuple[int, ...] | None:
    """Shape of the scales where they are 2**value and the largest code is taken as it is; None: something else."""
    in_log = isinstance(scaling.restrict_clamp_scaling.restrict_value_impl, LogFloatRestrictValue)
    plain = isinstance(scaling.restrict_clamp_threshold.restrict_value_impl, FloatRestrictValue)
    return tuple(scaling.value.shape) if in_log and plain else None


class _EachInTurn(torch.autograd.Function):
    """One autograd node, layer after layer: on a CPU a layer's numbers stay in the cache between operations."""

    @staticmethod
    def forward(ctx: Any, specs: list[Spec], dtype: torch.dtype, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.specs = specs
        parts = [_parts(weight, spec) for weight, spec in zip(weights, specs, strict=True)]
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return tuple((codes * scale).to(dtype) for scale, _, _, codes in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        parts = zip(saved, saved, saved, saved, strict=True)
        each = zip(grads, parts, ctx.specs, strict=True)
        return None, None, *(None if g is None else _gradient(g.float(), part, spec) for g, part, spec in each)


def codes_of(layer: QuantConv2d, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's codes, as floats shaped like the weight, and their scale: [out_channels,1,1,1], or [] per tensor."""
    if spec.kind == "abs-max":
        step = scale = _scale(layer.weight, spec)[0]
    else:
        step, scale = (limit / spec.largest for limit in learned.limits(layer, spec.kind))
    return (layer.weight / step).round_().clamp_(-spec.largest, spec.largest), scale


def _scale(weight: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, and where the absmax is: its index in a channel [out_channels,1], as torch.max gives Brevitas; or
    a mask of it, where the scale is per tensor."""
    sizes = weight.abs()
    if spec.per_tensor:
        absmax = sizes.amax()
        where = sizes == absmax
    else:
        absmax, where = sizes.flatten(1).max(1, keepdim=True)
        absmax = absmax.view(-1, 1, 1, 1)
    return absmax.clamp_min(kernels.MIN_ABSMAX) / spec.largest, where


def _parts(weight: torch.Tensor, spec: Spec) -> Tensors:
    """Scale, where the absmax is, weight / scale, and codes."""
    scale, where = _scale(weight, spec)
    ratio = weight / scale
    return scale, where, ratio, ratio.round()


def _gradient(grad: torch.Tensor, parts: Tensors, spec: Spec) -> torch.Tensor:
    scale, where, ratio, codes = parts
    of_codes = grad * scale
    # Two sums of the shapes autograd sums, because the order of additions decides the last bit.
    of_scale = (grad * codes).sum_to_size(scale.shape) - (ratio / scale * of_codes).sum_to_size(scale.shape)
    share = of_scale / spec.largest
    out = of_codes.div_(scale)
    if spec.per_tensor:
        return out.add_(where * (share / where.sum()) * ratio.sign())
    out = out.contiguous()  # scatter_add_ counts in logical order
    sign = ratio.flatten(1).gather(1, where).sign()
    out.view(len(out), -1).scatter_add_(1, where, share.view(-1, 1) * sign)
    return out


class _Together(torch.autograd.Function):
    """One autograd node, all layers in one kernel: on a GPU launches are what a small kernel costs."""

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
        out = layout.split(kernels.gradient(layout.join_grads(grads), flat, layout, absmax, pick))
        return None, None, *(None if g is None else part for g, part in zip(grads, out, strict=True))
