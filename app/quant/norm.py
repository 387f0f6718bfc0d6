"""BatchNorm, SiLU and shortcut as one autograd node on a GPU; else Ultralytics' own layers.

The layers stay Ultralytics' and PyTorch's, with the same state_dict: `install` gives them the forwards below. These use
the kernels of norm_kernels.py where a BatchNorm2d trains on a GPU, and in eval mode where nothing needs a gradient. On
the CPU, in a trace and in eval mode with gradients they compute what the layers that they replace compute.

A training-mode forward keeps the convolution's output alone for the backward; PyTorch keeps BatchNorm's output too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from ultralytics.nn.modules.block import CIB, Bottleneck, C2f, C2fCIB
from ultralytics.nn.modules.conv import Conv, DWConv

from app.quant import norm_passes
from app.quant.fused import FastQuantConv2d
from app.quant.norm_passes import Matrix, Norm, Output, as_matrix
from app.quant.upsample import double

SLOW_CHANNELS, FAST_CHANNELS = 48, 64  # of a 3x3 convolution in cuDNN
Tensors = tuple[torch.Tensor, ...]


def install(model: nn.Module) -> None:
    """Gives the layers of a YOLOv10 the forwards of this module. Subclasses of their classes keep their own."""
    forwards: dict[type, type] = {
        Conv: FusedConv, DWConv: FusedConv, C2f: FusedC2f, C2fCIB: FusedC2f, Bottleneck: FusedBottleneck,
        CIB: FusedCIB, nn.Upsample: Doubling,
    }  # fmt: skip
    for layer in model.modules():
        fused = forwards.get(type(layer))
        if fused and (fused is not FusedConv or isinstance(layer.act, (nn.SiLU, nn.Identity))):
            layer.__class__ = fused


def is_installed(model: nn.Module) -> bool:
    """Whether `install` has been called for this network."""
    return any(isinstance(layer, FusedConv) for layer in model.modules())


@dataclass(frozen=True)
class Slices:
    """What a layer writes its output into: parts of a wider tensor, one part or two for the halves of its channels.

    With `copies` it also gives the last part as a tensor of its own. A convolution would copy a slice of a wider
    channels_last tensor before it reads it.
    """

    parts: list[torch.Tensor]
    copies: bool


class FusedConv(Conv):
    """Convolution, BatchNorm and activation."""

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None, into: Slices | None = None) -> Any:
        """act(bn(conv(x))) + shortcut.

        Returns:
            a tensor; with `into`, which only the kernels take, the parts and, if asked for, the copy.
        """
        if uses_kernels(self, x):
            return norm_act(self.bn, _convolve(self.conv, x), isinstance(self.act, nn.SiLU), shortcut, into)
        y = self.act(self.bn(self.conv(x)))
        return y if shortcut is None else shortcut + y


class FusedC2f(C2f):
    """C2f whose convolutions write where the concatenation needs their outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = cast(FusedConv, self.cv1)
        if not uses_kernels(first, x):
            return super().forward(x)
        y = first.conv(x)
        n_blocks = len(self.m)
        whole = _empty(y, (2 + n_blocks) * self.c)
        rooms = [whole.narrow(1, i * self.c, self.c) for i in range(2 + n_blocks)]
        into = Slices(rooms[:2], copies=n_blocks > 0)
        *parts, dense = norm_act(first.bn, y, isinstance(first.act, nn.SiLU), None, into)
        for i, block in enumerate(self.m):
            if i + 1 < n_blocks:
                part, dense = block(dense, Slices([rooms[2 + i]], copies=True))
            else:
                (part,) = block(dense, Slices([rooms[2 + i]], copies=False))
            parts.append(part)
        return self.cv2(cast(torch.Tensor, _Join.apply(_Whole(whole), *parts)))


class FusedBottleneck(Bottleneck):
    """Two convolutions, the second of which adds the shortcut."""

    def forward(self, x: torch.Tensor, into: Slices | None = None) -> Any:
        return self.cv2(self.cv1(x), shortcut=x if self.add else None, into=into)


class FusedCIB(CIB):
    """A chain of convolutions, the last of which adds the shortcut."""

    def forward(self, x: torch.Tensor, into: Slices | None = None) -> Any:
        *inner, last = self.cv1
        y = x
        for layer in inner:
            y = layer(y)
        return last(y, shortcut=x if self.add else None, into=into)


class Doubling(nn.Upsample):
    """Nearest neighbours, on a GPU in the input's type: autocast computes the same in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        doubles = self.mode == "nearest" and self.scale_factor == 2 and self.size is None
        if doubles and input.is_cuda and (self.training or is_plain_eval()):
            return double(input)
        return super().forward(input)


def uses_kernels(layer: Conv, x: torch.Tensor) -> bool:
    """Whether the kernels compute the layer's BatchNorm, x being its input."""
    norm = layer.bn
    if not x.is_cuda or norm.weight.dtype != torch.float32:
        return False
    return norm.momentum is not None if norm.training else is_plain_eval()


