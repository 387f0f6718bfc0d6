"""Schemes: tables that give each layer its number of bits by its name, and their application with Brevitas' layers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from brevitas import config as brevitas_config
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.nn import QuantConv2d
from brevitas.quant import Int4WeightPerTensorFloatDecoupled, Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from torch import nn

from app.core.config import Quant, UserError
from app.quant.fused import FastQuantConv2d, attach
from app.quant.learned import reset_scales

# By default load_state_dict builds every quantizer anew, and the optimizer goes on with scales that no layer uses.
brevitas_config.REINIT_ON_STATE_DICT_LOAD = False


class Int4WeightPerChannel(Int8WeightPerChannelFloat):
    """Symmetric, narrow (-7..7), one scale per output channel = abs-max / 7 of the weights at every forward."""

    bit_width = 4


class Int4WeightPerTensor(Int8WeightPerTensorFloat):
    """Int4WeightPerChannel with one scale for the whole layer."""

    bit_width = 4


class LearnedInt8WeightPerChannel(Int8WeightPerChannelFloat):
    """Symmetric, narrow, one trained scale per output channel = 2**value / 127; `value` starts at log2(abs-max).

    LSQ (Esser et al., ICLR 2020) in the log domain, where no step turns a scale negative (Jain et al., TQT, MLSys
    2020). The scale starts from the abs-max and not from LSQ's 2 mean|w| / sqrt(7). A convolution starts with uniform
    weights; for those LSQ's start is 2.6 times the scale of the abs-max and leaves most codes unused.
    """

    scaling_impl_type = "parameter"
    scaling_init = cast(Any, 1.0)
    restrict_scaling_type = "log_fp"
    restrict_threshold_impl = FloatRestrictValue


class LearnedInt4WeightPerChannel(LearnedInt8WeightPerChannel):
    """LearnedInt8WeightPerChannel with codes -7..7."""

    bit_width = 4


QUANTIZERS: dict[int, Any] = {4: Int4WeightPerChannel, 8: Int8WeightPerChannelFloat}
LEARNED: dict[int, Any] = {4: LearnedInt4WeightPerChannel, 8: LearnedInt8WeightPerChannel}
# What a quantized layer takes over from the convolution that it replaces, besides weight and bias.
GEOMETRY = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` (fnmatch) get `bits`; with None they stay in float. The first match wins.

    `quantizer` replaces the usual quantizer of these bits, in the schemes that differ by their quantizer.
    """

    pattern: str
    bits: int | None
    why: str
    quantizer: Any = None


DFL = Rule("model.*.dfl.conv", None, "not a learned weight: the fixed integral 0..15 over the box distribution")
FIRST = Rule("model.0.conv", 8, "first convolution: sees the image")
LAST = Rule("model.*cv[23].[0-9].2", 8, "last convolution of a head branch: its outputs are boxes and class scores")
# SCDown's second half, the position encoding of attention, CIB's three, the class branch's: in every size of YOLOv10.
DEPTHWISE = tuple(
    Rule(pattern, 8, "depthwise convolution: 9 to 49 weights a channel, nothing averages their rounding")
    for pattern in (
        "model.[57].cv2.conv", "model.20.cv2.conv", "model.*.attn.pe.conv",
        "model.*.m.*.cv1.[024].conv*", "model.*cv3.[0-9].[01].0.conv",
    )
)  # fmt: skip

SCHEMES: dict[str, tuple[Rule, ...]] = {
    "w4a16": (DFL, Rule("*", 4, "every learned convolution")),
    "w4a16-mixed": (DFL, FIRST, LAST, Rule("*", 4, "every other learned convolution")),
    "w8a16": (DFL, Rule("*", 8, "every learned convolution")),
    "w4a16-mixed-dw": (DFL, FIRST, LAST, *DEPTHWISE, Rule("*", 4, "every other learned convolution")),
    # Ablations for the stability bench: w4a16 with DFL quantized too, and w4a16 with one scale per tensor.
    "w4a16-dfl": (Rule("*", 4, "every convolution, DFL too"),),
    "w4a16-per-tensor": (DFL, Rule("*", 4, "every learned convolution", Int4WeightPerTensor)),
    # A negative example, the recipe before this one: one learned scale per tensor, and DFL quantized too.
    "w4a16-decoupled": (Rule("*", 4, "every convolution, DFL too", Int4WeightPerTensorFloatDecoupled),),
}


