"""W4A16's codes and scales of a checkpoint's weights in NumPy, worked out apart from the code under test."""

from __future__ import annotations

import numpy as np
import torch

LARGEST_CODE = 7  # of 4 bits, narrow


def codes_and_scale(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes of a convolution's weights, and its scales [channels,1,1,1]: abs-max of a channel over 7."""
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / np.float32(LARGEST_CODE)
    return np.round(weight / scale), scale


def quantized(weight: np.ndarray) -> np.ndarray:
    codes, scale = codes_and_scale(weight)
    return codes * scale


def layers(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Weights of the quantized convolutions by layer: all but the DFL's fixed ones."""
    convolutions = {name: value for name, value in state.items() if value.ndim == 4 and ".dfl." not in name}
    return {name.removesuffix(".weight"): value.numpy() for name, value in convolutions.items()}


def all_codes(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([codes_and_scale(weight)[0].ravel() for weight in layers(state).values()])


def snr_db(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """10 log10 of the power of a layer's weights over that of their rounding errors."""
    weights = {name: weight.astype(np.float64) for name, weight in layers(state).items()}
    return {name: 10 * np.log10((w**2).sum() / ((w - quantized(w)) ** 2).sum()) for name, w in weights.items()}
