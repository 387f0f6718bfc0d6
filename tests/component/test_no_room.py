"""A training that does not fit in GPU memory: what the user is told, and that the next command does as told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.core.config import UserError, load
from app.core.files import read_json
from app.quant.model import load_checkpoint
from app.train.device import explain_memory
from app.train.loop import Loop
from app.train.nonfinite import Watch
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.scripted import spoil_images
from tests.support.settle import settle
from tests.support.tiny import tiny_network

# 16 images in batches of 8, one to an optimizer step.
SETTINGS = {
    "data.n_train": 16, "data.n_val": 4, "train.batch": 8, "train.epochs": 1, "hyp.nbs": 8, "hyp.close_mosaic": 0,
}  # fmt: skip
HALF = {**SETTINGS, "train.batch": 4}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(("part", "method"), [(Trainer, "set_up"), (Watch, "__init__"), (Loop, "backward")])
def test_half_the_batch_trains_where_the_first_step_had_no_room(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, part: type, method: str
) -> None:
    name = f"no-room-{method}"
    config, run = settle(runs_dir, name, "qat", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(part, method, no_room)
        with pytest.raises(UserError, match=r"train\.batch=8 at 64 px does not fit in GPU memory: set train\.batch=4"):
            train(config, run, force=False)
    config, run = settle(runs_dir, name, "qat", HALF)
    train(config, run, force=False)
    last = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert last["ema_updates"] == 2, "of two batches of 4 images each, as said"
    assert last["config"]["train"]["batch"] == 4
    assert read_json(run.done(config.label), "train")["epochs"] == 1
    assert sorted(os.listdir(run.best(config.label).parent)) == ["best.pt", "last.pt"]


def test_another_batch_is_not_advised_where_a_step_has_been_saved(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settle(runs_dir, "later", "qat", {**SETTINGS, "train.save_every_s": 1e-9})
    backward = Loop.backward

    def later(self: Loop, batch: dict[str, Any]) -> None:
        if self.state.ema.updates:
            no_room()
        backward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "backward", later)
        with pytest.raises(UserError, match=r"end other programs .* the same command goes on .* with ARGS=--force"):
            train(config, run, force=False)
    train(config, run, force=False)


def test_a_fault_before_the_first_checkpoint_goes_back_to_the_start(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settle(runs_dir, "fault", "qat", SETTINGS)
    spoil_images(monkeypatch, {0})
    train(config, run, force=False)
    last = load_checkpoint(run.variant_dir(config.label) / "weights" / "last.pt")
    assert [fault["batches"] for fault in last["faults"]] == [[0]]
    assert last["ema_updates"] == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
    ids=str,
)
def test_whoever_had_no_room_it_is_said_in_one_way(error: RuntimeError) -> None:
    with pytest.raises(UserError, match=r"^train\.batch=32 at 640 px does not fit in GPU memory: set train\.batch=16,"):
        explain_memory(error, load("fp16"), has_begun=False)


def test_one_image_cannot_be_halved() -> None:
    with pytest.raises(UserError, match=r"GPU memory: end other programs on this GPU, lower train\.imgsz, or take"):
        explain_memory(torch.OutOfMemoryError(), load("fp16", sets=["train.batch=1"]), has_begun=False)


def test_other_errors_pass() -> None:
    explain_memory(RuntimeError("shape mismatch"), load("fp16"), has_begun=False)
