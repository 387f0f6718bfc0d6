"""What a training says to signals while a step is at work."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from app.core import answers
from app.train.interrupt import Interrupted
from app.train.loop import Loop
from app.train.train import train
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network

# 40 images in batches of 8, each with an optimizer step and a checkpoint.
SETTINGS = {
    "data.n_train": 40, "data.n_val": 8, "train.batch": 8, "train.epochs": 1, "hyp.nbs": 8, "hyp.close_mosaic": 0,
    **AT_EVERY_STEP,
}  # fmt: skip
ANSWER_S = 60  # far more than an answer takes


class Said:
    """Stands for the logger of the answers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = threading.Semaphore(0)

    def warning(self, _: str, line: str) -> None:
        self.lines.append(line)
        self.count.release()


@pytest.mark.parametrize(
    ("batch_number", "kept", "where"),
    [(1, "epoch 1", ""), (3, "epoch 1, batch 3", ", which qat-w4a16/weights/last.pt keeps")],
)
def test_answers_come_before_the_step_ends(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, batch_number: int, kept: str, where: str
) -> None:
    """Two signals in a batch. The end of the process is only noted, so the first one ends the training. In the first
    batch there is no checkpoint yet."""
    config, run = settle(runs_dir, f"answered-{batch_number}", "qat", SETTINGS)
    said, codes, backward = Said(), [], Loop.backward
    monkeypatch.setattr(answers, "log", said)
    monkeypatch.setattr(answers.os, "_exit", codes.append)

    def backward_with_signals(self: Loop, batch: dict[str, Any]) -> None:
        if self.state.batch_in_epoch == batch_number:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                assert said.count.acquire(timeout=ANSWER_S)
        backward(self, batch)

    monkeypatch.setattr(Loop, "backward", backward_with_signals)
    with tiny_network(), pytest.raises(Interrupted):
        train(config, run, force=False)
    assert said.lines == [
        f"stopping after this step; again: at once, going on from {kept}",
        f"ended at once: the same command goes on from {kept}{where}",
    ]
    assert codes == [128 + signal.SIGINT]
