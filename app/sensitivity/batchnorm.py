"""BatchNorm of a changed network: how far its statistics move, measured on train images.

A statistic is not taken anew: with few images that alone would change it. It is corrected by how far the change moves
it on the same images, in the same batches:

    mean <- mean + (mean_q - mean_f)        var <- var * var_q / var_f

with the batch statistics of the changed network (q) and the float network (f), each averaged over the batches. Both
networks are normalised by their batch statistics, as in `reestimate_batchnorm`.

Of a single layer only its own BatchNorm, the one behind it, is corrected: its input is what changes first and most. So
the network does not run again for a layer and a number of bits; the layer does. Of groups and schemes all BatchNorm
layers behind the first changed one are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.core.progress import Meter
from app.sensitivity.changes import Change
from app.sensitivity.network import Graph, Statistics, fake_quantized


@dataclass
class Moved:
    """Sums over batches of a norm's statistics, each [C]."""

    mean: torch.Tensor | float = 0.0  # of the changed network minus that of the float network
    var: torch.Tensor | float = 0.0
    float_var: torch.Tensor | float = 0.0
    n_batches: int = 0

    def add(self, changed: Statistics, plain: Statistics) -> None:
        self.mean = self.mean + (changed.mean - plain.mean)
        self.var = self.var + changed.var
        self.float_var = self.float_var + plain.var
        self.n_batches += 1

    def of(self, norm: Any) -> Statistics:
        """The corrected statistics of a norm. A channel without variance in the float network keeps its own."""
        var, float_var = torch.as_tensor(self.var), torch.as_tensor(self.float_var)
        ratio = torch.where(float_var > 0, var / float_var, torch.ones_like(var))
        return Statistics(norm.running_mean + self.mean / self.n_batches, norm.running_var * ratio)


Corrections = dict[str, dict[str, Statistics]]  # by the name of the change and that of the norm


@torch.no_grad()
def corrections(graph: Graph, changes: list[Change], batches: list[torch.Tensor]) -> Corrections:
    """Corrected statistics of every change, from batches of train images [N,3,S,S]."""
    moved: dict[str, dict[str, Moved]] = defaultdict(lambda: defaultdict(Moved))
    single = [change for change in changes if change.is_single]
    others = [change for change in changes if not change.is_single]
    meter = Meter("sensitivity: BatchNorm", len(batches) * (1 + len(others)), "runs")
    for images in batches:
        with batch_statistics(graph) as norms:
            with own_norms(graph, single, moved):
                kept = graph.run(images)
            meter.update()
            plain = {name: statistics_of(norm) for name, norm in norms.items()}
            for change in others:
                stale = graph.behind(change.bits)
                with graph.changed(change.bits):
                    graph.rerun(kept, stale)
                for name, norm in graph.norms_in(stale).items():
                    moved[change.name][name].add(statistics_of(norm), plain[name])
                meter.update()
    meter.close()
    norms = graph.norms_in(graph.nodes)
    return {name: {norm: sums.of(norms[norm]) for norm, sums in by_norm.items()} for name, by_norm in moved.items()}


@contextmanager
def batch_statistics(graph: Graph) -> Iterator[dict[str, nn.BatchNorm2d]]:
    """Inside, BatchNorm normalises by the batch, whose statistics are then in its running ones."""
    norms = graph.norms_in(graph.nodes)
    kept = [(norm, norm.momentum, norm.running_mean, norm.running_var) for norm in norms.values()]
    try:
        for norm in norms.values():
            norm.train()
            norm.momentum = 1.0
        fresh(norms)
        yield norms
    finally:
        for norm, momentum, mean, var in kept:
            norm.eval()
            norm.momentum, norm.running_mean, norm.running_var = momentum, mean, var


def fresh(norms: dict[str, nn.BatchNorm2d]) -> None:
    """Gives norms statistics of their own, which the next batch overwrites."""
    for norm in norms.values():
        norm.running_mean, norm.running_var = statistics_of(norm).copies()


def statistics_of(norm: Any) -> Statistics:
    return Statistics(*Statistics(norm.running_mean, norm.running_var).copies())


@contextmanager
def own_norms(graph: Graph, changes: list[Change], moved: dict[str, dict[str, Moved]]) -> Iterator[None]:
    """Inside, a layer that runs in float also runs at the bits of its changes, and its norm's statistics are added."""
    by_layer: dict[str, dict[str, int]] = defaultdict(dict)
    for change in changes:
        (layer, bits), *_ = change.bits.items()
        by_layer[layer][change.name] = bits
    hooks = []
    for layer, bits_of in by_layer.items():
        norm = graph.norm_behind(layer)
        if norm is not None:
            hooks.append(graph.convs[layer].register_forward_hook(_adding(norm, bits_of, moved)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(norm: str, bits_of: dict[str, int], moved: dict[str, dict[str, Moved]]) -> Any:
    """A hook of a convolution; `bits_of` are the bits of every change of it."""

    def hook(conv: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        plain = over_channels(output)
        for change, bits in bits_of.items():
            changed = conv._conv_forward(args[0], fake_quantized(conv, bits), conv.bias)
            moved[change][norm].add(over_channels(changed), plain)

    return hook


def over_channels(maps: torch.Tensor) -> Statistics:
    """Mean and unbiased variance of maps [N,C,H,W] over all but the channels."""
    var, mean = torch.var_mean(maps, dim=(0, 2, 3))
    return Statistics(mean, var)
