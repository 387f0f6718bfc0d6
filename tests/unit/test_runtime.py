"""ONNX Runtime's providers: the one asked for or none; clocks as the driver tells them. No GPU needed."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from app.core import environment as machine
from app.core.config import UserError
from app.eval import runtime
from tests.support.eval_fixtures import raw_output, write_model


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: [runtime.CUDA, runtime.CPU])
    monkeypatch.setattr(runtime, "gpu_name", lambda: None)
    assert runtime.choose_provider("auto") == runtime.CPU
    with pytest.raises(UserError, match=r"eval\.provider=cpu"):
        runtime.choose_provider("cuda")
    monkeypatch.setattr(runtime, "gpu_name", lambda: "a GPU")
    assert runtime.choose_provider("auto") == runtime.choose_provider("cuda") == runtime.CUDA
    assert runtime.choose_provider("cpu") == runtime.CPU


def test_clocks_are_those_of_the_driver_or_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers for two GPUs, one that does not answer, and a kernel with a governor."""
    answer = {"clocks.sm": "2400 MHz", "power.limit": "575.00 W"}
    monkeypatch.setattr(machine, "GPU_CLOCKS", tuple(answer))
    stand_in_dir = Path(__file__).with_name("stand_ins_gpu")  # not tmp_path: in the container nothing runs from /tmp
    monkeypatch.setenv("PATH", f"{stand_in_dir}:/bin:/usr/bin")
    assert machine.clocks(on_gpu=True) == {"clocks.sm": "2400 MHz; 210 MHz", "power.limit": "575.00 W; 575.00 W"}
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert machine.clocks(on_gpu=True) == {}
    monkeypatch.setattr(machine, "CPUFREQ_DIR", tmp_path)
    (tmp_path / "scaling_governor").write_text("performance\n")
    monkeypatch.setattr(machine, "cpuinfo", lambda: ["model name: a CPU", "cpu MHz\t\t: 2445.404", "cpu MHz: 2000"])
    assert machine.clocks(on_gpu=False) == {"scaling_governor": "performance", "MHz": "2445.404, 2000"}


def test_provider_that_falls_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is there, but ONNX Runtime cannot load its CUDA libraries and takes the CPU without an error."""
    monkeypatch.setattr(runtime.ort, "preload_dlls", lambda: None)
    onnx_path = write_model(tmp_path / "m.onnx", raw_output())
    session = runtime.open_session(onnx_path, runtime.CPU, ort.SessionOptions())
    monkeypatch.setattr(runtime.ort, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(UserError, match=f"{runtime.CPU} instead of {runtime.CUDA}"):
        runtime.open_session(onnx_path, runtime.CUDA, ort.SessionOptions())
