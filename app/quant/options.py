"""Optional stabilisers of quantized training, off by default: small hooks that the training loop calls."""

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
    """The hooks that the training loop calls, and when. The base class does nothing."""

    def start_epoch(self, epoch: int) -> None:
        """Called before every epoch, which is counted from 0, and after a resume for the epoch that goes on."""

    def before_step(self, grad_scale: float) -> None:
        """Called before optimizer.step; may change the gradients, which are accumulated and still times `grad_scale`.

        Args:
            grad_scale: the GradScaler's factor.
        """

    def after_step(self) -> None:
        """Called after optimizer.step and the update of the EMA; may change weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for last.pt, so that a resumed training equals an uninterrupted one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of state_dict."""


def stabilisers(config: Config, model: nn.Module, ema: nn.Module) -> list[Stabiliser]:
    """The stabilisers that `quant` switches on, in the order of their calls; none by default and for fp16."""
    quant = config.quant
    if quant is None:
        return []
    chosen: list[Stabiliser] = []
    n_warmup = config.n_quant_warmup_epochs
    if n_warmup:
        chosen.append(WarmUp(quant, n_warmup, (model, ema)))
    if quant.learned_scale:
        chosen.append(LearnedScale(model))
    if not quant.averaged_scales:
        chosen.append(FirstUseScales(ema))
    if quant.dampening:
        chosen.append(Dampening(quant, model, n_warmup))
    if quant.freeze_threshold:
        chosen.append(Freezing(quant, model, n_warmup))
    return chosen


class WarmUp(Stabiliser):
    """Trains a first share of the epochs with float or 8-bit weights, then with the scheme's bits: model and EMA alike.

    The epoch alone decides between the two. At the switch learned scales are set to the abs-max again, because they
    get no gradient from float weights. Float first, then low bits: Krishnamoorthi, arXiv:1806.08342, section 3.2.
    """

    def __init__(self, quant: Quant, n_epochs: int, models: tuple[nn.Module, ...]) -> None:
        self.bits: Literal["float", 8] = quant.warmup_bits
        self.n_epochs = n_epochs
        self.models = models
        self.in_force: bool | None = None  # whether this process has set the warm-up's bits; None: it has set no bits
        self.was_warm = False  # whether the epoch before was part of the warm-up; comes from last.pt after a resume

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
    """Gives every quantized layer of `model` these bits instead of the scheme's; None restores the scheme's."""
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            proxy = cast(Any, layer.weight_quant)
            proxy.disable_quant = bits == "float"
            bit_width = proxy.tensor_quant.msb_clamp_bit_width_impl.bit_width
            bit_width.value.fill_(8 if bits == 8 else own_bits(layer))
    attach(model)


def own_bits(layer: QuantConv2d) -> int:
    """Bits that the scheme gives the layer, also while a warm-up uses others."""
    return cast(Any, layer.weight_quant).quant_injector.bit_width


class LearnedScale(Stabiliser):
    """LSQ's gradient scale g = 1 / sqrt(N Qp) for a channel of N weights and the largest code Qp, in the log domain.

    Esser et al., "Learned Step Size Quantization", ICLR 2020: with the step s -= lr g dL/ds a scale s moves, relative
    to its size, as fast as the weights. Here the parameter is v = log2(s Qp), so the same move is
    v -= lr g dL/dv / (s ln 2)**2. That gradient is clamped to -1..1: with learning rate lr one step changes a scale by
    a factor of 2**lr at most, while an unclamped step of LSQ can turn it negative. The clamp hides an infinite gradient
    from the GradScaler, but the gradient of the layer's weights is infinite too and shows it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(learned_layers(model).values())

    @torch.no_grad()
    def before_step(self, grad_scale: float) -> None:
        for layer in self.layers:
            value = cast(nn.Parameter, scale_parameter(layer))
            if value.grad is None:
                continue
            largest = 2 ** (own_bits(layer) - 1) - 1
            lsq_factor = 1 / math.sqrt(layer.weight[0].numel() * largest)
            # 1 / (s ln 2)**2 with s = 2**v / largest
            factor = torch.exp2(-2 * value).mul_(lsq_factor * (largest / math.log(2)) ** 2)
            value.grad.mul_(factor).clamp_(-grad_scale, grad_scale)


def exempt_scales_from_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Moves learned scales from Ultralytics' optimizer group with weight decay to BatchNorm's, which has none."""
    groups = {group["param_group"]: group["params"] for group in optimizer.param_groups}
    scales = [cast(nn.Parameter, scale_parameter(layer)) for layer in learned_layers(model).values()]
    scale_ids = {id(scale) for scale in scales}
    groups["weight"][:] = [parameter for parameter in groups["weight"] if id(parameter) not in scale_ids]
    groups["bn"].extend(scales)


