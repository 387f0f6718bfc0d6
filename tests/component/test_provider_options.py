"""What ONNX Runtime is asked for: TF32 off, and which providers stand behind the one that was chosen. No GPU needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from app.eval.runtime import open_session

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Provider asked for -> providers in the order ONNX Runtime tries them, with the options of each.
WANTED = {
    CPU: [(CPU, {})],
    CUDA: [(CUDA, {"use_tf32": "0"}), (CPU, {})],
}


@pytest.mark.parametrize("provider", WANTED)
def test_tf32_is_off_wherever_cuda_may_compute(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    seen: list[Any] = []

    def record(path: str, options: ort.SessionOptions, providers: list[Any], **_: Any) -> Any:
        seen.extend(providers)
        return SimpleNamespace(get_providers=lambda: [providers[0][0]])

    monkeypatch.setattr(ort, "InferenceSession", record)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    open_session(Path("m.onnx"), provider, ort.SessionOptions())
    assert seen == WANTED[provider]
