"""The Triton kernels compile for the GPU that the image is for: the interpreter takes what the compiler refuses.

Triton compiles without a GPU. The test runs this file as a script, in which a launch only compiles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss

from app.quant.kernels import Layout, Spec, gradient, quantize
from app.quant.norm import Slices, norm_act
from app.quant.upsample import double
from app.train.colours import Palette, recolour
from app.train.loss import HeadLoss
from app.train.match import match, targets_of
from app.train.processes import ALONE
from tests.support.interpreter import run_script

CAPABILITIES = (120,)  # RTX 5090, the GPU of the image
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
NHWC = torch.channels_last
N_KERNELS = 17  # of norm, upsample, loss, assign, match, quant and colours, at least


def test_every_kernel_compiles_for_the_gpu_of_the_image(tmp_path: Path) -> None:
    done = run_script(__file__, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= N_KERNELS


def type_of(value: Any) -> str:
    if torch.is_tensor(value):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of a launch: compiles the kernel for arguments of these types."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    own = {name: named[name] for name in kernel.arg_names}
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    fixed |= {name for name, value in own.items() if value is None or isinstance(value, bool)}
    signature = {name: "constexpr" if name in fixed else type_of(value) for name, value in own.items()}
    constants = {(kernel.arg_names.index(name),): own[name] for name in fixed}
    others = {name: value for name, value in options.items() if name not in own}
    for capability in CAPABILITIES:
        source = ASTSource(kernel, signature, constants)
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=others)
    compiled.add(kernel.__name__)


def norms(dtype: torch.dtype, act: bool) -> None:
    """BatchNorm with an activation, a shortcut and a part of a wider tensor, forward and backward."""
    layer = nn.BatchNorm2d(48)
    x = torch.randn(2, 48, 4, 4).to(dtype).to(memory_format=NHWC).requires_grad_()
    shortcut = torch.randn(2, 48, 4, 4).to(dtype).to(memory_format=NHWC).requires_grad_()
    room = torch.empty(2, 64, 4, 4, dtype=dtype).contiguous(memory_format=NHWC)
    norm_act(layer, x, act, shortcut, None).sum().backward()
    part, copy = norm_act(layer, x, act, None, Slices([room.narrow(1, 16, 48)], copies=True))
    torch.autograd.backward([part, copy], [torch.ones_like(part), torch.ones_like(copy)])
    with torch.no_grad():
        norm_act(layer.eval(), x, act, shortcut)


def losses() -> None:
    network: Any = DetectionModel("yolov10n.yaml", verbose=False)
    network.args = get_cfg()
    feats = [torch.zeros(2, 1, 96 // stride, 96 // stride) for stride in (8, 16, 32)]
    n_anchors = sum(feat[0].numel() for feat in feats)
    heads: dict[str, Any] = {}
    for head in ("one2many", "one2one"):
        boxes = torch.randn(2, 64, n_anchors).half().requires_grad_()
        heads[head] = {"boxes": boxes, "scores": torch.randn(2, 80, n_anchors).half().requires_grad_(), "feats": feats}
    loss, _ = HeadLoss(E2ELoss(network), ALONE)(heads, torch.zeros(8, 6), torch.ones(2))
    loss.backward()


def quantizers() -> None:
    weight = torch.randn(4, 3, 3, 3)
    layout = Layout([weight], [Spec(7, per_tensor=False)])
    flat = layout.join([weight])
    _, absmax, pick = quantize(flat, layout, torch.float16)
    gradient(torch.ones(weight.numel()), flat, layout, absmax, pick)


def matching() -> None:
    labels = {"batch_idx": torch.zeros(2), "cls": torch.zeros(2, 1), "bboxes": torch.rand(2, 4)}
    for n_objects in (2, 300):
        many = {key: value[:1].repeat(n_objects, *[1] * (value.ndim - 1)) for key, value in labels.items()}
        targets = targets_of(many, 2, (64, 64))
        assert targets
        match(torch.rand(4, 300, 6), targets, torch.linspace(0.5, 0.95, 10), 0.001)


def colours() -> None:
    table = torch.zeros(4, dtype=torch.int32)
    images, tables = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 256, dtype=torch.uint8)
    recolour(images, tables, Palette(table, table))


if __name__ == "__main__":
    from triton.runtime.jit import JITFunction

    compiled: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        for dtype in (torch.float16, torch.float32):
            norms(dtype, act=True)
        norms(torch.float16, act=False)
        x = torch.randn(2, 16, 3, 5).half().to(memory_format=NHWC).requires_grad_()
        double(x).sum().backward()
        losses()
        quantizers()
        matching()
        colours()
    sys.stdout.write(f"{len(compiled)}\n")
    sys.stderr.write(" ".join(sorted(compiled)))
