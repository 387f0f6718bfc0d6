"""A loader process that dies or hangs ends the training with a line, in training and in validation."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from app.core.config import UserError, load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.train.loader import CocoDataset
from app.train.train import train
from app.train.trainer import Trainer

SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=8", "data.n_val=12", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=4", "train.epochs=1", "train.device=cpu", "train.bn_batches=1", "hyp.nbs=4",
]  # fmt: skip
WAIT_S = 3  # instead of ten minutes
LIMIT_S = 120  # of a whole test: start, and what torch gives a process to end


# SIGKILL as when memory is out, SIGBUS as when shared memory is.
@pytest.mark.parametrize("augment", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "exited unexpectedly|is killed by signal: Killed",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            "exited unexpectedly|is killed by signal: Bus error",
        ),
        (lambda: time.sleep(1e6), f"timed out after {WAIT_S} seconds"),
    ],
    ids=["killed", "bus error", "hangs"],
)
def test_a_loader_process_that_fails_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool, end: Any, said: str
) -> None:
    config, run = load("fp16", sets=SETTINGS), RunRoot(tmp_path, "r")
    prepare(config, run, force=False)
    get_item, get_dataloader = CocoDataset.__getitem__, Trainer.get_dataloader

    def fail(self: CocoDataset, key: Any) -> Any:
        if get_worker_info() and self.augment == augment:
            end()
        return get_item(self, key)

    def with_a_process(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.args.workers = 1  # Ultralytics takes them away on a CPU
        return get_dataloader(self, *args, **kwargs)

    monkeypatch.setattr(CocoDataset, "__getitem__", fail)
    monkeypatch.setattr(Trainer, "get_dataloader", with_a_process)
    monkeypatch.setattr("app.train.loader.WAIT_S", WAIT_S)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        train(config, run, force=False)
    assert time.monotonic() - start < LIMIT_S
    line = str(error.value)
    assert line.startswith("a loader process died or hangs (DataLoader ")
    assert re.search(said, line)  # which of torch's two watchdogs is first is chance
    assert line.endswith("lower train.workers, or start the container with a larger SHM_SIZE")
    assert "\n" not in line
