"""Trainings in several processes of this machine, with BatchNorm fixed, one training after the other.

ddp_program.py [--forks N] [--trick stop|poison] RUNS_DIR RUN DEVICES TRAINING...

torchrun starts it once for each rank. With --forks it is started once and forks the ranks, each with torchrun's
environment: they share the imports, which take longer than the trainings. In the last training a trick is played on
rank 1: it gets a SIGTERM (stop), or images that are not finite (poison).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import Config, load
from app.core.run import RunRoot
from app.train.interrupt import Interrupted
from app.train.loop import Loop
from app.train.processes import process_group
from app.train.train import train
from app.train.trainer import Trainer
from tests.support.scripted import spoil_images
from tests.support.settle import sets_of
from tests.support.tiny import tiny_network

# 30 images: batches of 8, 8, 8 and 6, which 3 processes share as 2, 3, 3 and 2, 2, 2; two batches to an optimizer step.
# Mosaic in the first of two epochs; a fast EMA.
SETTINGS = {
    "data.n_train": 30, "data.n_val": 8, "train.batch": 8, "train.epochs": 2, "train.bn_batches": 2, "hyp.nbs": 16,
    "hyp.warmup_epochs": 1, "hyp.close_mosaic": 1, "train.ema_tau": 5, "eval.provider": "cpu",
}  # fmt: skip
TRAININGS = {"fp16": "fp16", "qat": "qat", "yolov10n": "fp16"}  # name -> variant
STOP_AT = 4  # optimizer steps, of five: inside the second epoch
POISONED = 5  # number of the batch since the start: the second of the second epoch


@contextlib.contextmanager
def network(training: str, devices: str) -> Iterator[None]:
    """The network of a training: YOLOv10n where its name says so and on GPUs, else the tiny one."""
    is_real = training == "yolov10n" or devices != "cpu"
    with contextlib.nullcontext() if is_real else tiny_network():
        yield


def fixed_norm(self: Trainer) -> None:
    """Trainer._model_train with BatchNorm as in evaluation: in training its statistics are those of a process's own
    images, as in Ultralytics, the one thing that depends on the number of processes."""
    DetectionTrainer._model_train(self)
    for layer in self.model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def stop_rank_1() -> None:
    """Rank 1 alone gets a signal, after an optimizer step."""
    step = Loop.optimizer_step

    def stopped_step(self: Loop) -> None:
        step(self)
        if self.ranks.rank == 1 and self.state.ema.updates == STOP_AT:
            os.kill(os.getpid(), signal.SIGTERM)

    Loop.optimizer_step = stopped_step


def poison_rank_1() -> None:
    """On rank 1 alone one batch has no finite image."""
    if os.environ["RANK"] == "1":
        spoil_images(pytest.MonkeyPatch(), {POISONED})


TRICKS = {"stop": stop_rank_1, "poison": poison_rank_1}


def config_of(training: str, devices: str) -> Config:
    return load(TRAININGS[training], sets=sets_of({**SETTINGS, "train.device": devices}))


def main(args: argparse.Namespace) -> int:
    """One rank. Returns its exit code."""
    logging.basicConfig(level=logging.ERROR)
    Trainer._model_train = fixed_norm
    run = RunRoot(args.runs_dir, args.run)
    try:
        with process_group(args.devices.split(",")) as ranks:
            for training in args.trainings:
                if args.trick and training == args.trainings[-1]:
                    TRICKS[args.trick]()
                with network(training, args.devices):
                    train(config_of(training, args.devices), run, False, ranks)
    except Interrupted as stopped:
        return 128 + stopped.signal
    return 0


def fork(args: argparse.Namespace) -> int:
    """Forks the ranks. Returns the largest exit code; that of a rank which a signal ended is 255."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": str(args.forks), "LOCAL_WORLD_SIZE": str(args.forks)}
    pids = []
    for rank in range(args.forks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            end_with(args)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return max(os.waitstatus_to_exitcode(status) % 256 for status in statuses)


def end_with(args: argparse.Namespace) -> None:
    """Runs a forked rank, and ends it without what Python does at the end of a process that has the parent's state."""
    code = 1
    try:
        code = main(args)
    finally:
        if sys.exc_info()[0] is not None:
            logging.getLogger(__name__).exception("rank %s", os.environ["RANK"])
        os._exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--forks", type=int, default=0)
    parser.add_argument("--trick", choices=TRICKS)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("run")
    parser.add_argument("devices")
    parser.add_argument("trainings", nargs="+", choices=TRAININGS)
    arguments = parser.parse_args()
    sys.exit(fork(arguments) if arguments.forks else main(arguments))
