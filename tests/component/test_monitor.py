"""What a training shows: events in one folder, and the time left, worked by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]

from app.core.config import load
from app.core.differences import flatten
from app.train.done import After
from app.train.monitor import ABOUT_AP, Monitor

ROW = {"train/box_loss": 1.0, "val_loss/ema_bn": 2.0, "time/images_per_s": 5.0}
APS = {f"AP/{state}": 0.25 for state in ("raw", "ema", "ema_bn")}


def validator() -> Any:
    """A batch of one image with one object, and one detection of it."""
    batch = {
        "img": torch.zeros(1, 3, 64, 64), "im_file": ["a.png"], "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1, 1), "bboxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]),
    }  # fmt: skip
    detection = {"conf": torch.ones(1), "cls": torch.zeros(1), "bboxes": torch.tensor([[20.0, 20.0, 40.0, 40.0]])}
    return SimpleNamespace(first_batch=([detection], batch), names={0: "person"})


def events(out_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(out_dir / "tensorboard")).Reload()


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_hparams_scalars_and_pictures_are_events_of_one_run(tmp_path: Path, variant: str) -> None:
    config = load(variant, sets=["train.epochs=2"])
    monitor = Monitor(tmp_path, config)
    for epoch in range(2):
        monitor.start_epoch(epoch, 2, 10, 0)
        monitor.step(10, lambda: {"train/box_loss": 1.0})
        monitor.end_train_pass()
        rows = [{"epoch": float(i + 1), **ROW, **APS} for i in range(epoch + 1)]
        monitor.end_epoch(rows, validator(), 0.25, 1)
    monitor.close()
    assert [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []
    read = events(tmp_path)
    assert [event.value for event in read.Scalars("AP/ema_bn")] == [0.25, 0.25]
    assert len(read.Images("val/predictions")) == 2 and len(read.Images("val/labels")) == 1
    content = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["train.epochs"].number_value == 2
    assert start.hparams["quant.scheme"].string_value == ("none" if variant == "fp16" else "w4a16")
    quant = {key for key in start.hparams if key.startswith("quant.")}
    assert quant == ({"quant.scheme"} if variant == "fp16" else {key for key in flatten(config) if "quant." in key})


def test_pictures_are_as_many_however_often_the_training_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.train.monitor.curve_figure", lambda rows: Figure(figsize=(1, 1)))
    monkeypatch.setattr("app.train.monitor.draw_batch", lambda *_: torch.zeros(2, 2, 3).numpy())
    n_epochs = 60
    rows = [{"epoch": float(i + 1), **ROW, **APS} for i in range(n_epochs)]
    for epoch in range(n_epochs):
        if epoch % 5 == 0:
            monitor = Monitor(tmp_path, load("fp16"))
        monitor.start_epoch(epoch, n_epochs, 10, 0)
        monitor.step(10, dict)
        monitor.end_train_pass()
        monitor.end_epoch(rows[: epoch + 1], validator(), 0.25, 1)
        monitor.writer.flush()
    # Files of one second are read in any order, which must drop nothing.
    read = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}, purge_orphaned_data=False).Reload()
    steps = [event.step for event in read.Images("val/predictions")]
    assert sorted(steps) == [1, *range(6, 61, 3)]
    assert len(read.Images("val/labels")) == 1


class Clock:
    """Stands for the module `time` where a training is timed."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def hand_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("app.train.monitor", "app.core.progress"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


