"""The kernels of BatchNorm + SiLU + shortcut and of upsampling in Triton's interpreter, against PyTorch in float64.

The interpreter has to be chosen before Triton is imported, so the test runs this file as a script.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from ultralytics.nn.modules.block import C2f, C2fCIB
from ultralytics.nn.modules.conv import Conv

from app.quant import norm
from app.quant.norm import Slices, install, norm_act
from app.quant.upsample import double
from tests.support.interpreter import run_in_interpreter

NHWC = torch.channels_last
# Relative errors in the 2-norm: one rounding to the type of the result; float32 sums of up to 1,000 terms.
LIMIT = {torch.float16: 4e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
# The mean itself is rounded to float32: 300 std * 2**-24 is 2e-5 of a std.
LIMIT_FAR_MEAN = 5e-5


def test_kernels_equal_pytorch_in_the_interpreter() -> None:
    done = run_in_interpreter(__file__)
    assert done.returncode == 0, done.stderr


def test_on_the_cpu_installed_layers_compute_what_they_replace() -> None:
    stock = nn.Sequential(C2f(16, 16, 1, True), C2fCIB(16, 16, 1, True, True), nn.Upsample(None, 2, "nearest"))
    fused = deepcopy(stock)
    install(fused)
    assert list(fused.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 16, 4, 4)
    for mode in (True, False):
        assert torch.equal(fused.train(mode)(x), stock.train(mode)(x))


@pytest.mark.parametrize(
    ("trains", "momentum", "grad", "traces", "expected"),
    [(True, 0.03, True, False, True), (True, 0.25, False, False, True), (True, None, True, False, False),
     (False, 0.03, False, False, True), (False, 0.03, True, False, False), (False, 0.03, False, True, False)],
    ids=["training", "re-estimation", "cumulative", "validation", "correction", "export"],
)  # fmt: skip
def test_the_kernels_run_in_training_and_where_eval_needs_no_gradient(
    monkeypatch: pytest.MonkeyPatch, trains: bool, momentum: float | None, grad: bool, traces: bool, expected: bool
) -> None:
    layer = Conv(4, 4)
    layer.bn.train(trains).momentum = momentum
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: traces)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    with torch.set_grad_enabled(grad):
        assert norm.uses_kernels(layer, on_gpu) == expected
        assert not norm.uses_kernels(layer, torch.zeros(1))
        assert not norm.uses_kernels(deepcopy(layer).half(), on_gpu)


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach().double() - expected).norm() / expected.norm().clamp(min=1e-9))


def wide_slice(shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float = 0.5) -> torch.Tensor:
    """A channel slice of a wider tensor, which the kernels read without a copy."""
    n, channels, height, width = shape
    wide = (torch.randn(n, channels + 16, height, width) * 2 + mean).to(dtype).to(memory_format=NHWC)
    return wide[:, 8 : 8 + channels]


def forward_and_backward(
    run: Callable[[Slices | None], Any], x: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the layer in one of its forms and backward with random gradients; gives its output, and their sum."""
    n, channels, height, width = x.shape
    half = channels // 2
    grad, copy_grad = (wide_slice((n, channels, height, width), x.dtype) for _ in range(2))
    room = torch.empty(n, channels + 16, height, width, dtype=x.dtype).contiguous(memory_format=NHWC)
    if form == "new":
        y = run(None)
        y.backward(grad)
        return y, grad.double()
    if form == "part":
        (y,) = run(Slices([room.narrow(1, 16, channels)], copies=False))
        y.backward(grad)
        return y, grad.double()
    if form == "part and copy":
        y, copy = run(Slices([room.narrow(1, 16, channels)], copies=True))
        assert torch.equal(y, copy)
        assert torch.equal(y, room[:, 16:])
        torch.autograd.backward([y, copy], [grad, copy_grad])
        return y, grad.double() + copy_grad.double()
    first, last, copy = run(Slices([room.narrow(1, 0, half), room.narrow(1, half, half)], copies=True))
    torch.autograd.backward([first, last, copy], [grad[:, :half], grad[:, half:], copy_grad[:, :half]])
    last_grad = grad[:, half:].double() + copy_grad[:, :half].double()
    return torch.cat([first, last], 1), torch.cat([grad[:, :half].double(), last_grad], 1)


