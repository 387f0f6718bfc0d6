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
    """One layer: integer codes (as floats, shaped like the weight), scale (broadcasts to it), largest code."""

    layer: QuantConv2d
    codes: torch.Tensor
    scale: torch.Tensor
    largest: int


@torch.no_grad()
def read_codes(model: nn.Module) -> list[Codes]:
    """Codes of every layer whose weights are quantized at the moment, in the order of model.modules()."""
    if "_fast_path" in vars(model):
        path: FastPath = vars(model)["_fast_path"]
        pairs = zip(path.layers, path.specs, strict=True)
        return [Codes(layer, *codes_of(layer, spec), spec.largest) for layer, spec in pairs]
    layers = (layer for layer in model.modules() if isinstance(layer, QuantConv2d))
    return [_brevitas_codes(layer) for layer in layers if cast(Any, layer.weight_quant).is_quant_enabled]


def _brevitas_codes(layer: QuantConv2d) -> Codes:
    quantized: Any = layer.quant_weight()
    codes = (quantized.value / quantized.scale).round()
    return Codes(layer, codes, quantized.scale, 2 ** (int(quantized.bit_width) - 1) - 1)
