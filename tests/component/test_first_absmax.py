"""Which of several equal maxima gets the scale's gradient: the first in logical order, whatever the memory order is."""

from __future__ import annotations

import pytest
import torch

from app.core.environment import REPO_DIR
from tests.support.hand_layers import hand_conv, weight_of
from tests.support.interpreter import run_in_interpreter
from tests.support.kernel_ties import GRADIENT, TIED

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
    done = run_in_interpreter(REPO_DIR / "tests" / "support" / "kernel_ties.py")
    assert done.returncode == 0, done.stderr