def compare(shape: tuple[int, int, int, int], dtype: torch.dtype, act: bool, form: str, mean: float = 0.5) -> None:
    """`form`: a new tensor, part of a wider one, that and a copy, or two halves of which the second has a copy."""
    layer = nn.BatchNorm2d(shape[1], eps=1e-3, momentum=0.03)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    reference: Any = deepcopy(layer).double()
    x = wide_slice(shape, dtype, mean).detach().requires_grad_()
    x_reference = x.detach().double().requires_grad_()
    shortcut = None if form == "halves" else wide_slice(shape, dtype).detach().requires_grad_()
    expected = reference(x_reference)
    expected = functional.silu(expected) if act else expected
    y, expected_grad = forward_and_backward(lambda into: norm_act(layer, x, act, shortcut, into), x, form)
    pairs = [(y, expected)]
    if shortcut is not None:
        pairs[0] = (y, expected + shortcut.double())
        assert distance(shortcut.grad, expected_grad) < LIMIT[dtype]  # pyright: ignore[reportArgumentType]
    expected.backward(expected_grad)
    pairs += [(x.grad, x_reference.grad), (layer.weight.grad, reference.weight.grad)]
    pairs += [(layer.bias.grad, reference.bias.grad), (layer.running_mean, reference.running_mean)]
    pairs += [(layer.running_var, reference.running_var)]
    limit = LIMIT[dtype] if mean < 1 else LIMIT_FAR_MEAN
    assert max(distance(value, wanted) for value, wanted in pairs) < limit, (shape, dtype, act, form, mean)
    assert int(layer.num_batches_tracked) == 1


def compare_blocks() -> None:
    """Blocks of layers, also one whose 48 channels are padded to 64, in training mode and then in eval mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "uses_kernels", lambda layer, x: True)
        blocks = (C2f(16, 32, 2, True), C2f(16, 32, 1), C2fCIB(16, 32, 2, True, True), C2f(48, 96, 1, True))
        for block in blocks:
            fused = deepcopy(block).to(memory_format=NHWC)
            install(fused)
            reference = block.double()
            x = torch.randn(2, block.cv1.conv.in_channels, 4, 4).to(memory_format=NHWC).requires_grad_()
            x_reference = x.detach().double().requires_grad_()
            y, expected = fused(x), reference(x_reference)
            grad = torch.randn_like(y)
            y.backward(grad)
            expected.backward(grad.double())
            pairs = [(y, expected), (x.grad, x_reference.grad)]
            pairs += zip((p.grad for p in fused.parameters()), (p.grad for p in reference.parameters()), strict=True)
            pairs += zip(fused.buffers(), (buffer.double() for buffer in reference.buffers()), strict=True)
            assert max(distance(value, wanted) for value, wanted in pairs) < 1e-5
            before = [buffer.clone() for buffer in fused.buffers()]
            with torch.inference_mode():
                assert distance(fused.eval()(x), reference.eval()(x_reference)) < 1e-5
            assert all(torch.equal(a, b) for a, b in zip(before, fused.buffers(), strict=True))


def compare_eval(dtype: torch.dtype, act: bool) -> None:
    """With running statistics that are not those of the input, and channels whose variance is far below eps."""
    layer = nn.BatchNorm2d(48, eps=1e-3)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.running_mean)  # pyright: ignore[reportArgumentType]
    layer.running_var = torch.rand(48) * torch.tensor([1e-6, 4.0]).repeat(24)
    reference = deepcopy(layer).double().eval()
    x, shortcut = wide_slice((2, 48, 6, 6), dtype), wide_slice((2, 48, 6, 6), dtype)
    expected = reference(x.double())
    expected = functional.silu(expected) if act else expected
    room = torch.empty(2, 64, 6, 6, dtype=dtype).contiguous(memory_format=NHWC)
    with torch.no_grad():
        y = norm_act(layer.eval(), x, act, shortcut)
        first, last, copy = norm_act(
            layer, x, act, None, Slices([room.narrow(1, 0, 24), room.narrow(1, 24, 24)], copies=True)
        )
    assert distance(y, expected + shortcut.double()) < LIMIT[dtype]
    assert distance(torch.cat([first, last], 1), expected) < LIMIT[dtype]
    assert torch.equal(room[:, :48], torch.cat([first, last], 1))
    assert torch.equal(copy, last)


def compare_upsampling() -> None:
    x = torch.randn(2, 16, 3, 5).half().to(memory_format=NHWC).requires_grad_()
    x_reference = x.detach().float().requires_grad_()
    y, expected = double(x), functional.interpolate(x_reference, scale_factor=2, mode="nearest")
    grad = wide_slice((2, 16, 6, 10), torch.float16)
    y.backward(grad)
    expected.backward(grad.float())
    assert torch.equal(y.float(), expected)
    assert torch.equal(x.grad, x_reference.grad.half())  # pyright: ignore[reportOptionalMemberAccess]


if __name__ == "__main__":
    torch.manual_seed(0)
    for form in ("new", "part", "part and copy", "halves"):
        compare((2, 48, 6, 6), torch.float16, act=True, form=form)
        compare((3, 20, 5, 5), torch.float32, act=False, form=form)
    compare((2, 96, 4, 4), torch.bfloat16, act=True, form="part and copy")
    compare((2, 288, 4, 4), torch.float32, act=True, form="halves")
    compare((2, 48, 9, 9), torch.float32, act=True, form="new", mean=600.0)  # 300 std
    compare_eval(torch.float16, act=True)
    compare_eval(torch.float32, act=False)
    compare_blocks()
    compare_upsampling()
