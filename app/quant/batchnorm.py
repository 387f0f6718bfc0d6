"""BatchNorm's running statistics of an EMA copy: re-estimated, and compared with those before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def variance_ratios(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """Running variance of every BatchNorm layer in `after` over that in `before`, geometric mean over its channels.

    1 means that the statistics fit; far from 1 the layer is normalised wrongly before the re-estimation.
    """
    norms = [
        [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        for model in (before, after)
    ]
    ratios = [
        (new.running_var.log() - old.running_var.log()).mean().exp()  # pyright: ignore[reportOptionalMemberAccess]
        for (_, old), (_, new) in zip(*norms, strict=True)
    ]
    return dict(zip([name for name, _ in norms[0]], torch.stack(ratios).tolist(), strict=True))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Replaces every BatchNorm's running statistics by the mean over `batches` of the batch statistics.

    mu = (1/K) sum_k mean(x_k), var = (1/K) sum_k var(x_k): PyTorch's cumulative average (momentum None).
    An EMA copy quantizes to other codes than the raw weights whose activations filled its averaged statistics; one pass
    over train batches makes them fit again. Nagel et al., "Overcoming Oscillations in Quantization-Aware Training",
    ICML 2022, section 4.1. No batches: nothing is changed.

    Args:
        model: any module; only BatchNorm buffers change, and its training mode is restored.
        batches: image tensors [N,3,H,W] on the model's device, scaled to 0..1.

    Returns:
        the number of batches used.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    n_batches = 0
    model.eval()
    for images in batches:
        if n_batches == 0:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
        model(images)
        n_batches += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
    return n_batches