class FirstUseScales(Stabiliser):
    """Keeps the EMA copy's decoupled scales at their values after the first epoch, instead of averaging them.

    This reproduces what Ultralytics' EMA (8.4.190) does with Brevitas' decoupled scales (0.13.4) if nobody intervenes.
    Brevitas sets such a scale in a layer's first forward, to the L2 mean of the channels' abs-max; before it the scale
    is not in state_dict. The EMA copy is made before any forward and ModelEMA pairs the entries of the two state_dicts
    at the first step, so the copy's scales are left out. The first validation sets them, and they follow the trained
    scales no more. Here they are set right after the first validation, which still scores averaged scales.
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
    """Pulls every weight w to its quantized value w_hat: adds the gradient of lambda ||w_hat - clip(w)||^2.

    With w_hat as a constant that is 2 lambda (w - w_hat), and 0 for a clipped weight. Nagel et al., "Overcoming
    Oscillations in Quantization-Aware Training", ICML 2022, section 4.2.
    """

    def __init__(self, quant: Quant, model: nn.Module, first_epoch: int) -> None:
        self.quant = quant
        self.model = model
        self.first_epoch = first_epoch
        self.active = True

    def start_epoch(self, epoch: int) -> None:
        self.active = epoch >= self.first_epoch

    @torch.no_grad()
    def before_step(self, grad_scale: float) -> None:
        if not self.active:
            return
        for quantized in read_codes(self.model):
            weight = quantized.layer.weight
            if weight.grad is None:
                continue
            is_clipped = weight > quantized.largest * quantized.scale
            is_clipped |= weight < quantized.lowest * quantized.scale
            error = (weight - quantized.codes * quantized.scale).masked_fill_(is_clipped, 0.0)
            weight.grad.add_(error, alpha=2 * self.quant.dampening * grad_scale)


class Freezing(Stabiliser):
    """Freezes the code of a weight that oscillates too often. Nagel et al., ICML 2022, section 4.3, algorithm 1.

    A weight oscillates in a step (o = 1, else 0) when its code changes in the direction opposite to its last change.
    Its frequency is the moving average f = m o + (1 - m) f, with m = quant.freeze_momentum. When f exceeds
    quant.freeze_threshold, the code is fixed at the rounded moving average of the codes: after every later step the
    weight is set to code * scale. The scale still moves.

    State: flat tensors over all quantized weights of the model; empty until the first step at the scheme's bits.
    """

    def __init__(self, quant: Quant, model: nn.Module, first_epoch: int) -> None:
        self.quant = quant
        self.model = model
        self.first_epoch = first_epoch
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
        if self.state:
            # Undo the optimizer's step of frozen weights before the scales are read: it may have moved an abs-max.
            self._hold(read_codes(self.model), self.state["scale"])
        layers = read_codes(self.model)
        codes = torch.cat([quantized.codes.flatten() for quantized in layers])
        scales = torch.cat([quantized.scale.flatten() for quantized in layers])
        if not self.state:
            self.state = _unfrozen(codes)
        self._track(codes)
        self.state["scale"] = scales
        self._hold(layers, scales)

    def _track(self, codes: torch.Tensor) -> None:
        """Updates frequencies, moving averages and the set of frozen weights from the codes after a step, [n]."""
        state, momentum = self.state, self.quant.freeze_momentum
        direction = (codes - state["codes"]).sign_().to(torch.int8)
        oscillates = direction * state["direction"] < 0
        state["frequency"].lerp_(oscillates.float(), momentum)
        state["mean"] = torch.where(state["frozen"], state["mean"], state["mean"].lerp(codes, momentum))
        newly_frozen = (state["frequency"] > self.quant.freeze_threshold) & ~state["frozen"]
        state["mean"] = torch.where(newly_frozen, state["mean"].round(), state["mean"])
        state["frozen"] |= newly_frozen
        state["direction"] = torch.where(direction == 0, state["direction"], direction)
        state["codes"] = codes.to(torch.int8)

    def _hold(self, layers: list[Codes], scales: torch.Tensor) -> None:
        """Writes code * scale to the frozen weights; `scales` [n] holds those of all layers, one a channel."""
        n_weights = [quantized.codes.numel() for quantized in layers]
        n_scales = [quantized.scale.numel() for quantized in layers]
        frozen_parts = self.state["frozen"].split(n_weights)
        mean_parts = self.state["mean"].split(n_weights)
        parts = zip(layers, frozen_parts, mean_parts, scales.split(n_scales), strict=True)
        for quantized, frozen, mean, scale in parts:
            weight = quantized.layer.weight
            held = mean.view(weight.shape) * scale.view(quantized.scale.shape)
            weight.copy_(torch.where(frozen.view(weight.shape), held, weight))


def _unfrozen(codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of Freezing before its first step, from the codes [n] after that step."""
    zeros = torch.zeros_like(codes, dtype=torch.int8)
    return {
        "codes": codes.to(torch.int8),
        "direction": zeros,
        "frozen": zeros.bool(),
        "mean": codes.clone(),
        "frequency": torch.zeros_like(codes),
    }
