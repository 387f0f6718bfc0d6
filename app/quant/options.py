"""What keeps the evaluated model as healthy as the trained one: small hooks that the trainer calls."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from brevitas.nn import QuantConv2d
from torch import nn

from app.core.config import Config, Quant
from app.quant.codes import Codes, read_codes
from app.quant.fused import attach
from app.quant.learned import learned_layers, limits, reset_scales, scale_parameter


class Stabiliser:
    """The protocol: what the trainer calls, and when. The base class does nothing."""

    def start_epoch(self, epoch: int) -> None:
        """Before an epoch, counted from 0; after a resume also for the epoch that starts."""

    def before_step(self, grad_scale: float) -> None:
        """Gradients are accumulated, and still multiplied by the GradScaler's scale; may change them."""

    def after_step(self) -> None:
        """After optimizer.step and the update of the EMA; may change weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for last.pt; with them a resumed training goes on exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what state_dict gave."""


def stabilisers(config: Config, model: nn.Module, ema: nn.Module) -> list[Stabiliser]:
    """The hooks that `quant` switches on, in the order they are called; none by default and for fp16."""
    quant = config.quant
    if quant is None:
        return []
    chosen: list[Stabiliser] = []
    n_warm = config.n_warmup_epochs
    if n_warm:
        chosen.append(WarmUp(quant, n_warm, (model, ema)))
    if quant.learned_scale:
        chosen.append(LearnedScale(model))
    if not quant.averaged_scales:
        chosen.append(FirstUseScales(ema))
    if quant.dampening:
        chosen.append(Dampening(quant, model, n_warm))
    if quant.freeze_threshold:
        chosen.append(Freezing(quant, model, n_warm))
    return chosen


