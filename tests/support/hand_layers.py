"""Networks of one convolution whose weights are a handful of numbers, so that scale and codes are worked on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from app.quant.fused import FastQuantConv2d, attach
from app.quant.learned import reset_scales
from app.quant.schemes import LEARNED, QUANTIZERS

Rows = Sequence[Sequence[float]]


def hand_conv(rows: Rows, bits: int = 4, fast: bool = True, learned: bool = False) -> nn.Sequential:
    """A 1x1 convolution without bias; `rows` holds the weights of each output channel."""
    quantizers: dict[int, Any] = LEARNED if learned else QUANTIZERS
    layer_class = FastQuantConv2d if fast else QuantConv2d
    layer = layer_class(len(rows[0]), len(rows), 1, bias=False, weight_quant=quantizers[bits])
    model = nn.Sequential(layer)
    set_weights(model, rows)
    reset_scales(model)
    attach(model)
    return model


def set_weights(model: nn.Sequential, rows: Rows) -> None:
    weight = weight_of(model)
    weight.data.copy_(torch.tensor(rows, dtype=torch.float32).view(weight.shape))


def weight_of(model: nn.Sequential) -> nn.Parameter:
    layer: Any = model[0]
    return layer.weight


def weights(model: nn.Sequential) -> list[list[float]]:
    """The latent weights, a list for each output channel."""
    return weight_of(model).detach().flatten(1).tolist()


def small_weights() -> list[torch.Tensor]:
    """3x3, 1x1 and depthwise; among them a dead channel, a weight below the smallest scale, and tied maxima."""
    torch.manual_seed(1)
    weights = [torch.randn(8, 4, 3, 3), torch.randn(6, 5, 1, 1), torch.randn(7, 1, 3, 3)]
    weights[0][1] = 0.0
    weights[0][2] = 1e-12
    weights[0][3, :, 1, 2], weights[0][3, 3, 0, 0] = 5.0, -5.0
    weights[1][0] = -weights[1][1].abs().max()
    weights[2][5] = 0.25
    return weights


def exactly(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
