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


def bench_soak(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Kills fp16 and qat trainings in turns until there were n_kills; each must end as an uninterrupted one does.

    Raises:
        RuntimeError: one ended in another state, or failed.
    """
    torch.set_num_threads(1)  # a process that has run OpenMP's threads cannot be forked: the child would hang
    rng = random.Random(plan.seed)  # noqa: S311 - times, no secrets
    configs = {variant: load(variant, overlays, sets) for variant in VARIANTS}
    whole = {variant: uninterrupted(run, config) for variant, config in configs.items()}
    n_kills = n_torn = n_trainings = 0
    start = time.monotonic()
    while n_kills < plan.n_kills:
        variant = VARIANTS[n_trainings % len(VARIANTS)]
        config, (whole_dir, took_s) = configs[variant], whole[variant]
        root = fresh(run, f"{n_trainings}", config)
        n_before = n_kills
        while n_kills < plan.n_kills and killed(config, root, rng.uniform(0, KILL_SHARE * took_s)):
            n_kills += 1
            n_torn += any(root.root.rglob(".*.part"))
        killed(config, root, None)
        found = differences(final_state(whole_dir), final_state(root.variant_dir(config.label)))
        if found:
            raise RuntimeError(f"soak: {root.root} differs from {whole_dir}: {', '.join(found[:N_SHOWN])}")
        n_trainings += 1
        log.info("training %d, %s: %d kills, same final state", n_trainings, config.label, n_kills - n_before)
        shutil.rmtree(root.root)
    labels = ", ".join(config.label for config in configs.values())
    log.info(
        "soak: %d kills in %d trainings (%s) in %.0f s, %d of them in the middle of writing a file; weights, EMA, "
        "optimizer, quantizers and results.csv of every training are bit-equal to an uninterrupted one",
        n_kills, n_trainings, labels, time.monotonic() - start, n_torn,
    )  # fmt: skip


def uninterrupted(run: RunRoot, config: Config) -> tuple[Path, float]:
    """Folder and seconds of a training that nobody kills."""
    root = fresh(run, f"whole-{config.label}", config)
    start = time.monotonic()
    killed(config, root, None)
    log.info("%s without a kill: %.1f s", config.label, time.monotonic() - start)
    return root.variant_dir(config.label), time.monotonic() - start


def fresh(run: RunRoot, name: str, config: Config) -> RunRoot:
    """An empty run root below that of the soak, with its dataset."""
    root = RunRoot(run.runs_dir, f"{run.name}-{name}")
    shutil.rmtree(root.root, ignore_errors=True)
    prepare(config, root, force=False)
    return root


def killed(config: Config, root: RunRoot, after_s: float | None) -> bool:
    """Runs the train stage, at most so many seconds; whether it was killed before its end.

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
    """Both checkpoints, and the rows of results.csv; all without what depends on the clock."""
    with open(variant_dir / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    weights_dir = variant_dir / "weights"
    return {"csv": rows, **{name: load_checkpoint(weights_dir / name) for name in ("last.pt", "best.pt")}}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places at which two trees of dicts, lists, tensors and plain values are not equal; time/* is left out."""
    if "time/" in where:
        return []
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in differences(*pair, f"{where}/{i}")]
    same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b
    return [] if same else [where]