def assign(names: list[str], scheme: str) -> dict[str, Rule]:
    """Gives each layer the first rule that matches its name.

    Raises:
        UserError: unknown scheme, a layer without a rule, or a rule that no layer uses.
    """
    if scheme not in SCHEMES:
        raise UserError(f"unknown scheme '{scheme}': choose one of {', '.join(SCHEMES)}")
    chosen = {}
    for name in names:
        matching = [rule for rule in SCHEMES[scheme] if fnmatchcase(name, rule.pattern)]
        if not matching:
            raise UserError(f"scheme {scheme} has no rule for layer {name}: mend the table in app/quant/schemes.py")
        chosen[name] = matching[0]
    for rule in SCHEMES[scheme]:
        if rule not in chosen.values():
            raise UserError(
                f"scheme {scheme}: pattern '{rule.pattern}' matches no layer; mend the table in app/quant/schemes.py"
            )
    return chosen


def quantize(model: nn.Module, quant: Quant) -> dict[str, Any]:
    """Replaces the model's convolutions in place by Brevitas' QuantConv2d; weights, names and state_dict keys stay.

    Returns:
        the content of quant_config.json: scheme, share of weights by bits, and per layer bits, granularity, quantizer
        and reason.
    """
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    rules = assign(list(convs), quant.scheme)
    quantizers = {name: _quantizer(rule, quant) for name, rule in rules.items()}
    layer_class = FastQuantConv2d if quant.fast_path else QuantConv2d
    for name, quantizer in quantizers.items():
        if quantizer is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quant_conv(convs[name], quantizer, layer_class))
    if quant.fast_path:
        attach(model)
    return {
        "scheme": quant.scheme,
        "share_of_learned_weights": _shares(convs, rules),
        "layers": [_describe(name, convs[name], rule, quantizers[name]) for name, rule in rules.items()],
    }


def _quantizer(rule: Rule, quant: Quant) -> Any:
    """The Brevitas quantizer of a layer; None if the layer stays in float.

    Raises:
        UserError: an option of `quant` that does not work with the quantizer of the scheme.
    """
    if rule.bits is None:
        return None
    if rule.quantizer is None:
        return (LEARNED if quant.learned_scale else QUANTIZERS)[rule.bits]
    unfit_options = ["learned_scale"]
    if rule.quantizer is Int4WeightPerTensorFloatDecoupled:
        # A decoupled code is not round(weight / scale), and float weights give a decoupled scale no gradient.
        unfit_options += ["warmup_share", "dampening", "freeze_threshold"]
    for option in unfit_options:
        if getattr(quant, option):
            message = f"scheme {quant.scheme}: quant.{option} is not for this scheme, choose w4a16 or w4a16-mixed"
            raise UserError(message)
    return rule.quantizer


def _quant_conv(conv: nn.Conv2d, quantizer: Any, layer_class: type[QuantConv2d]) -> QuantConv2d:
    """A quantized layer with the shape and the weights of `conv`."""
    same: dict[str, Any] = {name: getattr(conv, name) for name in GEOMETRY}
    quantized = layer_class(**same, bias=conv.bias is not None, weight_quant=quantizer)
    quantized.weight.data.copy_(conv.weight.data)
    if quantized.bias is not None and conv.bias is not None:
        quantized.bias.data.copy_(conv.bias.data)
    quantized.to(conv.weight.device)
    reset_scales(quantized)
    quantized.quant_weight()  # the decoupled quantizer adds its scale to state_dict in its first call
    return quantized


def _shares(convs: dict[str, nn.Conv2d], rules: dict[str, Rule]) -> dict[str, float]:
    """Share of learned convolution weights by bits, e.g. {'4': 0.98, '8': 0.02}."""
    total = 0
    n_weights: dict[int, int] = {}
    for name, rule in rules.items():
        if rule is DFL:
            continue
        n = convs[name].weight.numel()
        total += n
        if rule.bits is not None:
            n_weights[rule.bits] = n_weights.get(rule.bits, 0) + n
    return {str(bits): n_weights[bits] / total for bits in sorted(n_weights)}


def _describe(name: str, conv: nn.Conv2d, rule: Rule, quantizer: Any) -> dict[str, Any]:
    """The entry of one layer in quant_config.json."""
    granularity = "per output channel" if rule.quantizer is None else "per tensor"
    return {
        "name": name,
        "shape": list(conv.weight.shape),
        "bits": rule.bits,
        "granularity": granularity if rule.bits else None,
        "quantizer": None if quantizer is None else quantizer.__name__,
        "exempt": rule.bits is None,
        "why": rule.why,
    }
