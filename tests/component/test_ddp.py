"""Training on several devices: gloo processes on the CPU, started by torchrun and by the train stage itself."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from app.core.config import UserError, load
from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.core.run import RunRoot
from app.quant.model import load_checkpoint, load_scored
from app.train.batches import EpochBatches, Part
from app.train.processes import Ranks
from app.train.train import device_of, train
from app.train.trainer import Trainer
from tests.support.ddp_program import POISONED, SETTINGS, STOP_AT, TRAININGS, fixed_norm, network
from tests.support.settle import AT_EVERY_STEP, sets_of, settle

PROGRAM = REPO_DIR / "tests" / "support" / "ddp_program.py"
STEPS = 5  # optimizer steps of a training: three in the epoch of the warm-up, two in the other
# N processes add the same numbers in another order: 1e-7 of a number, a few times that after some steps. Rows have
# five decimals of losses from 0.1 on. A 4-bit weight within that of the middle of two codes rounds to the other one.
LOSS_RTOL, WEIGHT_ATOL = 1e-4, 1e-5


@pytest.fixture(scope="module")
def alone(runs_dir: Path) -> dict[str, dict[str, Any]]:
    """Last checkpoints of one process, by training."""
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_model_train", fixed_norm)
        for training, variant in TRAININGS.items():
            config, run = settle(runs_dir, f"alone-{training}", variant, SETTINGS)
            with network(training, "cpu"):
                train(config, run, force=False)
            states[training] = last(run, config.label)
    return states


def last(run: RunRoot, label: str) -> dict[str, Any]:
    return load_checkpoint(run.variant_dir(label) / "weights" / "last.pt")


def run_program(command: list[str], runs_dir: Path, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    settle(runs_dir, run, "qat", SETTINGS)
    env = {**os.environ, "PYTHONPATH": str(REPO_DIR), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([*command, str(runs_dir), run, "cpu", *words], env=env, capture_output=True, text=True)


def torchrun(n: int, runs_dir: Path, run: str, *trainings: str) -> subprocess.CompletedProcess[str]:
    """The program in n processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}"]
    # As app/train/processes.py has it: a container without a network cannot look up its own name.
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost", str(PROGRAM)]
    return run_program(command, runs_dir, run, *trainings)


def forks(
    n: int, runs_dir: Path, run: str, *trainings: str, trick: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The same without torchrun, whose processes take longer to import torch than to train."""
    options = ["--trick", trick] if trick else []
    return run_program([sys.executable, str(PROGRAM), f"--forks={n}", *options], runs_dir, run, *trainings)


def losses(state: dict[str, Any]) -> list[float]:
    return [value for row in state["rows"] for name, value in row.items() if name.startswith("train/")]


def assert_same_training(state: dict[str, Any], alone: dict[str, Any]) -> None:
    assert losses(state) == pytest.approx(losses(alone), rel=LOSS_RTOL)
    assert state["ema_updates"] == alone["ema_updates"] == STEPS
    for name, tensor in alone["model"].items():
        if tensor.is_floating_point():
            assert (tensor - state["model"][name]).abs().max() <= WEIGHT_ATOL, name
    for name, tensor in alone["scored"].items():  # EMA, and BatchNorm re-estimated on whole batches by rank 0
        assert torch.allclose(tensor.float(), state["scored"][name].float(), rtol=1e-3, atol=1e-4), name


def test_two_processes_train_as_one(alone: dict[str, dict[str, Any]], runs_dir: Path) -> None:
    result = torchrun(2, runs_dir, "two", "yolov10n", "qat")
    assert result.returncode == 0, result.stderr
    for training, label in (("yolov10n", "fp16"), ("qat", "qat-w4a16")):
        assert_same_training(last(RunRoot(runs_dir, "two"), label), alone[training])


def test_three_train_as_one_stop_together_and_two_go_on(alone: dict[str, dict[str, Any]], runs_dir: Path) -> None:
    """The signal reaches one process of three, in the second epoch."""
    run = RunRoot(runs_dir, "three")
    result = forks(3, runs_dir, "three", "fp16", "qat", trick="stop")
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert_same_training(last(run, "fp16"), alone["fp16"])
    assert last(run, "qat-w4a16")["ema_updates"] == STOP_AT, result.stderr
    result = forks(2, runs_dir, "three", "qat")
    assert result.returncode == 0, result.stderr
    assert_same_training(last(run, "qat-w4a16"), alone["qat"])


def test_all_go_back_when_one_meets_what_is_not_finite(runs_dir: Path) -> None:
    run = RunRoot(runs_dir, "poisoned")
    result = forks(2, runs_dir, "poisoned", "qat", trick="poison")
    assert result.returncode == 0, result.stderr
    state = last(run, "qat-w4a16")
    assert [(fault["batches"], fault["cause"]) for fault in state["faults"]] == [([POISONED], "the images")]
    assert state["ema_updates"] == STEPS
    assert all(map(math.isfinite, losses(state)))
    kept = run.variant_dir("qat-w4a16") / "faults" / f"batch-{POISONED}-of-process-2.pt"
    assert len(load_checkpoint(kept)["batches"][0]["im_file"]) == 4


@contextlib.contextmanager
def started(runs_dir: Path, run: str, settings: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The command of the user; it is killed where the block fails."""
    words = [word for item in sets_of({**settings, "train.device": "cpu,cpu"}) for word in ("--set", item)]
    command = [sys.executable, "-m", "app", "train", "--variant", "qat", "--run", run, "--runs-dir", str(runs_dir)]
    with subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, cwd=REPO_DIR) as launcher:
        try:
            yield launcher
        except BaseException:
            launcher.terminate()
            raise