def is_plain_eval() -> bool:
    """Whether a layer in eval mode only has to give its output: neither a gradient nor a graph is asked for."""
    return not torch.is_grad_enabled() and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution's output; of a convolution of SLOW_CHANNELS with channels of zeros behind its own.

    cuDNN (9.10 and 9.13, deterministic, H100) computes 64 channels 3.6 times as fast as 48, and their gradients 1.7
    times.
    """
    weight = conv._fast_weight if isinstance(conv, FastQuantConv2d) else conv.weight
    is_slow = conv.in_channels == conv.out_channels == SLOW_CHANNELS and conv.groups == 1 and conv.kernel_size == (3, 3)
    if not is_slow or weight is None or (type(conv) is not nn.Conv2d and not isinstance(conv, FastQuantConv2d)):
        return conv(x)
    missing = FAST_CHANNELS - SLOW_CHANNELS
    wide_weight = functional.pad(weight, (0, 0, 0, 0, 0, missing, 0, missing))
    wide_x = functional.pad(x, (0, 0, 0, 0, 0, missing))
    return functional.conv2d(wide_x, wide_weight, None, conv.stride, cast(Any, conv.padding), conv.dilation)


def norm_act(
    norm: nn.BatchNorm2d, x: torch.Tensor, act: bool, shortcut: torch.Tensor | None = None, into: Slices | None = None
) -> Any:
    """BatchNorm of x, then SiLU if `act`, then + shortcut; in training mode running statistics move as in PyTorch.

    Args:
        norm: its layer.
        x: [N,C,H,W], float16, bfloat16 or float32; channels_last, or a channel slice of it, is not copied. Channels
            beyond those of the norm are padding.
        act: SiLU follows.
        shortcut: like x, or None.
        into: where the output goes; a new tensor by default.

    Returns:
        a tensor like x in channels_last, or a tuple: the parts of `into` and, if asked for, the copy.
    """
    if norm.training and torch.is_grad_enabled():
        outputs = cast(Tensors, _NormAct.apply(norm, act, into, norm.weight, norm.bias, x, shortcut))
    else:  # re-estimation and scoring, whose time is that of the host
        outputs = _passes(norm, act, into, x, shortcut).outputs
    return outputs if into else outputs[0]


@dataclass(frozen=True)
class _Passed:
    """What a forward gives, and what its backward needs; `stats` only in training mode."""

    outputs: Tensors
    rows: Matrix
    stats: torch.Tensor | None
    cut: norm_passes.Plan


def _passes(norm: Any, act: bool, into: Slices | None, x: torch.Tensor, shortcut: torch.Tensor | None) -> _Passed:
    rows = as_matrix(x)
    n_channels = len(norm.weight)
    parts = [_alias(part) for part in into.parts] if into else [_empty(x, n_channels)]
    cut = norm_passes.plan(x, n_channels, len(parts))
    copy = _empty(x, cut.n_part) if into and into.copies else None
    values = Norm(
        norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.eps, norm.momentum
    )
    added = None if shortcut is None else as_matrix(shortcut)
    out = Output(act, [as_matrix(part) for part in parts], None if copy is None else as_matrix(copy), added)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        stats = norm_passes.statistics(rows, cut, values) if norm.training else None
        norm_passes.apply(rows, cut, stats, values, out)
    return _Passed(tuple(parts) if copy is None else (*parts, copy), rows, stats, cut)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - one argument a tensor
        ctx: Any, norm: Any, act: bool, into: Slices | None, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor,
        shortcut: torch.Tensor | None,
    ) -> Tensors:  # fmt: skip
        passed = _passes(norm, act, into, x, shortcut)
        ctx.save_for_backward(passed.rows.tensor, passed.stats, weight, bias)
        ctx.stride, ctx.act, ctx.cut = passed.rows.stride, act, passed.cut
        ctx.has_copy = into is not None and into.copies
        return passed.outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, stats, weight, bias = ctx.saved_tensors
        parts = [as_matrix(grad) for grad in grads]
        copy = parts.pop() if ctx.has_copy else None
        shortcut_grad, shared = None, None
        if ctx.needs_input_grad[-1]:
            shortcut_grad = grads[0]
            if copy:
                shortcut_grad = _empty(x, ctx.cut.n_channels)
                shared = as_matrix(shortcut_grad)
        with torch.cuda.device_of(x):
            x_grad, weight_grad, bias_grad = norm_passes.gradients(
                Matrix(x, ctx.stride), ctx.cut, stats, (weight, bias), Output(ctx.act, parts, copy, shared)
            )
        return None, None, None, weight_grad, bias_grad, x_grad, shortcut_grad


@dataclass(frozen=True)
class _Whole:
    """Hides a tensor from autograd."""

    tensor: torch.Tensor


class _Join(torch.autograd.Function):
    """The tensor whose parts, one after the other in the channels, the other arguments are."""

    @staticmethod
    def forward(ctx: Any, whole: _Whole, *parts: torch.Tensor) -> torch.Tensor:
        ctx.channels = [part.shape[1] for part in parts]
        return _alias(whole.tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, *grads[0].split(ctx.channels, 1)


def _empty(x: torch.Tensor, channels: int) -> torch.Tensor:
    """An unwritten tensor like x with so many channels, in channels_last."""
    n, _, height, width = x.shape
    return torch.empty(n, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory, which autograd does not know as a view: a function of ours returns it."""
    storage = tensor.untyped_storage()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
