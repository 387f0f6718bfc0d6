"""A stand-in for onnxruntime.InferenceSession: it gives arrays from a table and notes how it was opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

OFF, ON = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
# File stem, optimisation level, number of images in the call -> one output for each image of the set.
Table = Callable[[str, Any, int], np.ndarray]


def numbered_images(n: int) -> np.ndarray:
    """float32 [n,3,4,4]: every pixel of an image is its number."""
    return np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)


def use_stand_in(monkeypatch: pytest.MonkeyPatch, table: Table, batch: int | str = 1) -> list[tuple[str, Any]]:
    """Replaces ONNX Runtime's session; images are those of `numbered_images`.

    Returns:
        file stem and optimisation level of every session, in the order they are opened.
    """
    opened: list[tuple[str, Any]] = []

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            assert providers == ["CPUExecutionProvider"]
            self.stem, self.level = Path(path).stem, options.graph_optimization_level
            opened.append((self.stem, self.level))

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(shape=[batch, 3, 4, 4])]

        def run(self, names: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            chosen = feeds["images"][:, 0, 0, 0].astype(int)
            return [table(self.stem, self.level, len(chosen))[chosen]]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    return opened
