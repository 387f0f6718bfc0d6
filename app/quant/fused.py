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
NaN weight gives NaN, as in Brevitas: the loss shows it at once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import StatsFromParameterScaling
from brevitas.core.stats import AbsMax
from brevitas.nn import QuantConv2d
from torch import nn
from torch.autograd.function import once_differentiable

from app.config import UserError
from app.quant import kernels
from app.quant.kernels import Layout, Spec

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

    Again after layers were replaced. A deepcopy of the model has a fast path of its own.

    Raises:
        UserError: a layer whose quantizer the fast path does not compute.
    """
    detach(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FastQuantConv2d)}
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
        together = weights[0].is_cuda
        node, how = (_Together, self.layout_of(weights)) if together else (_EachInTurn, self.specs)
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
    # The learned parts would come here: a Spec with the layer's scale parameter, passed to the autograd node beside the
    # weights, and a clamp in both kernels.
    proxy, others = cast(Any, layer.weight_quant), cast(Any, [layer.input_quant, layer.output_quant, layer.bias_quant])
    quant = proxy.tensor_quant
    if list(proxy.parameters()) or any(other.is_quant_enabled for other in others):
        raise UserError(f"layer {name}: learned scales and quantized activations need quant.fast_path=false")
    if not (isinstance(quant, RescalingIntQuant) and isinstance(quant.scaling_impl, StatsFromParameterScaling)):
        raise UserError(f"layer {name}: its quantizer is not computed from abs-max; set quant.fast_path=false")
    stats, scaling = quant.scaling_impl.parameter_list_stats.stats, quant.scaling_impl.stats_scaling_impl
    as_computed_here = (
        isinstance(stats.stats_impl, AbsMax)
        and isinstance(scaling.restrict_clamp_scaling.restrict_value_impl, FloatRestrictValue)
        and scaling.clamp_scaling.min_val == kernels.MIN_ABSMAX
        and isinstance(quant.int_quant.float_to_int_impl, RoundSte)
        and (quant.int_quant.signed, quant.int_quant.narrow_range) == (True, True)
        and tuple(stats.stats_output_shape) in ((), (layer.out_channels, 1, 1, 1))
    )
    if not as_computed_here:
        raise UserError(f"layer {name}: not a symmetric abs-max quantizer; set quant.fast_path=false")
    largest = int(quant.int_scaling_impl(quant.msb_clamp_bit_width_impl()))
    return Spec(largest, per_tensor=tuple(stats.stats_output_shape) == ())


class _EachInTurn(torch.autograd.Function):
    """One autograd node, layer after layer: on a CPU a layer's numbers stay in the cache between operations."""

    @staticmethod
    def forward(ctx: Any, specs: list[Spec], dtype: torch.dtype, *weights: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.specs = specs
        absmax = [
            weight.abs().amax() if spec.per_tensor else weight.abs().amax((1, 2, 3), keepdim=True)
            for weight, spec in zip(weights, specs, strict=True)
        ]
        ctx.save_for_backward(*weights, *absmax)
        return tuple(map(_quantize, weights, absmax, specs, [dtype] * len(weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        n = len(grads)
        saved = zip(ctx.saved_tensors[:n], ctx.saved_tensors[n:], ctx.specs, strict=True)
        return (
            None,
            None,
            *(None if g is None else _gradient(g.float(), *of) for g, of in zip(grads, saved, strict=True)),
        )


def _quantize(weight: torch.Tensor, absmax: torch.Tensor, spec: Spec, dtype: torch.dtype) -> torch.Tensor:
    scale = absmax.clamp_min(kernels.MIN_ABSMAX) / spec.largest
    return (weight / scale).round_().mul_(scale).to(dtype)


def _gradient(grad: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, spec: Spec) -> torch.Tensor:
    scale = absmax.clamp_min(kernels.MIN_ABSMAX) / spec.largest
    ratio = weight / scale
    of_codes = grad * scale
    # Two sums of the shapes autograd sums, because the order of additions decides the last bit.
    of_scale = (grad * ratio.round()).sum_to_size(scale.shape) - (ratio / scale * of_codes).sum_to_size(scale.shape)
    share = of_scale / spec.largest
    out = of_codes.div_(scale)
    is_max = weight.abs() == absmax
    if spec.per_tensor:
        return out.add_(is_max * (share / is_max.sum()) * weight.sign())
    where = is_max.nonzero(as_tuple=True)  # in logical order, whatever the memory format
    if len(where[0]) > len(weight):  # ties: the first of a channel gets it all
        first = torch.ones_like(where[0], dtype=torch.bool)
        first[1:] = where[0][1:] != where[0][:-1]
        where = tuple(index[first] for index in where)
    return out.index_put_(where, share.flatten()[where[0]] * weight[where].sign(), accumulate=True)


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
        dtype = next(grad.dtype for grad in grads if grad is not None)
        zero = flat.new_zeros((), dtype=dtype)
        filled = [zero.expand(s) if g is None else g for g, s in zip(grads, layout.shapes, strict=True)]
        out = layout.split(kernels.gradient(layout.join(filled), flat, layout, absmax, pick))
        return None, None, *(None if g is None else part for g, part in zip(grads, out, strict=True))
