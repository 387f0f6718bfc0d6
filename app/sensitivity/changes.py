"""What is measured: single layers, groups of layers and whole schemes, each with the bits that its layers get."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import log2
from typing import Any

from torch import nn
from ultralytics.nn.modules.block import PSA

from app.core.config import Sensitivity, UserError
from app.core.scheme import FLOAT, FULL, Rule, Scheme, find_scheme
from app.quant.sizes import layers_of

MEASURED_BITS = (2, 3, 4, 5, 6, 8)
MAIN_BITS = 4  # measured on all images
UNIFORM_BITS = (2, 3, 5, 6)  # of whole networks beside the built-in schemes
LAYER, GROUP, SCHEME, RANDOM = "layer", "group", "scheme", "random scheme"
BUILTIN = ("w4a16", "w4a16-mixed", "w4a16-mixed-dw", "w8a16")
RANDOM_BITS = (3, 4, 5, 6)
BY_CHANNEL = "channel"


@dataclass(frozen=True)
class Change:
    """Layers of the network that are quantized by channel, the others in float: name of a layer -> its bits."""

    kind: str
    name: str
    bits: dict[str, int]

    @property
    def is_single(self) -> bool:
        return self.kind == LAYER

    @property
    def is_main(self) -> bool:
        """Whether all images measure it."""
        return self.kind in (LAYER, GROUP) and set(self.bits.values()) == {MAIN_BITS}


def single(layer: str, bits: int) -> str:
    """Name of the change of one layer."""
    return f"{layer}@{bits}"


def uniform(bits: int) -> Scheme:
    """Every learned layer at the same number of bits."""
    return Scheme(name="all", rules=(Rule(pattern="*", bits=bits, granularity=BY_CHANNEL, why="all"),))


def learned_layers(model: Any) -> dict[str, nn.Conv2d]:
    """The convolutions that are quantized and in the file, in the network's order: without DFL and one2many head."""
    found = layers_of(model, uniform(MAIN_BITS))
    return {layer.name: layer.conv for layer in found if layer.is_in_file and layer.rule.bits != FLOAT}


def all_changes(model: Any, settings: Sensitivity) -> list[Change]:
    """Every layer and every group at every number of bits, and whole schemes."""
    layers = learned_layers(model)
    changes = []
    for layer in layers:
        changes += [Change(LAYER, single(layer, bits), {layer: bits}) for bits in MEASURED_BITS]
    for group, members in groups_of(model, layers).items():
        changes += [Change(GROUP, single(group, bits), dict.fromkeys(members, bits)) for bits in MEASURED_BITS]
    changes += [scheme_change(model, find_scheme(name)) for name in BUILTIN]
    changes += [Change(SCHEME, f"all@{bits}", dict.fromkeys(layers, bits)) for bits in UNIFORM_BITS]
    return changes + random_schemes(list(layers), settings)


def groups_of(model: Any, layers: dict[str, nn.Conv2d]) -> dict[str, list[str]]:
    """Layers by group; a layer may be in several."""
    head = model.model[-1]
    attention = tuple(f"model.{module.i}." for module in model.model if isinstance(module, PSA))
    groups = {
        "first": list(layers)[:1],
        "depthwise": [name for name, conv in layers.items() if conv.groups == conv.in_channels > 1],
        "attention (PSA)": [name for name in layers if attention and name.startswith(attention)],
        "last of the head": [name for name in layers if name.startswith(f"model.{head.i}.") and name.endswith(".2")],
    }
    for branch, kind in (("one2one_cv2", "box"), ("one2one_cv3", "class")):
        for level, stride in enumerate(head.stride.tolist()):
            members = [name for name in layers if name.startswith(f"model.{head.i}.{branch}.{level}.")]
            groups[f"{kind} branch P{round(log2(stride))}"] = members
    return {group: members for group, members in groups.items() if members}


def scheme_change(model: Any, scheme: Scheme) -> Change:
    """A scheme as a change.

    Raises:
        UserError: the scheme quantizes nothing, a scale of it is not a channel's, its codes have the full range, or a
            pattern does not fit the network.
    """
    bits = {}
    for layer in layers_of(model, scheme):
        if layer.rule.bits == FLOAT or not layer.is_in_file:
            continue
        if layer.rule.granularity != BY_CHANNEL:
            raise UserError(
                f"sensitivity: scheme {scheme} has a layer with one scale: choose one with granularity channel"
            )
        if layer.rule.range == FULL:
            raise UserError(
                f"sensitivity: scheme {scheme} has a layer with range full, and layers are measured in the narrow one: "
                "choose one without"
            )
        bits[layer.name] = int(layer.rule.bits)
    if not bits:
        raise UserError(f"sensitivity: scheme {scheme} leaves every layer in float: choose one with bits")
    return Change(SCHEME, scheme.name, bits)


def random_schemes(layers: list[str], settings: Sensitivity) -> list[Change]:
    """Schemes of nearly the same size that differ in which layers have more bits."""
    drawn = random.Random(settings.choice_seed)  # noqa: S311 - a reproducible choice, no secret
    schemes = []
    for number in range(settings.random_schemes):
        bits = {layer: drawn.choice(RANDOM_BITS) for layer in layers}
        schemes.append(Change(RANDOM, f"random {number + 1}", bits))
    return schemes
