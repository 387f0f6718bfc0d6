"""Does the evaluated model stay as healthy as the trained one? Small trainings that differ in one ingredient each.

Every arm is the product's own train stage in a process of its own; several share a GPU, and all GPUs are used. A call
ends when all are done or its time is up, and the next call of the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.config import Config, UserError, load
from app.curves import AP_LABEL, COLOURS, NEUTRAL, STATES, candidates, read_rows, save_png
from app.data.prepare import prepare
from app.run import RunRoot, environment, write_json
from app.tables import markdown_table

log = logging.getLogger(__name__)
BASE, WARM, EARLIER = "fp16", "quant.warmup_share=0.67", "quant.scheme=w4a16-decoupled"
BRANCH = "float warm-up"
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
    BRANCH: [],
    f"{BRANCH}, mixed": ["quant.scheme=w4a16-mixed"],
    f"{BRANCH}, w8a16": ["quant.scheme=w8a16"],
    f"{BRANCH}, DFL not exempt": ["quant.scheme=w4a16-dfl"],
    f"{BRANCH}, per tensor": ["quant.scheme=w4a16-per-tensor"],
    f"{BRANCH}, learned scale": ["quant.learned_scale=true"],
    f"{BRANCH}, dampening": ["quant.dampening=1e-3"],
    f"{BRANCH}, freezing": ["quant.freeze_threshold=0.02"],
    f"{BRANCH}, correction": ["quant.correction_epochs=1"],
}
GRACE_S = 30.0  # for saving when the time is up
N_SETTLE = 2  # validations before the running best counts: AP starts at zero
N_LAST = 3  # validations whose mean is steadier than the last one's AP


@dataclass(frozen=True)
class Plan:
    """What a call does: arms by name, seeds, seconds until it saves and returns, trainings at a time."""

    arms: list[str]
    seeds: list[int]
    for_s: float
    n_jobs: int


def bench_stability(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Trains all arms, prints their table and draws their curves; every arm and seed has a run root beside run.root,
    which holds bench-stability.json and .png.

    Raises:
        UserError: an unknown arm, or one that needs another's weights.
    """
    if unknown := [arm for arm in plan.arms if arm not in ARMS]:
        raise UserError(f"--arms {unknown[0]}: choose among {', '.join(ARMS)}")
    if BASE not in plan.arms and (branches := [arm for arm in plan.arms if arm.startswith(BRANCH)]):
        raise UserError(f"--arms {branches[0]}: it begins with the weights of {BASE}, name that arm too")
    jobs = {
        (arm, seed): settings(run, arm, seed, overlays, sets) for seed in plan.seeds for arm in plan.arms
    }  # fmt: skip
    configs = {job: load(variant, overlays, arm_sets) for job, (variant, arm_sets) in jobs.items()}
    for job, config in configs.items():
        prepare(config, root_of(run, *job), force=False)
    train_all(run, overlays, {job: (configs[job], arm_sets) for job, (_, arm_sets) in jobs.items()}, plan)
    rows = [row for job, config in configs.items() if (row := read_arm(run, job, config))]
    result = {
        "settings": sets, "overlays": [str(path) for path in overlays], "rows": rows, "environment": environment()
    }  # fmt: skip
    write_json(run.root / "bench-stability.json", result)
    if rows:
        show(rows)
        save_png(draw(rows), run.root / "bench-stability.png")
        log.info("curves of raw, EMA and EMA + BN: %s", run.root / "bench-stability.png")


def settings(run: RunRoot, arm: str, seed: int, overlays: list[Path], sets: list[str]) -> tuple[str, list[str]]:
    """Variant and --set of one training."""
    own = [*sets, *ARMS[arm], f"train.seed={seed}"]
    n_warm = load("qat", overlays, [*own, WARM]).n_warmup_epochs
    if arm == BASE:
        return "fp16", [*own, f"train.save_period={n_warm}"]
    if arm.startswith(BRANCH):
        kept = root_of(run, BASE, seed).variant_dir("fp16") / "weights" / f"epoch{n_warm}.pt"
        own += [WARM, "quant.warmup_bits=float", f"quant.warmup_from={kept}"]
    return "qat", own


def root_of(run: RunRoot, arm: str, seed: int) -> RunRoot:
    """Run root of one training; the cache of views is shared."""
    return RunRoot(run.runs_dir, f"{run.name}-{arm.replace(',', '').replace(' ', '_')}-{seed}")


def train_all(
    run: RunRoot, overlays: list[Path], jobs: dict[tuple[str, int], tuple[Config, list[str]]], plan: Plan
) -> None:
    """Runs the train stage of every job that is not done, n_jobs at a time, until the time is up."""
    deadline = time.monotonic() + plan.for_s
    waiting = [job for job, (config, _) in jobs.items() if not is_done(run, job, config)]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    place: dict[tuple[str, int], str] = {}  # job -> its GPU
    while (waiting or running) and time.monotonic() < deadline:
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
        return subprocess.Popen(command, stdout=output, stderr=output, env=environ)


def is_done(run: RunRoot, job: tuple[str, int], config: Config) -> bool:
    return (root_of(run, *job).variant_dir(config.label) / "done.json").exists()


def read_arm(run: RunRoot, job: tuple[str, int], config: Config) -> dict[str, Any] | None:
    """What one training gave so far, from its results.csv; None before the first validation that counts."""
    path = root_of(run, *job).variant_dir(config.label) / "results.csv"
    rows = candidates(read_rows(path)) if path.exists() else []
    if not rows:
        return None
    curves = {state: [row[f"AP/{state}"] for row in rows] for state in STATES}
    return {
        "arm": job[0], "seed": job[1], "epochs": int(rows[-1]["epoch"]), "of_epochs": config.train.epochs,
        "epoch": [int(row["epoch"]) for row in rows], "AP": curves,
        "lowest_share_of_best": {state: lowest_share(curve) for state, curve in curves.items()},
        "val_loss": [row["val_loss/ema_bn"] for row in rows], "corrected": rows[-1].get("AP/corrected"),
    }  # fmt: skip


