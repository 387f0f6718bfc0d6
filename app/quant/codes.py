"""The integer codes of a model's weights, as its quantizers compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from app.quant.fused import FastPath, codes_of


@dataclass(frozen=True)
class Codes:
    """The quantized weight of one layer; its dequantized value is codes * scale.

    `codes` holds integers as floats and is shaped like the weight; `scale` broadcasts to it; `lowest` and `largest` are
    the limits of the codes, e.g. -7 and 7 at 4 bits.
    """

    layer: QuantConv2d
    codes: torch.Tensor
    scale: torch.Tensor
    lowest: int
    largest: int


@torch.no_grad()
def read_codes(model: nn.Module) -> list[Codes]:
    """Codes of every layer whose weight quantizer is enabled at the moment, in the order of model.modules()."""
    if "_fast_path" in vars(model):
        return _fast_path_codes(vars(model)["_fast_path"])
    return [
        _brevitas_codes(layer)
        for layer in model.modules()
        if isinstance(layer, QuantConv2d) and cast(Any, layer.weight_quant).is_quant_enabled
    ]


def _fast_path_codes(path: FastPath) -> list[Codes]:
    quantized = []
    for layer, spec in zip(path.layers, path.specs, strict=True):
        codes, scale = codes_of(layer, spec)
        quantized.append(Codes(layer, codes, scale, spec.lowest, spec.largest))
    return quantized


def _brevitas_codes(layer: QuantConv2d) -> Codes:
    quantized: Any = layer.quant_weight()
    codes = (quantized.value / quantized.scale).round()
    largest = 2 ** (int(quantized.bit_width) - 1) - 1
    lowest = -largest if cast(Any, layer.weight_quant).is_narrow_range else -largest - 1
    return Codes(layer, codes, quantized.scale, lowest, largest)
