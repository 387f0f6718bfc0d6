"""Which of several equal maxima gets the scale's gradient: the first in logical order, whatever the memory order is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.hand_layers import hand_conv, weight_of
from tests.support.kernel_ties import GRADIENT, TIED

ROOT = Path(__file__).parents[2]
# Shares of a gradient: 0.6 / 7 from a sum of four terms in float32.
RTOL = 1e-6


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "Brevitas"])
def test_first_maximum_in_logical_order_gets_the_gradient(order: torch.memory_format, fast: bool) -> None:
    """One channel [2,1,3]: 1.2, 0.4, 7 | -7, 0, 0. In channels_last memory the -7 comes before the 7."""
    model = hand_conv([[0.0, 0.0]], fast=fast)
    weight = weight_of(model)
    weight.data = torch.tensor(TIED).view(1, 2, 1, 3).contiguous(memory_format=order)
    model(torch.ones(1, 2, 1, 3)).sum().backward()  # the kernel fits once, so that dL/dq is 1 everywhere
    gradient = weight.grad
    assert gradient is not None
    assert gradient.flatten().tolist() == pytest.approx(GRADIENT, rel=RTOL)


def test_kernel_takes_the_first_maximum_in_logical_order() -> None:
    """Triton's interpreter has to be chosen before Triton is imported, so this is a process of its own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    program = ROOT / "tests" / "support" / "kernel_ties.py"
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
