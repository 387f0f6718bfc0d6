"""The graph with BatchNorm folded into convolutions, which is faster and differs from it by rounding alone.

BatchNorm with fixed statistics multiplies a channel by a = weight / sqrt(var + eps) and adds bias - mean * a. The
convolution before it does so too, with its weights times a (Jacob et al., CVPR 2018, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import conv2d, silu

from app.sensitivity.network import Graph, Heads, Kept, Statistics, fake_quantized, heads_of, without

HAS_SILU = {nn.SiLU: True, nn.Identity: False}  # what stands behind the norm of a block


@dataclass(frozen=True)
class Kernel:
    """A convolution with another weight [O,I/groups,kh,kw] and bias [O], and SiLU behind it or nothing."""

    conv: nn.Conv2d
    weight: torch.Tensor
    bias: torch.Tensor | None
    has_silu: bool

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps [N,I,H,W] -> [N,O,H',W']."""
        conv: Any = self.conv
        result = conv2d(maps, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return silu(result, inplace=True) if self.has_silu else result


def fold(block: Any, weight: torch.Tensor, statistics: Statistics | None) -> Kernel:
    """The kernel of a block of Ultralytics with this weight; None: with the statistics that its norm has."""
    if isinstance(block, nn.Conv2d):
        return Kernel(block, weight, block.bias, has_silu=False)
    norm = block.bn
    mean, var = (statistics.mean, statistics.var) if statistics else (norm.running_mean, norm.running_var)
    factor = norm.weight / torch.sqrt(var + norm.eps)
    folded = (weight * factor.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    return Kernel(block.conv, folded, norm.bias - mean * factor, HAS_SILU[type(block.act)])


class Folded:
    """Runs a graph whose BatchNorm is folded.

    Args:
        graph: of the float network, in eval mode and on its device.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.layer_of = {node.target: layer for layer, node in graph.blocks.items()}
        self.kernels = {target: self.kernel(layer, None, {}) for target, layer in self.layer_of.items()}

    def kernel(self, layer: str, bits: int | None, corrected: dict[str, Statistics]) -> Kernel:
        """The kernel of the block of a layer at `bits` (None: float), with the statistics that its norm has there."""
        target = str(self.graph.blocks[layer].target)
        conv = self.graph.convs[layer]
        weight = conv.weight if bits is None else fake_quantized(conv, bits)
        return fold(self.graph.traced.get_submodule(target), weight, corrected.get(f"{target}.bn"))

    def run(self, images: torch.Tensor) -> Kept:
        """Results of all operations of the float network for images [N,3,S,S]."""
        interpreter = _Interpreter(self.graph.traced, self.kernels, keeps=True)
        interpreter.run(images)
        return interpreter.env

    def changed(self, kept: Kept, bits: dict[str, int], corrected: dict[str, Statistics]) -> Heads:
        """What the head puts out when layers have these bits and norms these statistics; `kept` has the rest."""
        layers = {*bits, *(self.layer_of[name.removesuffix(".bn")] for name in corrected)}
        kernels = dict(self.kernels)
        for layer in layers:
            kernels[self.graph.blocks[layer].target] = self.kernel(layer, bits.get(layer), corrected)
        interpreter = _Interpreter(self.graph.traced, kernels, keeps=False)
        return heads_of(interpreter.run(initial_env=without(kept, self.graph.behind(layers))))


class _Interpreter(fx.Interpreter):
    """Runs kernels in the place of blocks; `keeps` all results, or frees each after its last use."""

    def __init__(self, traced: fx.GraphModule, kernels: dict[Any, Kernel], keeps: bool) -> None:
        super().__init__(traced, garbage_collect_values=not keeps)
        self.kernels = kernels

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        kernel = self.kernels.get(target)
        return kernel(args[0]) if kernel else super().call_module(target, args, kwargs)
