"""A loader process that dies or hangs ends the training with a line, in training and in validation."""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from app.core.config import UserError
from app.train.loader import CocoDataset
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.settle import settle
from tests.support.tiny import tiny_network

SETTINGS = {"data.n_train": 8, "data.n_val": 12, "train.batch": 4, "train.epochs": 1, "hyp.nbs": 4}
WAIT_S = 1  # for a process that will never answer, instead of ten minutes
END_S = 0.5  # that torch gives such a process to end before it is killed, instead of five


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


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
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool, end: Any, said: str
) -> None:
    config, run = settle(runs_dir, tmp_path.name, "fp16", SETTINGS)
    get_items, get_dataloader = CocoDataset.__getitems__, Trainer.get_dataloader

    def fail(self: CocoDataset, keys: list[Any]) -> Any:
        if get_worker_info() and self.augment == augment:
            end()
        return get_items(self, keys)

    def with_a_process(self: Trainer, path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        self.args.workers = 1  # Ultralytics takes them away on a CPU
        with monkeypatch.context() as patch:
            if augment == (mode == "train"):  # the other loader has all the time that it needs
                patch.setattr("app.train.loader.WAIT_S", WAIT_S)
            return get_dataloader(self, path, batch_size, rank, mode)

    monkeypatch.setattr(CocoDataset, "__getitems__", fail)
    monkeypatch.setattr(Trainer, "get_dataloader", with_a_process)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", END_S)
    with pytest.raises(UserError) as error:
        train(config, run, force=False)
    line = str(error.value)
    assert line.startswith("a loader process died or hangs (DataLoader ")
    assert re.search(said, line)  # which of torch's two watchdogs is first is chance
    assert line.endswith("lower train.workers, or start the container with a larger SHM_SIZE")
    assert "\n" not in line


class Graph:
    """Stands for a CUDA graph in a cycle of garbage: to free one in a forked process aborts it."""

    def __init__(self) -> None:
        self.cycle, self.owner = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.owner:
            os.abort()


class Collecting(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index

    def __len__(self) -> int:
        return 2


def test_a_loader_process_does_not_free_what_its_parent_has_left() -> None:
    gc.disable()  # nothing of the parent is collected before the fork
    try:
        Graph()
        assert list(DataLoader(Collecting(), batch_size=None, num_workers=1, timeout=60)) == [0, 1]
    finally:
        gc.enable()
        gc.collect()
