from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from app.quant.codes import read_codes
from app.quant.options import Stabiliser

WINDOW_STEPS = 20  # last steps of a validated epoch, at most a quarter of it, in which oscillations are counted


class Oscillations(Stabiliser):
    """Counts weights that oscillate: in the window their code has changed and later changed in the other direction.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 3 (they average over all
    steps; a window at the end of an epoch costs next to nothing and tells the same story).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_open = False
        self.state: dict[str, torch.Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        if self.state and self.state["epoch"] != epoch:
            self.state = {}

    def open(self, epoch: int) -> None:
        """Counts from the next step on; the trainer calls it at every step of the window."""
        self.is_open = True
        if not self.state:
            codes = flat_codes(self.model)
            zeros = torch.zeros_like(codes)
            self.state = {"codes": codes, "direction": zeros, "oscillates": zeros.bool(), "epoch": torch.tensor(epoch)}

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        codes, state = flat_codes(self.model), self.state
        if len(codes) != len(state["codes"]):  # bits have changed
            self.state = {}
            return
        direction = (codes - state["codes"]).sign_()
        state["oscillates"] |= direction * state["direction"] < 0
        state["direction"] = torch.where(direction == 0, state["direction"], direction)
        state["codes"] = codes

    def share(self) -> float:
        """Share of the quantized weights, 0..1; closes the window."""
        state, self.state = self.state, {}
        return state["oscillates"].float().mean().item() if state and len(state["codes"]) else 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.is_open = False
        device = next(self.model.parameters()).device
        self.state = {name: tensor.to("cpu" if name == "epoch" else device) for name, tensor in state.items()}


@torch.no_grad()
def flat_codes(model: nn.Module) -> torch.Tensor:
    """Integer codes of all quantized weights, int8 [n]; n = 0 while nothing is quantized."""
    parts = [of.codes.flatten().to(torch.int8) for of in read_codes(model)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8)


def share_of_different(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of codes that differ, 0..1; 0 where one of the two is not quantized."""
    return (a != b).float().mean().item() if len(a) == len(b) and len(a) else 0.0


@torch.no_grad()
def signal_to_noise(model: nn.Module) -> dict[str, float]:
    """Quantization SNR of every quantized layer in dB: 10 log10(||w||^2 / ||w - w_hat||^2); 0 for a layer of zeros."""
    names = {layer: name for name, layer in model.named_modules()}
    layers = read_codes(model)
    if not layers:
        return {}
    noise = [(of.layer.weight - of.codes * of.scale).square().sum() for of in layers]
    power = [of.layer.weight.square().sum() for of in layers]
    pairs = torch.stack([torch.stack(power), torch.stack(noise)], 1).tolist()  # one wait for the GPU
    return {
        names[of.layer]: 10 * math.log10(p / n) if p and n else 0.0 for of, (p, n) in zip(layers, pairs, strict=True)
    }


@torch.no_grad()
def scale_ratios(raw: nn.Module, averaged: nn.Module) -> list[float]:
    """Scale of the raw weights over that of their average, a number a quantized layer: the mean over its channels.

    Near 1 the average follows; a trained scale may be left behind.
    """
    pairs = zip(read_codes(raw), read_codes(averaged), strict=True)
    return torch.stack([(of.scale / kept.scale).mean() for of, kept in pairs]).tolist()
