"""Does the evaluated model stay as healthy as the trained one? Small trainings that differ in one ingredient each.

Every arm is the product's own train stage in a process of its own; several share a GPU, and all GPUs are used. A call
ends when all are done or its time is up, and the next call of the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from app.bench.stability_rows import merge, read_arm, read_file, recipe, up_to, write_file
from app.bench.stability_table import BASE, draw, show
from app.core.config import Config, UserError, load
from app.core.curves import save_png
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.train.interrupt import Interrupt

log = logging.getLogger(__name__)
WARM, EARLIER = "quant.warmup_share=0.67", "quant.scheme=w4a16-decoupled"
BRANCH = "float warm-up"
FLOAT = [WARM, "quant.warmup_bits=float"]
# Arm -> settings beside the variant's. That EMA and re-estimation are left out needs no arm: every arm scores all three
# states. The arms named after BRANCH begin with the weights that fp16 of the same seed has after the warm-up: what an
# option changes there is seen without the difference between two trainings; w8a16 shows how much noise is left.
ARMS: dict[str, list[str]] = {
    BASE: [],
    "w4a16": [],
    "w4a16-mixed": ["quant.scheme=w4a16-mixed"],
    "earlier recipe": [EARLIER, "quant.averaged_scales=false"],
    "earlier recipe, scales averaged": [EARLIER],
    "8-bit warm-up": [WARM],
    "8-bit warm-up, mixed": [WARM, "quant.scheme=w4a16-mixed"],
    BRANCH: FLOAT,
    f"{BRANCH}, mixed": [*FLOAT, "quant.scheme=w4a16-mixed"],
    f"{BRANCH}, w8a16": [*FLOAT, "quant.scheme=w8a16"],
    f"{BRANCH}, DFL not exempt": [*FLOAT, "quant.scheme=w4a16-dfl"],
    f"{BRANCH}, per tensor": [*FLOAT, "quant.scheme=w4a16-per-tensor"],
    f"{BRANCH}, learned scale": [*FLOAT, "quant.learned_scale=true"],
    f"{BRANCH}, dampening": [*FLOAT, "quant.dampening=1e-3"],
    f"{BRANCH}, freezing": [*FLOAT, "quant.freeze_threshold=0.02"],
    f"{BRANCH}, correction": [*FLOAT, "quant.correction_epochs=1"],
}
DEFAULT_SEEDS = [0, 1]
GRACE_S = 30.0  # for saving when the time is up


@dataclass(frozen=True)
class Plan:
    """What a call does: arms by name, seeds, seconds until it saves and returns (0: trains nothing and needs no data),
    trainings at a time, the epoch up to which they are shown (None: each training's last), and files of other calls
    whose rows join the table."""

    arms: list[str]
    seeds: list[int] | None
    for_s: float
    n_jobs: int
    until: int | None = None
    files: tuple[Path, ...] = ()


def bench_stability(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Trains all arms, prints their table and draws their curves; every arm and seed has a run root beside run.root,
    which holds bench-stability.json and .png.

    Raises:
        UserError: an unknown arm, one that needs another's weights, or files of other trainings than these.
    """
    if unknown := [arm for arm in plan.arms if arm not in ARMS]:
        raise UserError(f"--arms {unknown[0]}: choose among {', '.join(ARMS)}")
    if BASE not in plan.arms and (branches := [arm for arm in plan.arms if arm.startswith(BRANCH)]):
        raise UserError(f"--arms {branches[0]}: it begins with the weights of {BASE}, name that arm too")
    seeds = DEFAULT_SEEDS if plan.seeds is None else plan.seeds
    jobs = {(arm, seed): settings(run, arm, seed, overlays, sets) for seed in seeds for arm in plan.arms}
    configs = {job: load(variant, overlays, arm_sets) for job, (variant, arm_sets) in jobs.items()}
    of_all = recipe(load("qat", overlays, sets), ARMS)
    others = [row for path in plan.files for row in read_file(path, of_all)]
    if plan.for_s:
        for job, config in configs.items():
            prepare(config, root_of(run, *job), force=False)
        train_all(run, overlays, {job: (configs[job], arm_sets) for job, (_, arm_sets) in jobs.items()}, plan)
    own = [read_arm(job, config, root_of(run, *job).variant_dir(config.label)) for job, config in configs.items()]
    rows = merge([*filter(None, own), *others], list(ARMS))
    write_file(run.root / "bench-stability.json", of_all, rows)
    wanted = [row for row in rows if row["arm"] in plan.arms and (plan.seeds is None or row["seed"] in plan.seeds)]
    visible = wanted if plan.until is None else [part for row in wanted if (part := up_to(row, plan.until))]
    if not visible:
        log.info("nothing to show yet: no such training has been validated")
        return
    show(visible)
    save_png(draw(visible), run.root / "bench-stability.png")
    log.info("curves of raw, EMA and EMA + BN: %s", run.root / "bench-stability.png")


def settings(run: RunRoot, arm: str, seed: int, overlays: list[Path], sets: list[str]) -> tuple[str, list[str]]:
    """Variant and --set of one training."""
    own = [*sets, *ARMS[arm], f"train.seed={seed}"]
    n_warm = load("qat", overlays, [*own, WARM]).n_warmup_epochs
    if arm == BASE:
        return "fp16", [*own, f"train.save_period={n_warm}"]
    if arm.startswith(BRANCH):
        kept = root_of(run, BASE, seed).variant_dir("fp16") / "weights" / f"epoch{n_warm}.pt"
        own.append(f"quant.warmup_from={kept}")
    return "qat", own


def root_of(run: RunRoot, arm: str, seed: int) -> RunRoot:
    """Run root of one training; the cache of views is shared."""
    return RunRoot(run.runs_dir, f"{run.name}-{arm.replace(',', '').replace(' ', '_')}-{seed}")


def train_all(
    run: RunRoot, overlays: list[Path], jobs: dict[tuple[str, int], tuple[Config, list[str]]], plan: Plan
) -> None:
    """Runs the train stage of every job that is not done, n_jobs at a time, until the time is up.

    Raises:
        Interrupted: a signal came; the trainings have saved everything and ended.
    """
    deadline = time.monotonic() + plan.for_s
    waiting = [job for job, (config, _) in jobs.items() if not is_done(run, job, config)]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    place: dict[tuple[str, int], str] = {}  # job -> its GPU
    with Interrupt() as interrupt:
        while (waiting or running) and not interrupt.signal and time.monotonic() < deadline:
            ready = [job for job in waiting if can_start(jobs[job][0])]
            for job in ready[: plan.n_jobs - len(running)]:
                waiting.remove(job)
                taken = [place[other] for other in running]
                place[job] = min(visible_gpus(), key=taken.count)
                config, sets = jobs[job]
                running[job] = start(run, job, overlays, (config.variant, sets, place[job]))
            if not running:  # the rest waits for one that failed
                break
            time.sleep(0.5)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                log.info("%s, seed %d: %s", *job, "done" if code == 0 else f"ended with exit code {code}")
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait(GRACE_S)
    if waiting or running:
        log.info("%d trainings are not done: the same command goes on", len(waiting) + len(running))
    interrupt.leave()


def can_start(config: Config) -> bool:
    """Whether the checkpoint that it begins with is there."""
    return config.warmup_from is None or config.warmup_from.exists()


def visible_gpus() -> list[str]:
    """Indices for CUDA_VISIBLE_DEVICES; one empty string where there is no GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given is not None else [str(i) for i in range(torch.cuda.device_count())] or [""]


def start(
    run: RunRoot, job: tuple[str, int], overlays: list[Path], of: tuple[str, list[str], str]
) -> subprocess.Popen[bytes]:
    """Starts one training; `of` is variant, settings and GPU."""
    root = root_of(run, *job)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": of[2]}
    command = [sys.executable, "-W", "ignore", "-m", "app", "train", "--variant", of[0], "--run", root.name]
    command += ["--runs-dir", str(run.runs_dir), *(part for path in overlays for part in ("--conf", str(path)))]
    command += [part for item in of[1] for part in ("--set", item)]
    with open(root.root / "bench.log", "ab") as output:
        # A session of its own: a terminal's Ctrl-C reaches it as our SIGTERM alone, a second signal would not save.
        return subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)


def is_done(run: RunRoot, job: tuple[str, int], config: Config) -> bool:
    return (root_of(run, *job).variant_dir(config.label) / "done.json").exists()
