"""A loader process that dies or hangs ends the training with a line, in training and in validation."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info
from ultralytics.cfg import get_cfg

from app.core.config import UserError
from app.data.prepare import prepared
from app.train.batches import Ticket
from app.train.loader import CocoDataset, dataset_of
from app.train.train import train
from app.train.trainer import Trainer, recipe_args
from tests.support.interpreter import run_script
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


# A cycle of garbage stands for a CUDA graph: to free one in a forked process aborts it. The first thing that a child
# does, before any hook that is registered later, is to collect garbage.
FORK = """
import gc, os
os.register_at_fork(after_in_child=gc.collect)
import app.train.loader

class Graph:
    def __init__(self):
        self.cycle, self.owner = self, os.getpid()
    def __del__(self):
        if os.getpid() != self.owner:
            os.abort()

gc.disable()  # nothing of the parent is collected before the fork
Graph()
child = os.fork()
if not child:
    gc.collect()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert gc.collect() > 0 and not gc.get_freeze_count()  # the parent does
"""


def test_a_forked_process_does_not_free_what_its_parent_has_left(tmp_path: Path) -> None:
    (tmp_path / "fork.py").write_text(FORK)
    done = run_script(tmp_path / "fork.py")
    assert done.returncode == 0, done.stderr


def test_mosaic_takes_the_same_partners_where_memory_does_not_suffice_for_the_cache(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes share 64 images of 64 px: they fit twice into 3 MB for each, not into 1 MB."""
    config, run = settle(runs_dir, tmp_path.name, "fp16", {"data.n_train": 64, "data.n_val": 4, "train.imgsz": 64})
    provenance, hyp = prepared(run), get_cfg(overrides=recipe_args(config, "cpu"))
    data = dataset_of(run.dataset_yaml.parent, provenance["names"])
    samples = []
    for n_bytes in (6e6, 2e6):
        monkeypatch.setattr("app.train.loader.available_bytes", lambda n_bytes=n_bytes: int(n_bytes))
        dataset = CocoDataset(
            "train", data, provenance, 0, imgsz=64, batch_size=2, hyp=hyp, cache="ram", n_sharing=2
        )  # fmt: skip
        samples.append([dataset[Ticket(0, place)]["img"] for place in range(8)])
        assert all(image is not None for image in dataset.ims) == (n_bytes > 3e6)
    assert all(torch.equal(kept, read) for kept, read in zip(*samples, strict=True))
    (line,) = (record.message for record in caplog.records if "train.cache" in record.message)
    assert line.startswith("train.cache: the train images take 0.00 GiB, more than half of the 0.00 GiB")
