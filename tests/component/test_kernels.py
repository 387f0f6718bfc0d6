"""Triton's kernels in Triton's interpreter, against the torch version that is bit-equal to Brevitas.

The interpreter has to be chosen before Triton is imported, so the test runs this file as a script.
"""

from __future__ import annotations

from typing import Any

import torch

from app.quant import learned
from app.quant.fused import _EachInTurn, _Together
from app.quant.kernels import Kind, Layout, Spec
from tests.support.hand_layers import exactly, small_weights
from tests.support.interpreter import run_in_interpreter

# The kernel adds up the scale's gradient in another order than torch. The sum of up to 1,100 terms of size 1 / scale
# cancels partly; it reaches only the elements that are the absmax.
SUM_RTOL = 1e-5
# The largest code of each of the five weights.
AT_4_AND_8_BITS, AT_OTHER_BITS = (7, 127, 7, 127, 7), (1, 3, 15, 31, 63)


def test_kernels_equal_the_torch_version_in_the_interpreter() -> None:
    done = run_in_interpreter(__file__)
    assert done.returncode == 0, done.stderr


def compare_kernels(largest_codes: tuple[int, ...], is_narrow: bool) -> None:
    """Forward and straight-through gradients are equal; where |w| is the absmax, up to the order of one sum."""
    bad = torch.randn(4, 2, 3, 3)
    bad[0, 0, 0, 0], bad[1, 1, 1, 1], bad[2] = float("nan"), float("inf"), 1e30
    more_than_a_block = torch.randn(2, 1100, 1, 1)
    specs = []
    for per_tensor in (False, True):
        specs += [Spec(largest, per_tensor, is_narrow=is_narrow) for largest in largest_codes]
    for order in (torch.contiguous_format, torch.channels_last):
        one_scale_kind = [w.to(memory_format=order) for w in (*small_weights(), more_than_a_block, bad)]
        weights = [w.clone().requires_grad_() for w in one_scale_kind * 2]
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(4)
            theirs: Any = _EachInTurn.apply(specs, dtype, *weights)
            ours: Any = _Together.apply(Layout(weights, specs), dtype, *weights)
            exactly(ours, theirs)
            assert [a.stride() for a in ours] == [b.stride() for b in weights]
            upstream = [
                torch.randn(value.shape).to(dtype) for value in ours
            ]  # contiguous for channels_last weights too
            gradients = (
                torch.autograd.grad(out[1:], weights, upstream[1:], allow_unused=True) for out in (ours, theirs)
            )
            compare_gradients(weights, *gradients)


def compare_learned(kind: Kind, largest_codes: tuple[int, ...]) -> None:
    """As compare_kernels, for learned scales: the gradients of steps and scales are equal up to the order of a sum."""
    is_decoupled = kind == "decoupled"
    bad = torch.randn(4, 2, 3, 3)
    bad[0, 0, 0, 0], bad[1, 1, 1, 1], bad[2] = float("nan"), float("inf"), 1e30
    more_than_a_block = torch.randn(2, 1100, 1, 1)
    for order in (torch.contiguous_format, torch.channels_last):
        weights = [w.to(memory_format=order).requires_grad_() for w in (*small_weights(), more_than_a_block, bad)]
        layout = Layout([w.detach() for w in weights], [Spec(n, is_decoupled, kind) for n in largest_codes])
        dims = (0, 1, 2, 3) if is_decoupled else (1, 2, 3)
        clipped = [w.detach().abs().nan_to_num(1.0, 1.0).clamp_max(9.0).amax(dims).flatten() * 0.6 for w in weights]
        steps = (torch.cat(clipped).clamp_min(1e-10) / layout.largest).requires_grad_()
        scales = (steps.detach() * 1.7).requires_grad_()
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(4)
            nodes = (learned._Together, learned._EachInTurn)
            both: list[Any] = [node.apply(layout, is_decoupled, dtype, steps, scales, *weights) for node in nodes]
            exactly(*both)
            upstream = [torch.randn(value.shape).to(dtype) for value in both[0]]
            inputs = (steps, scales, *weights)
            ours, theirs = (torch.autograd.grad(out[1:], inputs, upstream[1:], allow_unused=True) for out in both)
            torch.testing.assert_close(ours[:2], theirs[:2], rtol=SUM_RTOL, atol=SUM_RTOL, equal_nan=True)
            exactly(ours[2:], theirs[2:])
            assert ours[2] is None


def compare_gradients(weights: list[torch.Tensor], ours: Any, theirs: Any) -> None:
    assert ours[0] is None
    assert theirs[0] is None
    for weight, actual, expected in zip(weights[1:], ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=SUM_RTOL, atol=SUM_RTOL, equal_nan=True)
        is_max = weight.abs() == weight.abs().amax((1, 2, 3), keepdim=True)
        exactly(actual[~is_max], expected[~is_max])


if __name__ == "__main__":
    for codes in (AT_4_AND_8_BITS, AT_OTHER_BITS):
        compare_kernels(codes, is_narrow=True)
        compare_kernels(codes, is_narrow=False)
        compare_learned("lsq", codes)
    compare_learned("decoupled", AT_4_AND_8_BITS)
