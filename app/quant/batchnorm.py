"""BatchNorm's running statistics of an EMA copy: re-estimation, and how far it moved them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@torch.no_grad()
def variance_ratios(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """Running variance in `after` over that in `before`, by BatchNorm layer: the geometric mean over its channels.

    Near 1 the statistics from before the re-estimation fit the weights; far from 1 they normalise the layer wrongly.
    """
    old_layers, new_layers = batchnorm_layers(before), batchnorm_layers(after)
    ratios = []
    for old, new in zip(old_layers.values(), new_layers.values(), strict=True):
        log_ratio = new.running_var.log() - old.running_var.log()  # pyright: ignore[reportOptionalMemberAccess]
        ratios.append(log_ratio.mean().exp())
    return dict(zip(old_layers, torch.stack(ratios).tolist(), strict=True))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Replaces every BatchNorm's running statistics by the mean over `batches` of the batch statistics.

    mu = (1/K) sum_k mean(x_k), var = (1/K) sum_k var(x_k), as PyTorch's cumulative average (momentum None). That is a
    momentum of 1/k at the k-th batch, which PyTorch would read from the GPU in every layer.
    The EMA weights quantize to other codes than the raw weights. The averaged statistics come from the activations of
    the raw weights, so they do not fit the EMA copy; one pass over train batches makes them fit. Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.1. Without batches nothing changes.
    Every validation of a training calls it (app/train/validation.py, on the images of bn_images.py), and so does ptq;
    export does not.

    Args:
        model: any module; only BatchNorm buffers change, and its training mode is restored.
        batches: image tensors [N,3,H,W] on the model's device, scaled to 0..1.

    Returns:
        the number of batches used.
    """
    n_batches = 0
    with normalised_by_batch(model) as norms:
        for images in from_zero(norms, batches):
            n_batches += 1
            for norm in norms:
                norm.momentum = 1.0 / n_batches
            model(images)
    return n_batches


@contextmanager
def normalised_by_batch(model: nn.Module) -> Iterator[list[nn.BatchNorm2d]]:
    """Inside, the model is in eval mode but for its BatchNorm layers, which are given; momenta may be set."""
    norms = list(batchnorm_layers(model).values())
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)


def from_zero(norms: Iterable[nn.BatchNorm2d], batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches. Before the first is given, running statistics and counts of batches become 0."""
    for number, images in enumerate(batches):
        if number == 0:
            for norm in norms:
                norm.reset_running_stats()
                if norm.running_var is not None:  # 1 + (var - 1), as a kernel updates it, would round a small one away
                    norm.running_var.zero_()
        yield images


def batchnorm_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
