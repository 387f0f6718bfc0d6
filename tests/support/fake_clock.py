"""A clock that only scripted work moves: an evaluator timed by it gives figures that can be worked out by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.eval import pipeline
from app.eval.runtime import Model

START_S = 1000.0  # no figure may depend on when the clock began


class FakeClock:
    """Stands for time.perf_counter; `inputs` are the arrays that the session was given, one a run."""

    def __init__(self, session_ms: list[float], read_ms: list[float] | None = None, select_ms: float = 0.0) -> None:
        self.now_s = START_S
        self.session_ms, self.read_ms, self.select_ms = session_ms, read_ms, select_ms
        self.inputs: list[np.ndarray] = []

    def read(self) -> float:
        return self.now_s

    def advance(self, milliseconds: float) -> None:
        self.now_s += milliseconds / 1000

    def advance_by_reading(self) -> None:
        """An image takes the time of the session run that comes next."""
        if self.read_ms:
            self.advance(self.read_ms[len(self.inputs)])


def install(patch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """Lets reading an image, a session run and the choice of detections take the time of the script, and no other."""
    read_image, select, run = pipeline.read_image, pipeline.select, Model.run

    def timed_read(path: Path) -> np.ndarray:
        clock.advance_by_reading()
        return read_image(path)

    def timed_select(*args: Any) -> np.ndarray:
        clock.advance(clock.select_ms)
        return select(*args)

    def timed_run(model: Model, images: np.ndarray) -> np.ndarray:
        clock.advance(clock.session_ms[len(clock.inputs)])
        clock.inputs.append(images.copy())
        return run(model, images)

    patch.setattr(pipeline, "read_image", timed_read)
    patch.setattr(pipeline, "select", timed_select)
    patch.setattr(Model, "run", timed_run)
    patch.setattr(time, "perf_counter", clock.read)
