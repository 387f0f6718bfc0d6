"""TF32 is off in what the evaluator computes, and out of the way of what the trainer computes.

TF32 rounds the inputs of products to 10 bits. PyTorch's default leaves it off for matrices and on for convolutions; a
training's convolutions are FP16 by autocast, so that its TF32 switch has nothing to act on.

pytest -m gpu tests/gpu/test_precision_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from app.core.config import load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.eval.runtime import gpu_name, open_session
from app.train.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
CUDA = "CUDAExecutionProvider"
# Wide enough for tensor cores. Each product is (1 + 2**-12) * 1: exact in FP32 (24 bits), and 1 in TF32 (11 bits).
N_CHANNELS, SIDE_PX = 64, 32
HAIR = 2.0**-12
SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=16", "data.n_val=8", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=8", "train.epochs=2", "train.workers=0", "train.device=0", "train.bn_batches=1",
]  # fmt: skip


def write_product(path: Path, kind: str) -> Path:
    """A 1x1 convolution or a matrix product whose weight is the identity."""
    identity = np.eye(N_CHANNELS, dtype=np.float32)
    shape = [1, N_CHANNELS, SIDE_PX, SIDE_PX] if kind == "Conv" else [SIDE_PX, N_CHANNELS]
    weight = identity[:, :, None, None] if kind == "Conv" else identity
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "out")]
    node = helper.make_node(kind, ["images", "weight"], ["out"])
    graph = helper.make_graph([node], "product", value[:1], value[1:], [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.skipif(gpu_name() is None, reason="needs a CUDA device that the driver names")
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_evaluator_computes_in_full_fp32(tmp_path: Path, kind: str) -> None:
    session = open_session(write_product(tmp_path / "m.onnx", kind), CUDA, ort.SessionOptions())
    assert session.get_provider_options()[CUDA]["use_tf32"] == "0"
    images = np.full(session.get_inputs()[0].shape, 1.0 + HAIR, np.float32)
    [out] = session.run(None, {"images": images})
    np.testing.assert_array_equal(np.asarray(out), images)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.dtype, bool]]]:
    """What every convolution on the GPU computes in, and whether TF32 may then be used, while a test runs."""
    seen: list[tuple[torch.dtype, bool]] = []
    original = functional.conv2d

    def conv2d(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if images.is_cuda:
            autocast = torch.is_autocast_enabled("cuda")
            dtype = torch.get_autocast_dtype("cuda") if autocast else images.dtype
            seen.append((dtype, torch.backends.cudnn.allow_tf32))
        return original(images, *args, **kwargs)

    monkeypatch.setattr(functional, "conv2d", conv2d)
    yield seen


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_no_convolution_of_a_training_is_one_that_tf32_could_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convolutions: list[tuple[torch.dtype, bool]], variant: str
) -> None:
    """Steps, validation and the re-estimation of BatchNorm; matrix products stay in full FP32."""
    monkeypatch.setattr("ultralytics.engine.trainer.check_amp", lambda model: True)  # it compares FP16 with FP32
    config, run = load(variant, sets=SETTINGS), RunRoot(tmp_path, "precision")
    prepare(config, run, force=False)
    train(config, run, force=False)
    assert convolutions
    assert [(dtype, tf32) for dtype, tf32 in convolutions if dtype == torch.float32 and tf32] == []
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