class WarmUp(Stabiliser):
    """A first share of the epochs with float or 8-bit weights, then those of the scheme: model and EMA alike.

    Which bits hold follows from the epoch alone. Learned scales start anew from the abs-max at the switch: float
    weights gave them no gradient. Float first, then low bits: e.g. Krishnamoorthi, arXiv:1806.08342, section 3.2.
    """

    def __init__(self, quant: Quant, n_epochs: int, models: tuple[nn.Module, ...]) -> None:
        self.bits: Literal["float", 8] = quant.warmup_bits
        self.n_epochs, self.models = n_epochs, models
        self.in_force: bool | None = None  # in this process
        self.was_warm = False  # before this epoch, whichever process that was in

    def start_epoch(self, epoch: int) -> None:
        warm = epoch < self.n_epochs
        for model in self.models:
            if warm != self.in_force:
                set_bits(model, self.bits if warm else None)
            if self.was_warm and not warm:
                reset_scales(model)
        self.in_force = self.was_warm = warm

    def state_dict(self) -> dict[str, Any]:
        return {"was_warm": self.was_warm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.was_warm = state["was_warm"]


def set_bits(model: nn.Module, bits: Literal["float", 8] | None) -> None:
    """Quantizes the layers that are quantized by the scheme to `bits` instead; None: what the scheme says."""
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            proxy = cast(Any, layer.weight_quant)
            proxy.disable_quant = bits == "float"
            proxy.tensor_quant.msb_clamp_bit_width_impl.bit_width.value.fill_(bits if bits == 8 else own_bits(layer))
    attach(model)


def own_bits(layer: QuantConv2d) -> int:
    """What the scheme says, whatever is in force."""
    return cast(Any, layer.weight_quant).quant_injector.bit_width


class LearnedScale(Stabiliser):
    """LSQ's gradient scale g = 1 / sqrt(N Qp) for a channel of N weights and the largest code Qp, in the log domain.

    Esser et al., "Learned Step Size Quantization", ICLR 2020: a step s -= lr g dL/ds moves s, relative to its size, as
    fast as the weights move. The parameter is v = log2(s Qp), so the same move is v -= lr g dL/dv / (s ln 2)**2. It is
    cut at 1: with learning rate lr a step changes a scale by a factor of 2**lr at most, where LSQ's could turn it
    negative. (Infinite gradients stay visible to the GradScaler in the weights' own.)
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(learned_layers(model).values())

    @torch.no_grad()
    def before_step(self, grad_scale: float) -> None:
        for layer in self.layers:
            value = cast(nn.Parameter, scale_parameter(layer))
            if value.grad is not None:
                largest = 2 ** (own_bits(layer) - 1) - 1
                g = 1 / math.sqrt(layer.weight[0].numel() * largest)
                factor = torch.exp2(-2 * value).mul_(g * (largest / math.log(2)) ** 2)
                value.grad.mul_(factor).clamp_(-grad_scale, grad_scale)


def exempt_scales_from_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Moves learned scales from Ultralytics' optimizer group with weight decay to the one without (BatchNorm's)."""
    groups = {group["param_group"]: group["params"] for group in optimizer.param_groups}
    scales = [cast(nn.Parameter, scale_parameter(layer)) for layer in learned_layers(model).values()]
    ids = {id(scale) for scale in scales}
    groups["weight"][:] = [parameter for parameter in groups["weight"] if id(parameter) not in ids]
    groups["bn"].extend(scales)


class FirstUseScales(Stabiliser):
    """The decoupled scales of the EMA copy stay what they are at its first use, at the end of the first epoch.

    What Ultralytics' EMA (8.4.190) makes of Brevitas' scales (0.13.4) when nothing is done about it. Brevitas sets such
    a scale in a layer's first forward, to its L2 mean of the channels' abs-max, and leaves it out of state_dict before.
    The copy is made before any forward, so at the first step, when ModelEMA pairs the entries of the two state_dicts,
    it has none; its own are set in the first validation and follow the trained ones no more. Here they are set right
    after that one, which still scores averaged scales.
    """

    def __init__(self, ema: nn.Module) -> None:
        self.layers = [layer for layer in ema.modules() if isinstance(layer, QuantConv2d)]
        self.values = [cast(Any, layer.weight_quant).tensor_quant.scaling_impl.value for layer in self.layers]
        self.scales: torch.Tensor | None = None

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        if epoch >= 1 and self.scales is None:
            self.scales = torch.stack([limits(layer, "decoupled")[0] for layer in self.layers])
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.scales is not None:
            for value, scale in zip(self.values, self.scales, strict=True):
                value.copy_(scale)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scales is None else {"scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.layers[0].weight.device
        self.scales = state["scales"].to(device) if state else None


class Dampening(Stabiliser):
    """Pulls every weight to the middle of its code: adds the gradient of lambda ||w_hat - clip(w)||^2, w_hat constant.

    d/dw = 2 lambda (w - w_hat), and 0 for a clipped weight. Nagel et al., "Overcoming Oscillations in
    Quantization-Aware Training", ICML 2022, section 4.2.
    """

    def __init__(self, quant: Quant, model: nn.Module, first_epoch: int) -> None:
        self.quant, self.model, self.first_epoch = quant, model, first_epoch
        self.active = True

    def start_epoch(self, epoch: int) -> None:
        self.active = epoch >= self.first_epoch

    @torch.no_grad()
    def before_step(self, grad_scale: float) -> None:
        for of in read_codes(self.model) if self.active else []:
            weight = of.layer.weight
            if weight.grad is not None:
                off = (weight - of.codes * of.scale).masked_fill_(weight.abs() > of.largest * of.scale, 0.0)
                weight.grad.add_(off, alpha=2 * self.quant.dampening * grad_scale)


class Freezing(Stabiliser):
    """Freezes the code of a weight that oscillates too often. Nagel et al., ICML 2022, section 4.3, algorithm 1.

    A weight oscillates in a step when its code changes in the direction opposite to its last change; f is the moving
    average of that, f = m o + (1 - m) f, with m = quant.freeze_momentum. At f > quant.freeze_threshold the code becomes
    the rounded moving average of the codes and stays: w = code * scale after every step. The scale still moves.

    State: flat tensors over all quantized weights of the model; empty until the first step at the scheme's bits.
    """

    def __init__(self, quant: Quant, model: nn.Module, first_epoch: int) -> None:
        self.quant, self.model, self.first_epoch = quant, model, first_epoch
        self.active = True
        self.state: dict[str, torch.Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        self.active = epoch >= self.first_epoch

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.model.parameters()).device
        self.state = {name: tensor.to(device, copy=True) for name, tensor in state.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.active:
            return
        if self.state:  # first back to where the last step left them: the optimizer must not move a channel's scale so
            self._hold(read_codes(self.model), self.state["scale"])
        now = read_codes(self.model)
        codes = torch.cat([of.codes.flatten() for of in now])
        scale = torch.cat([of.scale.flatten() for of in now])
        if not self.state:
            zeros = torch.zeros_like(codes, dtype=torch.int8)
            self.state = {"codes": zeros, "direction": zeros.clone(), "frozen": zeros.bool()}
            self.state |= {"mean": codes.clone(), "frequency": torch.zeros_like(codes)}
            self.state["codes"] = codes.to(torch.int8)
        self._track(codes)
        self.state["scale"] = scale
        self._hold(now, scale)

    def _track(self, codes: torch.Tensor) -> None:
        """Updates frequency, moving average and frozen set from the codes after a step, [n]."""
        state, momentum = self.state, self.quant.freeze_momentum
        direction = (codes - state["codes"]).sign_().to(torch.int8)
        oscillates = direction * state["direction"] < 0
        state["frequency"].lerp_(oscillates.float(), momentum)
        state["mean"] = torch.where(state["frozen"], state["mean"], state["mean"].lerp(codes, momentum))
        new = (state["frequency"] > self.quant.freeze_threshold) & ~state["frozen"]
        state["mean"] = torch.where(new, state["mean"].round(), state["mean"])
        state["frozen"] |= new
        state["direction"] = torch.where(direction == 0, state["direction"], direction)
        state["codes"] = codes.to(torch.int8)

    def _hold(self, now: list[Codes], scale: torch.Tensor) -> None:
        """Writes code * scale, with scale [n_channels], to the frozen weights."""
        start = row = 0
        for of in now:
            part, rows = slice(start, start + of.codes.numel()), slice(row, row + of.scale.numel())
            frozen, mean = (self.state[name][part].view(of.codes.shape) for name in ("frozen", "mean"))
            weight = of.layer.weight
            weight.copy_(torch.where(frozen, mean * scale[rows].view(of.scale.shape), weight))
            start, row = part.stop, rows.stop
