"""Losses are looked at without waiting for the GPU: two values late, and at once where a checkpoint asks.

pytest -m gpu tests/gpu/test_nonfinite_gpu.py
"""

from __future__ import annotations

import pytest
import torch

from app.train.nonfinite import GPU_LAG, NonFinite, Watch

pytestmark = pytest.mark.gpu
BAD = 3


def add(watch: Watch, number: int) -> None:
    watch.next(number, {"img": torch.zeros(1)})
    watch.add_loss(torch.tensor(float("nan") if number == BAD else 1.0, device="cuda"))
    watch.add_step(None)


def test_the_batch_is_named_two_values_later() -> None:
    watch = Watch(torch.device("cuda"))
    for number in range(BAD + GPU_LAG):
        add(watch, number)
    with pytest.raises(NonFinite, match="the loss is not finite") as fault:
        add(watch, BAD + GPU_LAG)
    assert [number for number, _ in fault.value.batches] == [BAD]


def test_a_checkpoint_waits_for_all_values() -> None:
    watch = Watch(torch.device("cuda"))
    for number in range(BAD + 1):
        add(watch, number)
    with pytest.raises(NonFinite):
        watch.check()
