"""What estimate says of a training is what the training takes, on a clock that work moves and no machine disturbs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.results import read_rows
from app.core.run import Images, RunRoot
from app.data.prepare import prepare
from app.estimate import estimate as estimate_module
from app.estimate.estimate import Command, Pilot
from app.estimate.price import between_epochs, training_parts, training_seconds
from app.train import loop
from app.train.loop import Loop
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.settle import sets_of
from tests.support.tiny import tiny_network

IMAGE_S, VAL_IMAGE_S, BN_IMAGE_S, SAVE_S, START_S = 1.0, 0.5, 0.25, 4.0, 30.0
JOB = Images(40, 8)
PX = 64**2
SETTINGS = {
    "data.n_train": JOB.train, "data.n_val": JOB.val, "train.batch": 8, "train.epochs": 4, "train.val_every": 3,
    "train.bn_batches": 2, "guard.collapse": "warn",
}  # fmt: skip


class WorkClock:
    """Stands for the module `time`: seconds pass by work alone."""

    now_s = 1_000_000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[WorkClock]:
    clock = WorkClock()
    for module in ("app.train.monitor", "app.core.progress", "app.train.validation"):
        monkeypatch.setattr(f"{module}.time", clock)

    def takes(owner: Any, name: str, seconds: Any) -> None:
        work = getattr(owner, name)

        def slow(*args: Any) -> Any:
            clock.now_s += seconds(*args)
            return work(*args)

        monkeypatch.setattr(owner, name, slow)

    takes(Trainer, "set_up", lambda trainer: START_S)
    takes(Loop, "backward", lambda loop, batch: IMAGE_S * len(batch["img"]))
    takes(Trainer, "score", lambda trainer, *_: VAL_IMAGE_S * len(trainer.test_loader.dataset))
    takes(Trainer, "reestimate", lambda trainer, model, images: BN_IMAGE_S * sum(map(len, images)))
    takes(loop, "save_state", lambda *_: SAVE_S)
    record = logging.getLogRecordFactory()

    def dated(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = record(*args, **kwargs)
        made.created, made.msecs = clock.now_s, clock.now_s % 1 * 1000
        return made

    caplog.set_level(logging.INFO)
    logging.setLogRecordFactory(dated)
    yield clock
    logging.setLogRecordFactory(record)


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_parts_and_whole(runs_dir: Path, clock: WorkClock, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pilot sees 24 of 40 images in each of two epochs, and 4 of 8 val images."""
    monkeypatch.setattr(estimate_module, "CPU_TRAIN_PX", 24 * PX)
    monkeypatch.setattr(estimate_module, "CPU_VAL_PX", 4 * PX)
    monkeypatch.setattr(estimate_module, "sees_gpu", lambda: False)
    command = Command([], sets_of(SETTINGS))
    pilot = Pilot(command, RunRoot(runs_dir, f"pilot-{variant}"), JOB)
    assert pilot.seen == Images(24, 4)
    own, job = command.config(variant, *pilot.sets), command.config(variant)
    pilot_s, folder = trained(own, pilot.run_root, clock)
    rows = read_rows(folder / "results.csv")
    parts = training_parts(own, pilot.seen, pilot_s, rows, between_epochs((folder / "log.txt").read_text(), rows))
    seconds = training_seconds(job, JOB, parts)
    # Validated after epochs 3 and 4, with BatchNorm on 2 batches of 8; last.pt is also written before the first one.
    expected = {"start": 30 + 4, "steps": 4 * 40, "validation": 2 * 8 / 2, "BatchNorm": 2 * 16 / 4, "checkpoints": 16}
    assert seconds == pytest.approx(expected)
    job_s, _ = trained(job, RunRoot(runs_dir, f"job-{variant}"), clock)
    assert sum(seconds.values()) == pytest.approx(job_s)


def trained(config: Any, run: RunRoot, clock: WorkClock) -> tuple[float, Path]:
    """Seconds of a training, and its folder."""
    start_s = clock.now_s
    prepare(config, run, force=False)
    with tiny_network():
        train(config, run, force=False)
    return clock.now_s - start_s, run.variant_dir(config.label)
