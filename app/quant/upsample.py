"""Nearest-neighbour upsampling by two in channels_last memory, and its gradient, as Triton kernels.

PyTorch's kernels take ten times as long for channels_last float16, and autocast has them compute in float32.
"""

# Triton's types do not describe a launch, nor a function of kernels that returns several values.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK = 1024  # elements of a program


def double(x: torch.Tensor) -> torch.Tensor:
    """[N,C,H,W] -> [N,C,2H,2W] of the same type, in channels_last; every value four times."""
    return cast(torch.Tensor, _Double.apply(x))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, channels, height, width = x.shape
        out = torch.empty(
            n, channels, 2 * height, 2 * width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _spread[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), channels, width, BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0]
        if grad.stride(1) != 1:
            grad = grad.contiguous(memory_format=torch.channels_last)
        n, channels, height, width = grad.shape
        out = torch.empty(
            n, channels, height // 2, width // 2, dtype=grad.dtype, device=grad.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        with torch.cuda.device_of(grad):
            _gather[(triton.cdiv(out.numel(), BLOCK),)](
                grad, out, out.numel(), channels, height // 2, width // 2, grad.stride(0), grad.stride(2),
                grad.stride(3), BLOCK=BLOCK,
            )  # fmt: skip
        return out


@triton.jit
def _spread(x, out, n_elements, channels, width, BLOCK: tl.constexpr):  # noqa: PLR0913 - a kernel takes pointers
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < n_elements
    pixel = element // channels
    line = pixel // width  # of all images together
    value = tl.load(x + element, mask=mask)
    place = (line * 4 * width + pixel % width * 2) * channels + element % channels
    tl.store(out + place, value, mask=mask)
    tl.store(out + place + channels, value, mask=mask)
    tl.store(out + place + 2 * width * channels, value, mask=mask)
    tl.store(out + place + (2 * width + 1) * channels, value, mask=mask)


@triton.jit
def _gather(  # noqa: PLR0913
    grad, out, n_elements, channels, height, width, image_stride, line_stride, pixel_stride, BLOCK: tl.constexpr
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < n_elements
    pixel = element // channels
    line = pixel // width
    place = grad + line // height * image_stride + line % height * 2 * line_stride
    place += pixel % width * 2 * pixel_stride + element % channels
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + pixel_stride, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + line_stride, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + line_stride + pixel_stride, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=mask)
