"""A detector as a graph of its operations, whose results are kept, so that a changed layer costs only what lies behind
it.

torch.fx traces the body of Ultralytics' network and the one2one head (nn/tasks.py _predict_once and
nn/modules/head.py forward_head, 8.4.190); the one2many head does not run. A block of convolution, BatchNorm and
activation is one operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from ultralytics.nn.modules.block import C2f
from ultralytics.nn.modules.conv import Conv

from app.quant.batchnorm import batchnorm_layers
from app.quant.fused import codes_of
from app.quant.kernels import Spec
from app.quant.schemes import convolutions

Kept = dict[fx.Node, Any]  # the result of every operation; of the first one, the images
Heads = dict[str, Any]
BRANCHES = ("one2one_cv2", "one2one_cv3")  # boxes and classes


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
    """The network's operations in the order in which they run.

    Args:
        model: a DetectionModel with YOLOv10's head, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.head = model.model[-1]
        self.convs = convolutions(model)
        self.traced = traced(model)
        targets = {node.target: node for node in self.traced.graph.nodes if node.op == "call_module"}
        self.blocks = {layer: targets[target] for layer in self.convs if (target := block_of(layer, targets))}

    @property
    def nodes(self) -> set[fx.Node]:
        return set(self.traced.graph.nodes)

    def behind(self, layers: Collection[str]) -> set[fx.Node]:
        """The operations that run one of the layers, and all that read them, directly or not."""
        stale = {self.blocks[layer] for layer in layers}
        for node in self.traced.graph.nodes:
            if stale.intersection(node.all_input_nodes):
                stale.add(node)
        return stale

    def run(self, images: torch.Tensor) -> Kept:
        """Results of all operations for images [N,3,S,S]."""
        interpreter = fx.Interpreter(self.traced, garbage_collect_values=False)
        interpreter.run(images)
        return interpreter.env

    def rerun(self, kept: Kept, stale: set[fx.Node]) -> Heads:
        """What the head puts out when `stale` operations run again, and the others' results are taken from `kept`."""
        return heads_of(fx.Interpreter(self.traced).run(initial_env=without(kept, stale)))

    def heads(self, kept: Kept) -> Heads:
        """What the head has put out."""
        *_, output = self.traced.graph.nodes
        return heads_of(kept[output])

    @contextmanager
    def changed(self, bits: dict[str, int]) -> Iterator[None]:
        """Inside, layers have weights of these bits, by name."""
        weights = {layer: self.convs[layer].weight.data for layer in bits}
        try:
            for layer, n_bits in bits.items():
                self.convs[layer].weight.data = fake_quantized(self.convs[layer], n_bits)
            yield
        finally:
            for layer, weight in weights.items():
                self.convs[layer].weight.data = weight

    def norm_behind(self, layer: str) -> str | None:
        """Name of the BatchNorm layer that reads a convolution; None for the last ones of the head."""
        node = self.blocks[layer]
        return None if node.target == layer else f"{node.target}.bn"

    def decoded(self, heads: Heads) -> torch.Tensor:
        """The output of the raw contract, [N,4+nc,A]: cx,cy,w,h in px and probabilities of the classes."""
        return self.head._inference(heads)

    def norms_in(self, nodes: Collection[fx.Node]) -> dict[str, nn.BatchNorm2d]:
        """BatchNorm layers of these operations, by their names in the network."""
        norms = {}
        for node in self.traced.graph.nodes:
            if node in nodes and node.op == "call_module":
                for name, norm in batchnorm_layers(self.traced.get_submodule(str(node.target))).items():
                    norms[f"{node.target}.{name}"] = norm
        return norms


def block_of(layer: str, targets: Collection[Any]) -> str | None:
    """Name of the operation that runs a convolution: its block, or itself. None for the one2many head and DFL."""
    block = layer.rpartition(".")[0]
    return next((name for name in (layer, block) if name in targets), None)


def without(kept: Kept, stale: Collection[fx.Node]) -> Kept:
    """The results that a run of `stale` operations may read; what the graph puts out is gathered by every run."""
    return {node: result for node, result in kept.items() if node not in stale and node.op != "output"}


def heads_of(outputs: Sequence[Sequence[torch.Tensor]]) -> Heads:
    """The one2one head's output in training, as Ultralytics' loss takes it (Detect.forward_head, 8.4.190).

    boxes float32 [N,4*16,A], logits of the distances to the four sides; scores [N,nc,A], logits of the classes;
    feats, the maps that the head reads.
    """
    boxes, scores, feats = outputs
    return {
        "boxes": torch.cat([level.flatten(2) for level in boxes], dim=-1),
        "scores": torch.cat([level.flatten(2) for level in scores], dim=-1),
        "feats": list(feats),
    }


# --- tracing ---------------------------------------------------------------------------------------------------------


class _OneToOne(nn.Module):
    """Body and one2one head, with the names that their layers have in the network."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.model = layers

    def forward(self, images: torch.Tensor) -> Any:
        *body, head = self.model
        results: list[Any] = []
        for module in body:
            results.append(module(sources(module, results, images)))
        feats = [results[place] for place in head.f]
        boxes, scores = (
            [branch(feat) for branch, feat in zip(getattr(head, name), feats, strict=True)] for name in BRANCHES
        )
        return boxes, scores, feats


def sources(module: Any, results: list[Any], images: Any) -> Any:
    """What a top-level module reads: `f` counts results from the network's begin, or back from the module."""
    if isinstance(module.f, list):
        return [results[place] for place in module.f]
    return results[module.f] if results else images


class _Tracer(fx.Tracer):
    """Traces into Ultralytics' modules, but not into a block of convolution, BatchNorm and activation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Conv) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Takes the forward of C2f that a tracer can read, with the same numbers (nn/modules/block.py, 8.4.190)."""
        return super().call_module(m, m.forward_split if isinstance(m, C2f) else forward, args, kwargs)


def traced(model: Any) -> fx.GraphModule:
    """The network as a graph, for any number of images."""
    root = _OneToOne(model.model)
    graph = _Tracer().trace(root)
    for node in graph.nodes:
        if node.target == getattr and node.args[1] == "shape":
            free_batch(graph, node)
    return fx.GraphModule(root, graph)


def free_batch(graph: fx.Graph, shape: fx.Node) -> None:
    """Writes -1 for the number of images of a shape, which attention gives to views."""
    for node in list(shape.users):
        if node.args[1] == 0:
            for user in list(node.users):
                user.args = tuple(-1 if argument is node else argument for argument in user.args)
            graph.erase_node(node)
