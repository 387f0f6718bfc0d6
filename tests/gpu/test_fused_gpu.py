"""The fast path on a real GPU: equal to Brevitas, and a QAT step that costs what an FP16 step costs.

pytest -m gpu tests/gpu/test_fused_gpu.py -s
"""

from __future__ import annotations

import logging
import statistics
import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from brevitas.quant import Int4WeightPerTensorFloatDecoupled, Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

from app.core.config import load
from app.quant.fused import FastQuantConv2d, attach
from app.quant.learned import reset_scales
from app.quant.model import build
from app.quant.schemes import LEARNED, full_range

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]
log = logging.getLogger(__name__)

# Only the element that is the absmax gets the scale's gradient. That is a difference of two sums whose terms add up to
# `mass` in size; kernel and torch add in different orders and agree to this share of the mass (float32 has 1.2e-7).
SUM_RTOL = 1e-5
# What issue 5 asks for on an H200, YOLOv10m, 640 px: QAT step / FP16 step by batch, and peak memory.
STEP_RATIO = {32: 1.10, 64: 1.05}
MEMORY_RATIO = 1.02
ROUNDS = 12


class Int4PerChannel(Int8WeightPerChannelFloat):
    bit_width = 4


class Int4PerTensor(Int8WeightPerTensorFloat):
    bit_width = 4


KINDS = [
    Int4PerChannel, Int8WeightPerChannelFloat, Int4PerTensor, Int8WeightPerTensorFloat, LEARNED[4],
    Int4WeightPerTensorFloatDecoupled, full_range(Int4PerChannel),
]  # fmt: skip


class Weights(nn.Module):
    """A model whose forward gives what its layers would convolve with."""

    def __init__(self, shapes: list[torch.Size], quantizer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [FastQuantConv2d(n[1], n[0], (n[2], n[3]), bias=False, weight_quant=quantizer) for n in shapes]
        self.layers: Any = nn.ModuleList(layers)
        for layer, shape in zip(layers, shapes, strict=True):
            layer.weight.data = torch.randn(shape) * 0.1
        layers[1].weight.data[0] = 0.0  # a dead channel
        layers[1].weight.data[1, 0] = -3.0  # tied maxima
        reset_scales(self)
        for layer in layers:
            layer.quant_weight()  # a decoupled scale is made at its first use
        attach(self)

    def forward(self) -> list[torch.Tensor]:
        return [layer._fast_weight for layer in self.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", ["n", "m"])
def test_equals_brevitas(size: str, kind: Any, order: torch.memory_format, dtype: torch.dtype) -> None:
    convs = DetectionModel(f"yolov10{size}.yaml", verbose=False).modules()
    shapes = sorted({layer.weight.shape for layer in convs if isinstance(layer, nn.Conv2d)})
    weights: Any = Weights(shapes, kind)
    model = weights.cuda().to(memory_format=order)
    latent = [layer.weight for layer in model.layers]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        plain = [layer.quant_weight() for layer in model.layers]
        fast = model()
    upstream = [torch.randn_like(value) for value in fast]
    pairs = zip(torch.autograd.grad(fast, latent, upstream), brevitas_gradients(plain, latent, upstream), strict=True)
    for (ours, theirs), value, of, weight, grad in zip(pairs, fast, plain, latent, upstream, strict=True):
        assert torch.equal(value, of.value.to(dtype))
        assert value.stride() == weight.stride()
        check_gradient(kind, ours, theirs, weight.detach(), grad.float(), of)


def brevitas_gradients(plain: list[Any], latent: list[torch.Tensor], upstream: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(
        [of.value.to(up.dtype) for of, up in zip(plain, upstream, strict=True)], latent, upstream
    )


def check_gradient(
    kind: Any, ours: torch.Tensor, theirs: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, of: Any
) -> None:  # fmt: skip
    dims = (1, 2, 3) if of.scale.ndim else (0, 1, 2, 3)
    of_max = (1, 2, 3) if kind is Int4WeightPerTensorFloatDecoupled else dims  # its step is made of every channel's
    is_max = weight.abs() == weight.abs().amax(of_max, keepdim=True)
    assert torch.equal(ours[~is_max], theirs[~is_max])
    mass = (grad * weight / of.scale).abs().sum(dims, keepdim=True)
    assert ((ours - theirs).abs() <= SUM_RTOL * (mass + theirs.abs())).all()


def test_network_step_equals_plain_brevitas() -> None:
    """Losses of the first step: the weights are equal, so the forward is the same computation."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain, fast = (arm(f"quant.fast_path={on}", size="n") for on in ("false", "true"))
    batch = synthetic(8, 320)
    losses = []
    for model in (plain, fast, deepcopy(fast)):
        with torch.autocast("cuda", torch.float16):
            losses.append(model(batch)[0].sum())
    torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("batch_size", STEP_RATIO)
def test_step_costs_what_an_fp16_step_costs(batch_size: int) -> None:
    arms = {"fp16": arm(variant="fp16"), "qat": arm("quant.fast_path=true"), "brevitas": arm("quant.fast_path=false")}
    batch = synthetic(batch_size, 640)
    times: dict[str, list[float]] = {name: [] for name in arms}
    peak = dict.fromkeys(arms, 0)
    for i in range(ROUNDS + 3):
        for name, model in arms.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = step(model, batch)
            if i >= 3:
                times[name].append(seconds)
                peak[name] = torch.cuda.max_memory_allocated() - before
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    log.warning("batch %d: median ms %s, peak MiB %s", batch_size, medians, {k: v >> 20 for k, v in peak.items()})
    assert peak["qat"] <= MEMORY_RATIO * peak["fp16"]
    assert medians["qat"] <= STEP_RATIO[batch_size] * medians["fp16"]


def arm(*sets: str, variant: str = "qat", size: str = "m") -> nn.Module:
    model: Any
    model, _ = build(load(variant, [], [f"model=yolov10{size}.yaml", *sets]))
    model.args = DEFAULT_CFG
    return model.cuda().train()


def synthetic(batch_size: int, px: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    n_boxes = 7 * batch_size
    return {
        "img": torch.rand(batch_size, 3, px, px, device="cuda"),
        "batch_idx": torch.arange(batch_size, device="cuda").repeat_interleave(7).float(),
        "cls": torch.randint(0, 80, (n_boxes, 1), device="cuda").float(),
        "bboxes": torch.rand(n_boxes, 4, device="cuda") * 0.4 + 0.1,
    }


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of forward, loss and backward; the gradients are dropped outside the clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast("cuda", torch.float16):
        loss = model(batch)[0].sum()
    loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds
