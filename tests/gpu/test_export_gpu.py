"""Every node of the files to score runs on CUDA, and gives there what it gives on the CPU.

pytest -m gpu tests/gpu/test_export_gpu.py -s
"""

from __future__ import annotations

import numpy as np
import pytest

from app.core.labels import BASELINE, Label
from app.core.run import RunRoot
from app.eval.runtime import CPU, gpu_name, nodes_by_provider, open_model
from app.export.export import export, load_trained
from tests.support.export_run import config_of, make_run

ort = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_name() is None, reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]
SCORED = ["baseline-fp32", "baseline-fp16", "w4a16-qcdq-qat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    run = make_run(tmp_path_factory.mktemp("runs"))
    export(config_of(run, "qat", "export.contracts=[raw,end2end]"), run, force=False)
    return run


def label_of(stem: str) -> Label:
    return BASELINE if "baseline" in stem else Label("qat", "w4a16")


@pytest.mark.parametrize("contract", ["raw", "end2end"])
@pytest.mark.parametrize("stem", SCORED)
def test_no_node_falls_to_the_cpu(run: RunRoot, stem: str, contract: str) -> None:
    path = run.onnx_dir / f"yolov10n-{stem}{'' if contract == 'raw' else '-end2end'}.onnx"
    model = open_model(path, "cuda")
    images = load_trained(run, label_of(stem)).truth.images[:1]
    assert nodes_by_provider(model, images).get(CPU, []) == []


@pytest.mark.parametrize("stem", SCORED)
def test_cuda_is_within_the_tolerance_of_the_gates(run: RunRoot, stem: str) -> None:
    trained = load_trained(run, label_of(stem))
    model = open_model(run.onnx_dir / f"yolov10n-{stem}.onnx", "cuda")
    got = np.concatenate([model.run(image[None]) for image in trained.truth.images])
    allowed = trained.truth.allowed("fp16" if stem.endswith("fp16") else "fp32")
    assert np.abs(got - trained.truth.raw)[:, :4].max() <= allowed.box_px
    assert np.abs(got - trained.truth.raw)[:, 4:].max() <= allowed.score


def test_native_int4_nodes_on_the_cpu_are_named(run: RunRoot) -> None:
    """Opset 21 has operators without a CUDA kernel in the pinned ONNX Runtime 1.26, Resize among them; 1.27 has all."""
    model = open_model(run.onnx_dir / "yolov10n-w4a16-int4-qat.onnx", "cuda")
    images = load_trained(run, Label("qat", "w4a16")).truth.images[:1]
    on_cpu = nodes_by_provider(model, images).get(CPU, [])
    assert any(name.startswith("Resize ") for name in on_cpu) == ort.__version__.startswith("1.26.")
