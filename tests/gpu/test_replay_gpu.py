"""Re-estimation of BatchNorm as a CUDA graph on a real GPU.

pytest -m gpu tests/gpu/test_replay_gpu.py
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from app.bench.step import network
from app.core.config import load
from app.quant.batchnorm import reestimate_batchnorm
from app.quant.norm import install
from app.train.replay import Replay, reestimate_by_replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
RTOL = 1e-4  # sums of float32 in another order, through 60 layers of float16


def images(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, 3, 320, 320, generator=generator).cuda()
    return drawn.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_reestimation_by_replay_equals_the_cumulative_average(variant: str) -> None:
    model: Any = network(load(variant, [], ["model=yolov10n.yaml", "train.device=0"])).cuda()
    install(model)
    model.eval().requires_grad_(False)
    other = deepcopy(model)
    batches = [images(4, seed) for seed in range(6)] + [images(3, 9)]
    with torch.autocast("cuda", torch.float16):
        assert reestimate_batchnorm(other, batches) == reestimate_by_replay(model, batches) == 7
    expected = dict(other.named_buffers())
    for name, value in model.named_buffers():
        if "running" in name:
            assert (value - expected[name]).norm() <= RTOL * expected[name].norm(), name
        elif "num_batches" in name:
            assert int(value) == 7, name


def test_replays_compute_what_calls_would() -> None:
    total = torch.zeros((), device="cuda")

    def add(given: torch.Tensor) -> None:
        total.add_(given.sum())

    replay = Replay(add)
    for number in range(4):
        replay(torch.full((3,), float(number), device="cuda"))
    assert replay.graph is not None
    for size in (2, 3):
        replay(torch.ones(size, device="cuda"))
    assert (replay.graph, total.item()) == (None, 18.0 + 5.0)
