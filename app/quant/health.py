"""How healthy a quantized training is: oscillating weights, quantization noise, and how the EMA follows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from app.quant.codes import read_codes
from app.quant.options import Stabiliser

WINDOW_BATCHES = 20


def is_in_window(n_left: int, n_batches: int) -> bool:
    """Whether oscillations are counted where n_left batches of an epoch are left: in its last 20 or last quarter."""
    return n_left < min(WINDOW_BATCHES, n_batches / 4)


class Oscillations(Stabiliser):
    """Counts the weights that oscillate: within a window of steps their code changes, and later changes back.

    Any later change in the opposite direction counts. Nagel et al., "Overcoming Oscillations in Quantization-Aware
    Training", ICML 2022, section 3. They average over all steps; a window at the end of an epoch shows the same and
    costs next to nothing.

    State: flat tensors over all quantized weights of the model; empty while no window is open.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_open = False
        self.state: dict[str, torch.Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        if self.state and self.state["epoch"] != epoch:
            self.state = {}

    def open(self, epoch: int) -> None:
        """Counts the step that follows; the training loop calls it before every step of the window."""
        self.is_open = True
        if not self.state:
            codes = flat_codes(self.model)
            zeros = torch.zeros_like(codes)
            self.state = {
                "codes": codes,
                "direction": zeros,
                "oscillates": zeros.bool(),
                "epoch": torch.tensor(epoch),
            }

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        codes, state = flat_codes(self.model), self.state
        if len(codes) != len(state["codes"]):  # other layers are quantized now: a warm-up with float weights has ended
            self.state = {}
            return
        direction = (codes - state["codes"]).sign_()
        state["oscillates"] |= direction * state["direction"] < 0
        state["direction"] = torch.where(direction == 0, state["direction"], direction)
        state["codes"] = codes

    def share(self) -> float:
        """Share of the quantized weights that oscillated in the window, 0..1; closes the window."""
        state = self.state
        self.state = {}
        if not state or len(state["codes"]) == 0:
            return 0.0
        return state["oscillates"].float().mean().item()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.is_open = False
        device = next(self.model.parameters()).device
        self.state = {name: tensor.to("cpu" if name == "epoch" else device) for name, tensor in state.items()}


@torch.no_grad()
def flat_codes(model: nn.Module) -> torch.Tensor:
    """Integer codes of all quantized weights, int8 [n]; n = 0 while nothing is quantized."""
    parts = [quantized.codes.flatten().to(torch.int8) for quantized in read_codes(model)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8)


def share_of_different(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of the codes that differ between two models, 0..1; 0 if one of the two is not quantized."""
    if len(a) != len(b) or len(a) == 0:
        return 0.0
    return (a != b).float().mean().item()


@torch.no_grad()
def signal_to_noise(model: nn.Module) -> dict[str, float]:
    """Quantization SNR of every quantized layer in dB: 10 log10(||w||^2 / ||w - w_hat||^2); 0 for a layer of zeros."""
    names = {layer: name for name, layer in model.named_modules()}
    quantized_names, sums = [], []
    for quantized in read_codes(model):
        weight = quantized.layer.weight
        error = weight - quantized.codes * quantized.scale
        quantized_names.append(names[quantized.layer])
        sums.append(torch.stack([weight.square().sum(), error.square().sum()]))
    if not sums:
        return {}
    decibels = {}
    pairs = torch.stack(sums).tolist()  # for all layers at once: one synchronisation with the GPU
    for name, (power, noise) in zip(quantized_names, pairs, strict=True):
        decibels[name] = 10 * math.log10(power / noise) if power and noise else 0.0
    return decibels


@torch.no_grad()
def scale_ratios(raw: nn.Module, averaged: nn.Module) -> list[float]:
    """Scale of the raw weights over the scale of their EMA, averaged over the channels: one number a quantized layer.

    Near 1 the EMA's scale follows the raw one; a trained scale can lag behind.
    """
    pairs = zip(read_codes(raw), read_codes(averaged), strict=True)
    ratios = [(quantized.scale / ema_quantized.scale).mean() for quantized, ema_quantized in pairs]
    return torch.stack(ratios).tolist()
