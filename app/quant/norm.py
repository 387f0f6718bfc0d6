"""BatchNorm, SiLU and shortcut as one autograd node while a network trains on a GPU; else Ultralytics' own layers.

The layers stay Ultralytics' and PyTorch's, with the same state_dict: `install` gives them the forwards below. These use
the kernels of norm_kernels.py where a BatchNorm2d trains on a GPU. In eval mode, on the CPU, in an export and while
BatchNorm is re-estimated (momentum None) they compute what the layers that they replace compute.

A training-mode forward keeps the convolution's output alone for the backward; PyTorch keeps BatchNorm's output too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from ultralytics.nn.modules.block import CIB, Bottleneck, C2f, C2fCIB
from ultralytics.nn.modules.conv import Conv, DWConv

from app.quant import norm_kernels
from app.quant.norm_kernels import Matrix, Norm, Output, as_matrix

MIN_HALF = 16  # channels: a half of fewer channels is not written as a tensor of its own
Tensors = tuple[torch.Tensor, ...]


def install(model: nn.Module) -> None:
    """Gives the layers of a YOLOv10 the forwards of this module. Subclasses of their classes keep their own."""
    forwards: dict[type, type] = {
        Conv: FusedConv, DWConv: FusedConv, C2f: FusedC2f, C2fCIB: FusedC2f, Bottleneck: FusedBottleneck,
        CIB: FusedCIB, nn.Upsample: SameTypeUpsample,
    }  # fmt: skip
    for layer in model.modules():
        fused = forwards.get(type(layer))
        if fused and (fused is not FusedConv or isinstance(layer.act, (nn.SiLU, nn.Identity))):
            layer.__class__ = fused


class FusedConv(Conv):
    """Convolution, BatchNorm and activation."""

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None, halves: bool = False) -> Any:
        """act(bn(conv(x))) + shortcut, or with `halves` its two halves of the channels as a tuple of two tensors."""
        y = self.conv(x)
        if self.training and trains_on_gpu(self.bn, y):
            return norm_act(self.bn, y, isinstance(self.act, nn.SiLU), shortcut, halves)
        y = self.act(self.bn(y))
        if shortcut is not None:
            y = shortcut + y
        return y.chunk(2, 1) if halves else y


class FusedC2f(C2f):
    """C2f whose first convolution writes both halves as tensors of their own.

    A convolution copies a slice of a wider channels_last tensor before it reads it, and autograd joins the gradients of
    two slices by another copy.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(cast(FusedConv, self.cv1)(x, halves=True))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class FusedBottleneck(Bottleneck):
    """Two convolutions, the second of which adds the shortcut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cv2(self.cv1(x), shortcut=x if self.add else None)


class FusedCIB(CIB):
    """A chain of convolutions, the last of which adds the shortcut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *inner, last = self.cv1
        y = x
        for layer in inner:
            y = layer(y)
        return last(y, shortcut=x if self.add else None)


class SameTypeUpsample(nn.Upsample):
    """Nearest neighbours in the input's type. Autocast computes them in float32, with the same values."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)


def trains_on_gpu(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    """Whether the kernels compute this BatchNorm of x."""
    return norm.training and x.is_cuda and norm.momentum is not None and norm.weight.dtype == torch.float32


def norm_act(
    norm: nn.BatchNorm2d, x: torch.Tensor, act: bool, shortcut: torch.Tensor | None = None, halves: bool = False
) -> Any:
    """BatchNorm of x in training mode, then SiLU if `act`, then + shortcut; running statistics move as in PyTorch.

    Args:
        x: [N,C,H,W], float16, bfloat16 or float32; channels_last, or a channel slice of it, is not copied.
        shortcut: like x, or None.
        halves: two tensors with half of the channels each, instead of one.

    Returns:
        a tensor like x in channels_last, or a tuple of two.
    """
    own_halves = halves and x.shape[1] % (2 * MIN_HALF) == 0
    params = (norm.weight, norm.bias, x, shortcut)
    parts = cast(Tensors, _NormAct.apply(norm, act, own_halves, *params))
    if not halves:
        return parts[0]
    return parts if own_halves else parts[0].chunk(2, 1)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - one argument a tensor
        ctx: Any, norm: Any, act: bool, halves: bool, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor,
        shortcut: torch.Tensor | None,
    ) -> Tensors:  # fmt: skip
        rows = as_matrix(x)
        cut = norm_kernels.plan(x, 2 if halves else 1)
        values = Norm(
            weight, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.eps, norm.momentum
        )
        added = None if shortcut is None else as_matrix(shortcut)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            stats = norm_kernels.statistics(rows, cut, values)
            parts = [as_matrix(_empty_part(x, cut.n_halves)) for _ in range(cut.n_halves)]
            norm_kernels.apply(rows, cut, stats, values, Output(act, added, parts))
        ctx.save_for_backward(rows.tensor, stats, weight, bias)
        ctx.stride, ctx.act, ctx.cut = rows.stride, act, cut
        return tuple(part.tensor for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, stats, weight, bias = ctx.saved_tensors
        upstream = Output(ctx.act, None, [as_matrix(grad) for grad in grads])
        with torch.cuda.device_of(x):
            x_grad, weight_grad, bias_grad = norm_kernels.gradients(
                Matrix(x, ctx.stride), ctx.cut, stats, (weight, bias), upstream
            )
        shortcut_grad = None
        if ctx.needs_input_grad[-1]:  # a shortcut is never cut into halves
            shortcut_grad = grads[0]
        return None, None, None, weight_grad, bias_grad, x_grad, shortcut_grad


def _empty_part(x: torch.Tensor, n_halves: int) -> torch.Tensor:
    n, channels, height, width = x.shape
    return torch.empty(
        n, channels // n_halves, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