def test_time_left_for_the_run(tmp_path: Path, hand_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It continues in the middle of the first of four epochs of 100 images. An image takes 4 s, a validation 40 s."""
    monitor = Monitor(tmp_path, load("fp16"))
    with caplog.at_level("INFO"):
        monitor.start_epoch(0, 4, 100, 50)
        hand_clock.now_s += 25 * 4
        monitor.step(25, dict)
        assert "1:40 left, training 21:40," in caplog.messages[-1]  # 25 * 4 s + 3 epochs of 100 * 4 s
        hand_clock.now_s += 25 * 4
        monitor.step(25, dict)
        monitor.end_train_pass()
        hand_clock.now_s += 40
        monitor.end_epoch([{"epoch": 1.0, **ROW, **APS}], validator(), 0.25, 1)
        assert caplog.messages[-2].endswith("24:00 left for the training")  # half an epoch took 240 s: 3 of 480 s
        monitor.start_epoch(1, 4, 100, 0)
        hand_clock.now_s += 50 * 4
        monitor.step(50, dict)
        assert "3:20 left, training 19:20," in caplog.messages[-1]  # 50 * 4 s + 2 epochs of 480 s
    monitor.close()


def test_time_left_for_a_job(tmp_path: Path, hand_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Two epochs of 100 images, then four of QAT and six files. An image takes 4 s, a validation 30 s."""
    monitor = Monitor(tmp_path, load("fp16"), After(qat_epochs=4, files=6))
    with caplog.at_level("INFO"):
        monitor.start_epoch(0, 2, 100, 0)
        hand_clock.now_s += 50 * 4
        monitor.step(50, dict)
        assert "3:20 left, job 37:28," in caplog.messages[-1]  # 200 s + 400 s + 4 * 1.03 * 400 s
        hand_clock.now_s += 50 * 4
        monitor.step(50, dict)
        monitor.end_train_pass()
        hand_clock.now_s += 30
        monitor.end_epoch([{"epoch": 1.0, **ROW, **APS}], validator(), 0.25, 1)
        assert caplog.messages[-2].endswith("37:42 left for the job")  # 430 s + 4 * 1.03 * 430 s + 6 * 10 s
    monitor.close()


@pytest.mark.parametrize(("before_s", "seconds", "rate"), [(300.0, 500.0, 0.2), (0.0, 200.0, 0.25)])
def test_an_epochs_rate_is_that_of_all_its_processes(
    tmp_path: Path, hand_clock: Clock, before_s: float, seconds: float, rate: float
) -> None:
    """50 of 100 images were trained before, in 300 s or in a time that an earlier version has not kept."""
    monitor = Monitor(tmp_path, load("fp16"))
    monitor.start_epoch(0, 4, 100, 50, before_s)
    hand_clock.now_s += 200
    monitor.step(50, dict)
    monitor.end_train_pass()
    hand_clock.now_s += 40
    facts = monitor.epoch_facts()
    assert facts == {"time/train_s": seconds, "time/epoch_s": seconds + 40, "time/images_per_s": rate}
    monitor.close()


def test_a_validation_that_may_outlast_the_next_checkpoint(tmp_path: Path, hand_clock: Clock) -> None:
    """An image takes 4 s to train and a state of 10 images 20 s to score; a checkpoint is due after 400 s."""
    monitor = Monitor(tmp_path, load("fp16"))
    monitor.start_epoch(0, 2, 100, 50)
    assert monitor.validation_s(10) == 0, "nothing is trained that the last checkpoint has not"
    hand_clock.now_s += 70 * 4
    monitor.step(70, dict)
    assert monitor.validation_s(10) == 10 * 3 * 4
    assert not monitor.save_due(401, ahead_s=120)
    assert monitor.save_due(400, ahead_s=120)
    assert not monitor.save_due(400, ahead_s=399), "it is saved now"
    monitor.end_train_pass()
    hand_clock.now_s += 3 * 20
    monitor.end_epoch([{"epoch": 1.0, **ROW, **APS}], validator(), 0.25, 1)
    monitor.start_epoch(1, 2, 100, 0)
    assert monitor.validation_s(10) == 60
    monitor.close()


def test_why_two_of_three_aps_may_be_0_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the first validation, here that of epoch 2; a training that continues after it says it no more."""
    rows = [{"epoch": 1.0, **ROW}, {"epoch": 2.0, **ROW, **APS}, {"epoch": 3.0, **ROW, **APS}]
    monitor = Monitor(tmp_path, load("fp16"))
    said = []
    for epoch in range(3):
        caplog.clear()
        monitor.start_epoch(epoch, 3, 10, 0)
        monitor.step(10, dict)
        monitor.end_train_pass()
        with caplog.at_level("INFO"):
            monitor.end_epoch(rows[: epoch + 1], validator(), 0.25, 1)
        said.append(ABOUT_AP in caplog.messages)
    monitor.close()
    assert said == [False, True, False]


def test_an_epoch_that_was_trained_before_is_no_division_by_zero(tmp_path: Path, caplog: Any) -> None:
    monitor = Monitor(tmp_path, load("fp16"))
    monitor.start_epoch(0, 4, 100, 112)  # seven batches of 16: stopped between the last step and the validation
    monitor.end_train_pass()
    with caplog.at_level("INFO"):
        monitor.end_epoch([{"epoch": 1.0, **ROW, **APS}], validator(), 0.25, 1)
    monitor.close()
    assert "? left" in caplog.text
