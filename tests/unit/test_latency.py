"""Latency and throughput against a scripted clock: every figure is worked out by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.coco.dataset import Dataset
from app.coco.score import ImageFile
from app.eval.evaluate import evaluate_file
from app.eval.pipeline import measure_latency
from app.eval.runtime import open_model
from tests.support.eval_fixtures import SETTINGS, raw_output, truth_box, write_coco, write_model
from tests.support.fake_clock import FakeClock, install

RED_BGR = (0, 0, 255)
HIT = (8.0, 8.0, 24.0, 20.0, 0.9, 0)
WARM_UP_MS = [900.0, 700.0]
SESSION_MS = [30.0, 10.0, 80.0, 20.0, 60.0]
READ_MS = [1.0, 50.0, 3.0, 4.0, 5.0]
SELECT_MS = 2.0
# Sorted 10 20 30 60 80. NumPy's percentile p lies at place p * 4 / 100: p90 at 3.6, p99 at 3.96, between 60 and 80.
SESSION = {"mean": 40.0, "p50": 30.0, "p90": 72.0, "p99": 79.2}
# With 2 ms of selection each: 33 62 85 26 67, sorted 26 33 62 67 85.
WITH_PROCESSING = {"mean": 54.6, "p50": 62.0, "p90": 77.8, "p99": 84.28}


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    boxes = [truth_box(image_id, [16.0, 8.0, 32.0, 24.0]) for image_id in (1, 2, 3)]
    return write_coco(tmp_path / "coco", dict.fromkeys((1, 2, 3), RED_BGR), boxes)


def measure(monkeypatch: pytest.MonkeyPatch, coco_dir: Path, batch: int | str) -> tuple[dict[str, Any], FakeClock]:
    model = open_model(write_model(coco_dir / "net.onnx", raw_output(HIT), batch=batch), "cpu")
    clock = FakeClock(WARM_UP_MS + SESSION_MS, [500.0, 400.0, *READ_MS], SELECT_MS)
    install(monkeypatch, clock)
    image = ImageFile(1, coco_dir / "val2017" / "000000000001.png", 64, 48)
    settings = SETTINGS.model_copy(update={"latency_warmup": len(WARM_UP_MS), "latency_runs": len(SESSION_MS)})
    return measure_latency(model, image, settings), clock


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


@pytest.mark.parametrize("batch", ["free", 4])
def test_milliseconds_without_the_warm_up(monkeypatch: pytest.MonkeyPatch, coco_dir: Path, batch: int | str) -> None:
    """A fixed batch is timed whole: its run is not divided by the number of images."""
    latency, _ = measure(monkeypatch, coco_dir, batch)
    assert without(latency, "batch", "warmup", "runs", "with_processing", "clocks") == pytest.approx(SESSION)
    assert (latency["warmup"], latency["runs"]) == (2, 5)


def test_session_time_apart_from_time_with_processing(monkeypatch: pytest.MonkeyPatch, coco_dir: Path) -> None:
    latency, _ = measure(monkeypatch, coco_dir, "free")
    assert latency["with_processing"] == pytest.approx(WITH_PROCESSING)


@pytest.mark.parametrize(("batch", "n_rows"), [("free", 1), (1, 1), (4, 4)])
def test_the_batch_of_the_file(monkeypatch: pytest.MonkeyPatch, coco_dir: Path, batch: int | str, n_rows: int) -> None:
    """A file with a free batch is timed with one image; a fixed one gets that image in every place."""
    latency, clock = measure(monkeypatch, coco_dir, batch)
    assert latency["batch"] == n_rows
    assert len(clock.inputs) == len(WARM_UP_MS) + len(SESSION_MS)
    for images in clock.inputs:
        assert images.shape == (n_rows, 3, 32, 32)
        np.testing.assert_array_equal(images[:, :, 16, 16], [[1.0, 0.0, 0.0]] * n_rows)


# One warm-up, one run (7 ms), then three images in batches of 2: 100 and 50 ms; the choice takes 4 ms an image.
SCRIPT_MS = [900.0, 7.0, 100.0, 50.0]
TIME_S = {"total": 0.162, "session": 0.150, "wait": 0.0, "postprocess": 0.012, "score": 0.0}


def scored(monkeypatch: pytest.MonkeyPatch, coco_dir: Path) -> dict[str, Any]:
    path = write_model(coco_dir / "net.onnx", raw_output(HIT))
    dataset = Dataset(coco_dir, "val2017", None, "a test")
    install(monkeypatch, FakeClock(SCRIPT_MS, select_ms=4.0))
    settings = SETTINGS.model_copy(update={"latency_runs": 1})
    return evaluate_file(path, dataset, coco_dir / "out", settings)


def test_seconds_of_the_whole_pass(monkeypatch: pytest.MonkeyPatch, coco_dir: Path) -> None:
    """Other threads decode while the session runs: their seconds depend on who goes first, and are left out here."""
    metrics = scored(monkeypatch, coco_dir)
    assert without(metrics["time_s"], "preprocess") == pytest.approx(TIME_S)
    assert metrics["latency_ms"]["p50"] == pytest.approx(7.0)
    assert metrics["latency_ms"]["with_processing"]["p50"] == pytest.approx(11.0)


def test_line_on_the_screen(monkeypatch: pytest.MonkeyPatch, coco_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three images in 0.162 s are 18.5 a second."""
    caplog.set_level(logging.INFO)
    scored(monkeypatch, coco_dir)
    line = caplog.messages[-1]
    assert "3 images, 18.5 images/s, latency p50 7.00 ms at batch 1" in line