def wait_for_checkpoint(path: Path, newer_than: int, launcher: subprocess.Popen[str]) -> None:
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


def test_killed_then_stopped_then_finished_by_one_process(runs_dir: Path) -> None:
    """kill -9 to one process, TERM to the launcher, and one process ends what they began; the folder is like any."""
    settings = {**SETTINGS, **AT_EVERY_STEP, "data.n_val": 2, "train.val_every": 2}
    config, run = settle(runs_dir, "killed", "qat", settings)
    checkpoint = run.variant_dir(config.label) / "weights" / "last.pt"
    with started(runs_dir, "killed", settings) as launcher:
        wait_for_checkpoint(checkpoint, 0, launcher)
        ranks = psutil.Process(launcher.pid).children()
        next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
        _, said = launcher.communicate()
    assert launcher.returncode == 1, said
    assert "process 2 of 2 was killed by SIGKILL" in said
    assert not any(rank.is_running() for rank in ranks)
    before = checkpoint.stat().st_mtime_ns
    with started(runs_dir, "killed", settings) as launcher:
        wait_for_checkpoint(checkpoint, before, launcher)
        launcher.terminate()
        _, said = launcher.communicate()
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert "continues after" in said
    assert said.count("stopped by SIGTERM, everything is saved") == 1, said
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    assert read_json(folder / "done.json", "train")["epochs"] == 2
    assert [row["epoch"] for row in load_checkpoint(checkpoint)["rows"]] == [1, 2]
    assert load_scored(folder / "weights" / "best.pt")[1].label == config.label


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_parts_of_a_batch_are_the_batch_whatever_their_number(n: int) -> None:
    """Also from inside an epoch on, as a resumed training with another number of processes reads them."""
    whole, parts = EpochBatches(30, 8), [EpochBatches(30, 8, Part(k, n)) for k in range(n)]
    for sampler in (whole, *parts):
        sampler.start(epoch=5, batch=1)
    for _ in range(2):
        for batch, *of_batch in zip(whole, *parts, strict=True):
            assert list(itertools.chain(*of_batch)) == batch
            sizes = [len(part) for part in of_batch]
            assert max(sizes) - min(sizes) <= 1


def test_a_process_without_an_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.batch=8 leaves 1 of 33 images .* fewer than 2 processes"):
        EpochBatches(33, 8, Part(0, 2))


def test_each_process_takes_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.train.train.check_devices", lambda config: config.train.device.split(","))
    config = load("qat", sets=["train.device=1,3"])
    assert [device_of(config, Ranks(local=local, n=4)) for local in (0, 1)] == ["1", "3"]
    with pytest.raises(UserError, match=r"4 processes on this machine, train\.device names 2 GPU"):
        device_of(config, Ranks(local=2, n=4, n_local=4))
    assert device_of(load("qat", sets=["train.device=cpu"]), Ranks(local=2, n=4)) == "cpu"
