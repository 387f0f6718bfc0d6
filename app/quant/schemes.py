"""Which layer gets how many bits: a table by layer name, applied with Brevitas' own layers."""

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

# Otherwise load_state_dict builds every quantizer anew: the optimizer would go on with scales that no layer uses.
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
    2020). The start is the abs-max instead of LSQ's 2 mean|w| / sqrt(7): that is 2.6 times the abs-max of the uniform
    weights that a convolution starts with, and would leave most codes unused.
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


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` (fnmatch) get `bits`; None leaves the layer in float. First match wins.

    `quantizer` is for schemes that are defined by it.
    """

    pattern: str
    bits: int | None
    why: str
    quantizer: Any = None


DFL = Rule("model.*.dfl.conv", None, "not a learned weight: the fixed integral 0..15 over the box distribution")
FIRST = Rule("model.0.conv", 8, "first convolution: sees the image")
LAST = Rule("model.*cv[23].[0-9].2", 8, "last convolution of a head branch: its outputs are boxes and class scores")

SCHEMES: dict[str, tuple[Rule, ...]] = {
    "w4a16": (DFL, Rule("*", 4, "every learned convolution")),
    "w4a16-mixed": (DFL, FIRST, LAST, Rule("*", 4, "every other learned convolution")),
    "w8a16": (DFL, Rule("*", 8, "every learned convolution")),
    # For the stability bench. One ingredient of w4a16 less: DFL not exempt; one scale a layer.
    "w4a16-dfl": (Rule("*", 4, "every convolution, DFL too"),),
    "w4a16-per-tensor": (DFL, Rule("*", 4, "every learned convolution", Int4WeightPerTensor)),
    # The earlier recipe, a negative example: one learned scale per tensor, on the fixed integral of DFL too.
    "w4a16-decoupled": (Rule("*", 4, "every convolution, DFL too", Int4WeightPerTensorFloatDecoupled),),
}


def assign(names: list[str], scheme: str) -> dict[str, Rule]:
    """Gives each layer the first rule that matches its name.

    Raises:
        UserError: unknown scheme, a layer without a rule, or a rule that no layer uses.
    """
    if scheme not in SCHEMES:
        raise UserError(f"unknown scheme '{scheme}': choose one of {', '.join(SCHEMES)}")
    rules = SCHEMES[scheme]
    chosen = {name: next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None) for name in names}
    if missing := [name for name, rule in chosen.items() if rule is None]:
        raise UserError(f"scheme {scheme} has no rule for layer {missing[0]}: mend the table in app/quant/schemes.py")
    used = {name: rule for name, rule in chosen.items() if rule is not None}
    if idle := [rule.pattern for rule in rules if rule not in used.values()]:
        raise UserError(
            f"scheme {scheme}: pattern '{idle[0]}' matches no layer; mend the table in app/quant/schemes.py"
        )
    return used


def quantize(model: nn.Module, quant: Quant) -> dict[str, Any]:
    """Replaces the model's convolutions in place by Brevitas' QuantConv2d; weights, names and state_dict keys stay.

    Returns:
        the content of quant_config.json: scheme, share of weights by bits, and per layer bits, granularity, quantizer
        and reason.
    """
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    rules = assign(list(convs), quant.scheme)
    quantizers = {name: _quantizer(rule, quant) for name, rule in rules.items()}
    for name, quantizer in quantizers.items():
        if quantizer is not None:
            parent, _, child = name.rpartition(".")
            layer = FastQuantConv2d if quant.fast_path else QuantConv2d
            setattr(model.get_submodule(parent), child, _quant_conv(convs[name], quantizer, layer))
    if quant.fast_path:
        attach(model)
    return {
        "scheme": quant.scheme,
        "share_of_learned_weights": _shares(convs, rules),
        "layers": [_describe(name, convs[name], rule, quantizers[name]) for name, rule in rules.items()],
    }


def _quantizer(rule: Rule, quant: Quant) -> Any:
    """Brevitas' quantizer of a layer; None leaves it in float."""
    if rule.bits is None:
        return None
    if rule.quantizer is None:
        return (LEARNED if quant.learned_scale else QUANTIZERS)[rule.bits]
    unfit = ["learned_scale"]
    if rule.quantizer is Int4WeightPerTensorFloatDecoupled:  # codes are not weights over scale, float trains no scale
        unfit += ["warmup_share", "dampening", "freeze_threshold"]
    if given := [name for name in unfit if getattr(quant, name)]:
        raise UserError(f"scheme {quant.scheme}: quant.{given[0]} is not for this scheme, choose w4a16 or w4a16-mixed")
    return rule.quantizer


def _quant_conv(conv: nn.Conv2d, quantizer: Any, layer: type[QuantConv2d]) -> QuantConv2d:
    same: dict[str, Any] = {
        name: getattr(conv, name)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
    }
    quantized = layer(**same, bias=conv.bias is not None, weight_quant=quantizer)
    quantized.weight.data.copy_(conv.weight.data)
    if quantized.bias is not None and conv.bias is not None:
        quantized.bias.data.copy_(conv.bias.data)
    quantized.to(conv.weight.device)
    reset_scales(quantized)
    quantized.quant_weight()  # the decoupled quantizer's scale appears in state_dict at its first use
    return quantized


def _shares(convs: dict[str, nn.Conv2d], rules: dict[str, Rule]) -> dict[str, float]:
    """Share of learned convolution weights by bits, e.g. {'4': 0.98, '8': 0.02}."""
    learned = [(rule.bits, convs[name].weight.numel()) for name, rule in rules.items() if rule is not DFL]
    total = sum(count for _, count in learned)
    return {str(bits): sum(n for b, n in learned if b == bits) / total for bits in sorted({b for b, _ in learned if b})}


def _describe(name: str, conv: nn.Conv2d, rule: Rule, quantizer: Any) -> dict[str, Any]:
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
