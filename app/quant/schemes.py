"""Schemes on a network: which rule each layer gets, and its application with Brevitas' layers."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

from brevitas import config as brevitas_config
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.nn import QuantConv2d
from brevitas.quant import Int4WeightPerTensorFloatDecoupled, Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from torch import nn

from app.core.config import Quant, UserError
from app.core.scheme import BITS, FLOAT, FULL, Rule, Scheme
from app.quant.fused import FastQuantConv2d, attach
from app.quant.learned import reset_scales

# By default load_state_dict builds every quantizer anew, and the optimizer goes on with scales that no layer uses.
brevitas_config.REINIT_ON_STATE_DICT_LOAD = False


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


def _by_bits(quantizer: Any, name: str) -> dict[int, Any]:
    """The same quantizer for each number of bits, symmetric and narrow: -1..1 at 2 bits, -7..7 at 4, -127..127 at 8."""
    others = {bits: type(quantizer)(name.format(bits), (quantizer,), {"bit_width": bits}) for bits in BITS[:-1]}
    return {**others, BITS[-1]: quantizer}


# One scale for each output channel, or for the layer: abs-max over the largest code, from the weights at every forward.
QUANTIZERS = _by_bits(Int8WeightPerChannelFloat, "Int{}WeightPerChannel")
PER_TENSOR = _by_bits(Int8WeightPerTensorFloat, "Int{}WeightPerTensor")
LEARNED = _by_bits(LearnedInt8WeightPerChannel, "LearnedInt{}WeightPerChannel")


@cache
def full_range(quantizer: Any) -> Any:
    """The same quantizer with codes -8..7 at 4 bits; its scale is then the abs-max over 8."""
    return type(quantizer)(f"{quantizer.__name__}FullRange", (quantizer,), {"narrow_range": False})


# What a quantized layer takes over from the convolution that it replaces, besides weight and bias.
GEOMETRY = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
# Comes before the rules of every scheme that does not name DFL itself.
DFL = Rule(
    pattern="model.*.dfl.conv",
    bits="float",
    why="not a learned weight: the fixed integral 0..15 over the box distribution",
)
N_NEAREST, MIN_SIMILARITY = 3, 0.4  # of the names that an error shows


def assign(names: list[str], scheme: Scheme) -> dict[str, Rule]:
    """Gives each layer the first rule that matches its name.

    Raises:
        UserError: a layer without a rule, or a rule that no layer uses; names what is nearest.
    """
    exemption = [] if any("dfl" in rule.pattern for rule in scheme.rules) else [DFL]
    rules = [*exemption, *scheme.rules]
    chosen: dict[str, int] = {}
    for name in names:
        matching = [place for place, rule in enumerate(rules) if fnmatchcase(name, rule.pattern)]
        if not matching:
            nearest = _nearest(name, [rule.pattern for rule in scheme.rules])
            raise UserError(f"scheme {scheme}: no pattern matches layer {name}; nearest: {nearest}; '*' matches all")
        chosen[name] = matching[0]
    for place, rule in enumerate(rules):
        if place not in chosen.values() and rule is not DFL:
            raise UserError(f"scheme {scheme}: pattern '{rule.pattern}' {_unused(rule, names)}")
    return {name: rules[place] for name, place in chosen.items()}


def _unused(rule: Rule, names: list[str]) -> str:
    """Why no layer uses a rule, and the remedy."""
    taken = [name for name in names if fnmatchcase(name, rule.pattern)]
    if taken:
        return f"comes too late, entries above it take all its layers ({', '.join(taken[:N_NEAREST])}): move it up"
    return f"matches no layer; nearest: {_nearest(rule.pattern, names)}"


def _nearest(text: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(text, candidates, N_NEAREST, MIN_SIMILARITY)
    return ", ".join(close) or "none, make schemes ARGS='--scheme w4a16' lists all layers"


def quantize(model: nn.Module, quant: Quant) -> dict[str, Any]:
    """Replaces the model's convolutions in place by Brevitas' QuantConv2d; weights, names and state_dict keys stay.

    Returns:
        the content of quant_config.json: scheme, share of weights by bits, and per layer bits, granularity, quantizer
        and reason.
    """
    convs = convolutions(model)
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
        "scheme": quant.scheme.name,
        "scheme_sha256": quant.scheme.sha256,
        "share_of_learned_weights": shares(convs, rules),
        "layers": [_describe(name, convs[name], rule, quantizers[name]) for name, rule in rules.items()],
    }


def _quantizer(rule: Rule, quant: Quant) -> Any:
    """The Brevitas quantizer of a layer; None if the layer stays in float.

    Raises:
        UserError: an option of `quant` that does not work with the quantizer of the scheme.
    """
    if rule.bits == FLOAT:
        return None
    bits = cast(int, rule.bits)
    if rule.granularity == "channel" and rule.range != FULL:
        return (LEARNED if quant.learned_scale else QUANTIZERS)[bits]
    unfit_options = ["learned_scale"]
    if rule.granularity == "decoupled":
        # A decoupled code is not round(weight / scale), and float weights give a decoupled scale no gradient.
        unfit_options += ["warmup_share", "dampening", "freeze_threshold"]
    for option in unfit_options:
        if getattr(quant, option):
            message = f"scheme {quant.scheme}: quant.{option} is not for this scheme, choose w4a16 or w4a16-mixed"
            raise UserError(message)
    if rule.granularity == "decoupled":
        return Int4WeightPerTensorFloatDecoupled
    quantizer = QUANTIZERS[bits] if rule.granularity == "channel" else PER_TENSOR[bits]
    return full_range(quantizer) if rule.range == FULL else quantizer


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


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def shares(convs: dict[str, nn.Conv2d], rules: dict[str, Rule]) -> dict[str, float]:
    """Share of learned convolution weights by bits, e.g. {'4': 0.98, '8': 0.02}; those in float come last."""
    total = 0
    n_weights: dict[str, int] = {}
    for name, rule in rules.items():
        if not is_learned(name, rule):
            continue
        n = convs[name].weight.numel()
        total += n
        n_weights[str(rule.bits)] = n_weights.get(str(rule.bits), 0) + n
    return {bits: n_weights[bits] / total for bits in sorted(n_weights)}


def is_learned(name: str, rule: Rule) -> bool:
    """Whether a layer counts as learned: all but DFL, unless a scheme quantizes it."""
    return rule.bits != FLOAT or not fnmatchcase(name, DFL.pattern)


def _describe(name: str, conv: nn.Conv2d, rule: Rule, quantizer: Any) -> dict[str, Any]:
    """The entry of one layer in quant_config.json."""
    is_exempt = rule.bits == FLOAT
    granularity = "per output channel" if rule.granularity == "channel" else "per tensor"
    return {
        "name": name,
        "shape": list(conv.weight.shape),
        "bits": None if is_exempt else rule.bits,
        "granularity": None if is_exempt else granularity,
        "range": None if is_exempt else rule.range,
        "quantizer": None if quantizer is None else quantizer.__name__,
        "exempt": is_exempt,
        "why": rule.why,
    }
