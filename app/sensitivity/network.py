"""A detector as a graph whose activations are kept, so that a changed layer costs only what lies behind it.

The nodes are the top-level modules of Ultralytics' network up to its head (nn/tasks.py _predict_once, 8.4.190), and
then every branch of the one2one head on its own. The one2many head does not run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.quant.batchnorm import batchnorm_layers
from app.quant.fused import codes_of
from app.quant.kernels import Spec
from app.quant.schemes import convolutions

IMAGES = -1  # in the place of a node that is read: the images


@dataclass(frozen=True)
class Node:
    """A module that runs as a whole. `sources` are the places of the nodes that it reads; `takes_list`: as one list."""

    name: str
    module: nn.Module
    sources: tuple[int, ...]
    takes_list: bool


@dataclass(frozen=True)
class Statistics:
    """Of a BatchNorm layer, each [C]."""

    mean: torch.Tensor
    var: torch.Tensor

    def copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean.clone(), self.var.clone()


def fake_quantized(conv: Any, bits: int) -> torch.Tensor:
    """The weight of a convolution at `bits`, as Brevitas' quantizer of a scheme gives it: one scale a channel."""
    codes, scale = codes_of(conv, Spec(2 ** (bits - 1) - 1, per_tensor=False))
    return codes * scale


class Graph:
    """The network's nodes in the order in which they run.

    Args:
        model: a DetectionModel with YOLOv10's head, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        *body, self.head = model.model
        self.convs = convolutions(model)
        self.nodes = [_node(module) for module in body]
        self.feats = _places(self.head)
        head_name = f"model.{self.head.i}"
        for branch in ("one2one_cv2", "one2one_cv3"):
            for level, place in enumerate(self.feats):
                module = getattr(self.head, branch)[level]
                self.nodes.append(Node(f"{head_name}.{branch}.{level}", module, (place,), takes_list=False))

    def place_of(self, layer: str) -> int:
        """The place of the node that holds a layer, by the layer's name in the network."""
        return next(place for place, node in enumerate(self.nodes) if f"{layer}.".startswith(f"{node.name}."))

    def behind(self, layers: Collection[str]) -> set[int]:
        """Places of the nodes that hold one of the layers, and of all that read them, directly or not."""
        stale = {self.place_of(layer) for layer in layers}
        for place, node in enumerate(self.nodes):
            if stale.intersection(node.sources):
                stale.add(place)
        return stale

    def run(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of all nodes for images [N,3,S,S]."""
        return self.rerun(images, [], set(range(len(self.nodes))))

    def rerun(self, images: torch.Tensor, kept: list[torch.Tensor], stale: set[int]) -> list[torch.Tensor]:
        """Outputs of all nodes: those of `stale` nodes are computed, the others taken from `kept`."""
        outputs: list[torch.Tensor] = []
        for place, node in enumerate(self.nodes):
            if place not in stale:
                outputs.append(kept[place])
                continue
            inputs = [images if source == IMAGES else outputs[source] for source in node.sources]
            outputs.append(node.module(inputs if node.takes_list else inputs[0]))
        return outputs

    @contextmanager
    def changed(self, bits: dict[str, int], statistics: dict[str, Statistics]) -> Iterator[None]:
        """Inside, layers have weights of these bits, and norms these statistics; both by name."""
        norms = self.norms_in(self.behind(bits))
        weights = {layer: self.convs[layer].weight.data for layer in bits}
        kept = {name: (norms[name].running_mean, norms[name].running_var) for name in statistics}
        try:
            for layer, n_bits in bits.items():
                self.convs[layer].weight.data = fake_quantized(self.convs[layer], n_bits)
            for name, given in statistics.items():
                norms[name].running_mean, norms[name].running_var = given.mean, given.var
            yield
        finally:
            for layer, weight in weights.items():
                self.convs[layer].weight.data = weight
            for name, (mean, var) in kept.items():
                norms[name].running_mean, norms[name].running_var = mean, var

    def norm_behind(self, layer: str) -> str | None:
        """Name of the BatchNorm layer that reads a convolution; None for the last ones of the head."""
        name = f"{layer.rpartition('.')[0]}.bn"
        return name if name in self.norms_in({self.place_of(layer)}) else None

    def heads(self, outputs: list[torch.Tensor]) -> dict[str, Any]:
        """What the one2one head puts out in training, as Ultralytics' loss takes it (Detect.forward_head, 8.4.190).

        boxes float32 [N,4*16,A], logits of the distances to the four sides; scores [N,nc,A], logits of the classes;
        feats, the maps that the head reads.
        """
        n_levels = len(self.feats)
        boxes, scores = outputs[-2 * n_levels : -n_levels], outputs[-n_levels:]
        return {
            "boxes": torch.cat([level.flatten(2) for level in boxes], dim=-1),
            "scores": torch.cat([level.flatten(2) for level in scores], dim=-1),
            "feats": [outputs[place] for place in self.feats],
        }

    def decoded(self, heads: dict[str, Any]) -> torch.Tensor:
        """The output of the raw contract, [N,4+nc,A]: cx,cy,w,h in px and probabilities of the classes."""
        return self.head._inference(heads)

    def norms_in(self, places: set[int]) -> dict[str, nn.BatchNorm2d]:
        """BatchNorm layers of these nodes, by their names in the network."""
        norms = {}
        for place in sorted(places):
            node = self.nodes[place]
            for name, norm in batchnorm_layers(node.module).items():
                norms[f"{node.name}.{name}"] = norm
        return norms


def _node(module: Any) -> Node:
    return Node(f"model.{module.i}", module, _places(module), isinstance(module.f, list))


def _places(module: Any) -> tuple[int, ...]:
    """The nodes that a top-level module reads: `f` counts them from the network's begin, or back from the module."""
    sources = module.f if isinstance(module.f, list) else [module.f]
    return tuple(source if source >= 0 else module.i + source for source in sources)
