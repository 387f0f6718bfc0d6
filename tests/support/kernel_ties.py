"""The fast path's kernels on weights with equal maxima, in Triton's interpreter: run with TRITON_INTERPRET=1.

What is expected is worked by hand for one channel, and with NumPy for seeded weights that are full of ties.
"""

from __future__ import annotations

import numpy as np
import torch

from app.quant.kernels import Layout, Spec, gradient, quantize

# One channel [2,1,3], scale 1, codes 1, 0, 7, -7, 0, 0. With an upstream gradient of ones, that of the scale is
# sum(code - weight) = -0.2 - 0.4 = -0.6; a seventh of it goes to the first maximum, the 7. In channels_last memory the
# order is 1.2, -7, 0.4, 0, 7, 0: there the -7 comes first, and at another place than that of the 7 in logical order.
TIED = [1.2, 0.4, 7.0, -7.0, 0.0, 0.0]
FIRST = 2
GRADIENT = [1.0, 1.0, 1.0 - 0.6 / 7, 1.0, 1.0, 1.0]
SHAPES = [(3, 5, 3, 3), (4, 7, 1, 2), (5, 1, 3, 3), (2, 600, 1, 3)]  # the last one is longer than a block of 1024
# The scale's gradient is a sum of up to 1,800 float32 terms in another order than NumPy's.
SUM_RTOL = 1e-4
ORDERS = (torch.contiguous_format, torch.channels_last)


def by_hand() -> None:
    for order in ORDERS:
        weight = torch.tensor(TIED).view(1, 2, 1, 3).contiguous(memory_format=order)
        layout = Layout([weight], [Spec(7, per_tensor=False)])
        flat = layout.join([weight])
        _, absmax, pick = quantize(flat, layout, torch.float32)
        assert (absmax.tolist(), pick.tolist()) == ([7.0], [FIRST]), (order, absmax, pick)
        [out] = layout.split(gradient(torch.ones(6), flat, layout, absmax, pick))
        np.testing.assert_allclose(out.flatten().numpy(), GRADIENT, rtol=1e-6)


def seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randint(-3, 4, shape, generator=generator).float() for shape in SHAPES]  # of seven values: ties
    upstream = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for order in ORDERS:
        weights = [weight.contiguous(memory_format=order) for weight in plain]
        layout = Layout(weights, [Spec(7, per_tensor=False)] * len(weights))
        flat = layout.join(weights)
        out, absmax, pick = quantize(flat, layout, torch.float32)
        grads = layout.split(gradient(layout.join(upstream), flat, layout, absmax, pick))
        firsts = [np.abs(weight.flatten(1).numpy()).argmax(1) for weight in plain]  # argmax gives the first
        assert pick.tolist() == np.concatenate(firsts).tolist(), order
        for weight, value, grad, up, first in zip(plain, layout.split(out), grads, upstream, firsts, strict=True):
            check(weight.flatten(1).numpy(), value.flatten(1).numpy(), None, first)
            check(weight.flatten(1).numpy(), grad.flatten(1).numpy(), up.flatten(1).numpy(), first)


def check(weight: np.ndarray, got: np.ndarray, upstream: np.ndarray | None, first: np.ndarray) -> None:
    """Fake-quantized weights [channels,n], or with `upstream` their gradient, against float64."""
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(7)
    codes = np.rint(weight / scale).astype(np.float64)
    if upstream is None:
        np.testing.assert_allclose(got, codes * scale, rtol=1e-6)
        return
    of_scale = (upstream * (codes - weight.astype(np.float64) / scale)).sum(1)
    rows = np.arange(len(weight))
    expected = upstream.astype(np.float64)
    expected[rows, first] += of_scale / 7 * np.sign(weight[rows, first])
    np.testing.assert_allclose(got, expected, rtol=SUM_RTOL, atol=SUM_RTOL)


if __name__ == "__main__":
    by_hand()
    seeded()
