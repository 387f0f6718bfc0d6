"""Does a training survive? Small ones on the CPU, killed at random times and started again until they end.

Each attempt is a process of its own that runs the train stage and dies by SIGKILL wherever it is: building the network,
in a step, in a validation, in the middle of a file. It is forked from this process, which has torch imported already:
what takes ten seconds in a fresh one takes none here.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.core.config import VARIANTS, Config, load
from app.core.run import RunRoot, hold
from app.data.prepare import prepare
from app.quant.model import load_checkpoint
from app.train.train import train

log = logging.getLogger(__name__)
LIMIT_S = 1800.0  # for a training that nobody kills; longer means that it hangs
KILL_SHARE = 0.6  # of an uninterrupted training's time: the longest that one lives; starting takes about half of that
N_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """How often trainings are killed, and the seed of the times."""

    n_kills: int
    seed: int


@dataclass(frozen=True)
class Uninterrupted:
    """A training that nobody killed: its configuration, the folder of its variant, and how long it took."""

    config: Config
    folder: Path
    seconds: float


def bench_soak(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Kills fp16 and qat trainings in turns until there were n_kills; each must end as an uninterrupted one does.

    Raises:
        RuntimeError: one ended in another state, or failed.
    """
    torch.set_num_threads(1)  # a process that has run OpenMP's threads cannot be forked: the child would hang
    rng = random.Random(plan.seed)  # noqa: S311 - times, no secrets
    configs = [load(variant, overlays, sets) for variant in VARIANTS]
    wholes = [uninterrupted(run, config) for config in configs]
    n_kills = n_torn = n_trainings = 0
    start = time.monotonic()
    while n_kills < plan.n_kills:
        whole = wholes[n_trainings % len(wholes)]
        root = fresh(run, f"{n_trainings}", whole.config)
        n_before = n_kills
        longest_s = KILL_SHARE * whole.seconds
        while n_kills < plan.n_kills and killed(whole.config, root, rng.uniform(0, longest_s)):
            n_kills += 1
            n_torn += any(root.root.rglob(".*.part"))
        killed(whole.config, root, None)
        check_same(whole, root)
        n_trainings += 1
        log.info("training %d, %s: %d kills, same final state", n_trainings, whole.config.label, n_kills - n_before)
        shutil.rmtree(root.root)
    labels = ", ".join(config.label for config in configs)
    log.info(
        "soak: %d kills in %d trainings (%s) in %.0f s, %d of them in the middle of writing a file; weights, EMA, "
        "optimizer, quantizers and results.csv of every training are bit-equal to an uninterrupted one",
        n_kills, n_trainings, labels, time.monotonic() - start, n_torn,
    )  # fmt: skip


def uninterrupted(run: RunRoot, config: Config) -> Uninterrupted:
    """Trains once without a kill."""
    root = fresh(run, f"whole-{config.label}", config)
    start = time.monotonic()
    killed(config, root, None)
    seconds = time.monotonic() - start
    log.info("%s without a kill: %.1f s", config.label, seconds)
    return Uninterrupted(config, root.variant_dir(config.label), seconds)


def check_same(whole: Uninterrupted, root: RunRoot) -> None:
    """Raises RuntimeError where the training of a run root did not end as the uninterrupted one."""
    ended_as = final_state(root.variant_dir(whole.config.label))
    if places := differences(final_state(whole.folder), ended_as):
        raise RuntimeError(f"soak: {root.root} differs from {whole.folder}: {', '.join(places[:N_SHOWN])}")


def fresh(run: RunRoot, name: str, config: Config) -> RunRoot:
    """An empty run root below that of the soak, with its dataset."""
    root = RunRoot(run.runs_dir, f"{run.name}-{name}")
    shutil.rmtree(root.root, ignore_errors=True)
    prepare(config, root, force=False)
    return root


def killed(config: Config, root: RunRoot, after_s: float | None) -> bool:
    """Runs the train stage, at most `after_s` seconds (None: to its end); whether it was killed before its end.

    Raises:
        RuntimeError: it failed, or hangs.
    """
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config, root))
    process.start()
    process.join(LIMIT_S if after_s is None else after_s)
    process.kill()
    process.join(LIMIT_S)
    if process.exitcode == -signal.SIGKILL and after_s is not None:
        return True
    if process.exitcode != 0:
        output = (root.root / "soak.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"soak: a training ended with exit code {process.exitcode}: {output[-2000:]}")
    return False


def _train(config: Config, root: RunRoot) -> None:
    with open(root.root / "soak.log", "ab") as output:
        os.dup2(output.fileno(), 2)
    with hold(root, "train"):
        train(config, root, force=False)


def final_state(variant_dir: Path) -> dict[str, Any]:
    """Both checkpoints, and the rows of results.csv."""
    with open(variant_dir / "results.csv", encoding="utf-8") as file:
        state: dict[str, Any] = {"csv": list(csv.DictReader(file))}
    for name in ("last.pt", "best.pt"):
        state[name] = load_checkpoint(variant_dir / "weights" / name)
    return state


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Places at which two trees of dicts, lists, tensors and plain values are not equal.

    Columns time/* depend on the clock and are left out.
    """
    if "time/" in where:
        return []
    if isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        keys: Any = list(left)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        keys = range(len(left))
    elif torch.is_tensor(left) and torch.is_tensor(right):
        return [] if torch.equal(left, right) else [where]
    else:
        return [] if left == right else [where]
    places = []
    for key in keys:
        places += differences(left[key], right[key], f"{where}/{key}")
    return places