def lowest_share(aps: list[float]) -> float | None:
    """Smallest AP / best AP so far, after the first N_SETTLE validations; None while there are no more."""
    shares = [ap / max(aps[: i + 1]) for i, ap in enumerate(aps) if i >= N_SETTLE and max(aps[: i + 1]) > 0]
    return min(shares, default=None)


def show(rows: list[dict[str, Any]]) -> None:
    """One row an arm: means over its seeds, each with its spread. The loss, of EMA+BN, differs less between seeds than
    AP does. The lowest share is that of the worst seed, whose AP also jumps with the few images it is measured on; the
    last one is that of the mean curve of all seeds."""
    cells = [[
        "arm", "seeds", "epochs", "AP raw", "AP EMA", "AP EMA+BN", "of FP16", f"of FP16, last {N_LAST}", "val loss",
        "lowest share of best: raw", "EMA", "EMA+BN", "EMA+BN, mean curve", "best -> corrected",
    ]]  # fmt: skip
    by_arm = rows_by_arm(rows)
    for arm, of in by_arm.items():
        epochs = min(row["epochs"] for row in of)
        finals = [[at(row, row["AP"][state], epochs) for row in of] for state in STATES]
        losses = [at(row, row["val_loss"], epochs) for row in of]
        lows = [[row["lowest_share_of_best"][state] for row in of] for state in STATES]
        lows.append([lowest_share(list(mean_curve(of).values()))])
        cells.append([
            arm, str(len(of)), str(epochs), *map(spread, finals),
            *(share_of_fp16(of, by_arm.get(BASE, []), n) for n in (1, N_LAST)),
            spread(losses), *("-" if None in low else f"{min(low):.2f}" for low in lows), corrected(of),
        ])  # fmt: skip
    for line in markdown_table(cells):
        log.info("%s", line)


def mean_curve(of: list[dict[str, Any]], state: str = "ema_bn") -> dict[int, float]:
    """Epoch -> mean AP of the seeds, for every epoch that all have validated."""
    curves = [dict(zip(row["epoch"], row["AP"][state], strict=True)) for row in of]
    epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel an arm: mean AP of its seeds in the three states; FP16's scored one is grey behind each."""
    by_arm = rows_by_arm(rows)
    n_columns = math.ceil(math.sqrt(len(by_arm)))
    n_rows = -(-len(by_arm) // n_columns)
    size = (max(3.2 * n_columns, 8), 2.9 * n_rows + 0.5)  # the legend takes a line of eight inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (arm, of) in zip(panels, by_arm.items(), strict=False):
        if arm != BASE and BASE in by_arm:
            base = mean_curve(by_arm[BASE])
            panel.plot(list(base), list(base.values()), color=NEUTRAL, alpha=0.5, linewidth=4)
        for state, (style, width, _) in STATES.items():
            curve = mean_curve(of, state)
            panel.plot(list(curve), list(curve.values()), style, linewidth=width, color=COLOURS[arm != BASE])
        panel.set_title(f"{arm} (n={len(of)})", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    for panel in panels[len(by_arm) :]:
        panel.remove()
    figure.supylabel(AP_LABEL, fontsize=10)
    lines = [Line2D([], [], ls=style, lw=width, color=COLOURS[1], label=name) for style, width, name in STATES.values()]
    lines.append(Line2D([], [], lw=4, alpha=0.5, color=NEUTRAL, label="FP16, scored"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return figure


def rows_by_arm(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def corrected(of: list[dict[str, Any]]) -> str:
    """Mean AP of the best states before and after quant.correction_epochs; '-' until all have it."""
    after = [row["corrected"] for row in of]
    best = statistics.fmean(max(row["AP"]["ema_bn"]) for row in of)
    return "-" if None in after else f"{best:.4f} -> {statistics.fmean(after):.4f}"


def at(row: dict[str, Any], curve: list[float], epoch: int, n_last: int = 1) -> float:
    """Mean of a curve of `row` over the last `n_last` validations up to `epoch`; NaN where there are fewer."""
    values = [value for of_epoch, value in zip(row["epoch"], curve, strict=True) if of_epoch <= epoch]
    return statistics.fmean(values[-n_last:]) if len(values) >= n_last else math.nan


def spread(values: list[float]) -> str:
    """Mean, and half the range of several seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{half}"


def share_of_fp16(of: list[dict[str, Any]], fp16: list[dict[str, Any]], n_last: int) -> str:
    """Mean scored AP over FP16's, of the seeds and up to the last epoch that both have, with the standard error of the
    mean of the seeds' differences."""
    pairs = [(row, base) for row in of for base in fp16 if row["seed"] == base["seed"]]
    if not pairs:
        return "-"
    epoch = min(row["epochs"] for pair in pairs for row in pair)
    ours, base = ([at(row, row["AP"]["ema_bn"], epoch, n_last) for row in side] for side in zip(*pairs, strict=True))
    mean = statistics.fmean(base)
    if not mean or math.isnan(mean + sum(ours)):
        return "-"
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    error = f" ± {statistics.stdev(differences) / math.sqrt(len(pairs)) / mean:.3f}" if len(pairs) > 1 else ""
    return f"{statistics.fmean(ours) / mean:.3f}{error} at {epoch}"
