"""The estimate stage: a pilot job on a few images, each stage watched -> estimate.json, the price of the whole job."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.child import job_words
from app.core.config import Config, load
from app.core.environment import environment
from app.core.files import read_json, write_json
from app.core.labels import SCORES_ENDING
from app.core.memory import available_bytes
from app.core.os_errors import free_bytes
from app.core.progress import clock
from app.core.results import read_rows
from app.core.run import Images, RunRoot, images_of
from app.estimate.price import Peaks, between_epochs, eval_seconds, limit, training_parts, training_seconds
from app.estimate.watch import Took, run_watched

CPU_BATCH_PX = 850_000  # of the pilot's batch on a CPU: two images of 640 px, all of the smoke's
CPU_TRAIN_PX, CPU_VAL_PX = 2_500_000, 1_650_000  # of an epoch: 6 and 4 images of 640 px, 97 and 64 of the smoke's
MIN_BATCHES, N_BATCHES_GPU = 3, 24  # of each of its two epochs
N_EPOCHS = 2  # the first one compiles and fills caches
N_BATCHES_HALF = 2  # of the training that only shows what half a batch takes in memory
MEMORY_SHARE = 0.92  # of a GPU or of the machine, up to which a batch may fill it
CACHED_SHARE = 0.75  # of a square that an image fills: most are as 4 to 3
FILE_BYTES = 4096  # a label file on the disk
GIB = 2**30
AFTER = ("ptq", "export", "eval", "report")
OFF = (
    "train.save_period=0", "report.min_ap50=null", "guard.collapse=warn", "guard.divergence=warn",
    "quant.warmup_from=null", "quant.warmup_share=0", "quant.correction_epochs=0", "eval.max_images=null",
    "eval.latency_warmup=1", "eval.latency_runs=5",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """The settings of the command line: overlays and --set."""

    overlays: list[Path]
    sets: list[str]

    def words(self, stage: str, run: RunRoot, *sets: str) -> list[str]:
        return [*stage.split(), *job_words(run.name, run.runs_dir, self.overlays, [*self.sets, *sets])]

    def config(self, variant: str, *sets: str) -> Config:
        return load(variant, self.overlays, [*self.sets, *sets])


def estimate(command: Command, run: RunRoot) -> None:
    """Runs the pilot beside the run and writes the run's estimate.json; nothing of the pilot stays.

    Raises:
        UserError: the pilot failed, as the job would.
    """
    start = time.monotonic()
    with scratch(run, "data") as whole, scratch(run, "pilot") as pilot_run, scratch(run, "half") as half_run:
        data = watched(command, "data", whole)
        images = images_of(whole)
        pilot = Pilot(command, pilot_run, images)
        took = {f"train {variant}": pilot.run(f"train --variant {variant}") for variant in ("fp16", "qat")}
        half = Half(command, half_run, images)
        half_took = half.run("train --variant fp16") if half.batch < pilot.batch else took["train fp16"]
        took |= {stage: pilot.run(stage) for stage in AFTER}
        seconds = job_seconds(pilot, {"data": data, **took})
        full_took = took["train fp16"]
        facts = summary(pilot, seconds, full_took)
        ram = Peaks(half.batch, half_took.peak_bytes, pilot.batch, full_took.peak_bytes)
        cache_gib = images.train * 3 * pilot.config.train.imgsz**2 * CACHED_SHARE / GIB
        facts["ram"] = memory(ram, pilot.config.train.batch, available_bytes()) | {"train_cache_gib": cache_gib}
        if full_took.gpu_total_bytes:
            gpu = Peaks(half.batch, half_took.gpu_peak_bytes, pilot.batch, full_took.gpu_peak_bytes)
            facts["gpu"] = memory(gpu, pilot.config.train.batch, full_took.gpu_total_bytes)
    facts["pilot"] |= {"seconds": {stage: of.seconds for stage, of in took.items()}, "all_s": time.monotonic() - start}
    write_json(run.root / "estimate.json", facts)
    for line in shown(facts):
        log.info("%s", line)
    log.info("estimate: %s, in %s", run.root / "estimate.json", clock(facts["pilot"]["all_s"]))


@contextmanager
def scratch(run: RunRoot, what: str) -> Iterator[RunRoot]:
    """A run root of the estimate's own, which is deleted."""
    own = RunRoot(run.runs_dir, f"{run.name}-estimate-{what}")
    shutil.rmtree(own.root, ignore_errors=True)
    own.root.mkdir(parents=True)
    try:
        yield own
    finally:
        shutil.rmtree(own.root, ignore_errors=True)


def watched(command: Command, stage: str, run: RunRoot, *sets: str) -> Took:
    log.info("estimate: %s", stage)
    return run_watched(command.words(stage, run, *sets), run.root / "said.txt")


class Pilot:
    """The job on a few images and two epochs.

    Args:
        images: those of the job.
    """

    divisor, epochs = 1, N_EPOCHS

    def __init__(self, command: Command, run: RunRoot, images: Images) -> None:
        self.command, self.run_root, self.images = command, run, images
        self.config = command.config("qat")
        train = self.config.train
        self.has_gpu = train.device != "cpu" and sees_gpu()
        most = train.batch if self.has_gpu else min(train.batch, max(CPU_BATCH_PX // train.imgsz**2, 1))
        self.batch = max(most // self.divisor, 1)
        self.seen = Images(min(self.batch * self.n_batches(), images.train), min(self.n_val(), images.val))
        val_every = 1 if self.has_gpu else self.epochs  # the first validation compiles, on a GPU
        self.sets = (
            f"train.epochs={self.epochs}", f"train.batch={self.batch}", f"data.n_train={self.seen.train}",
            f"data.n_val={self.seen.val}", f"train.val_every={val_every}", *OFF,
        )  # fmt: skip

    def n_batches(self) -> int:
        """Of an epoch."""
        n_px = self.batch * self.config.train.imgsz**2
        return N_BATCHES_GPU if self.has_gpu else max(CPU_TRAIN_PX // n_px, MIN_BATCHES)

    def n_val(self) -> int:
        return max(2 * self.batch, 16) if self.has_gpu else max(CPU_VAL_PX // self.config.train.imgsz**2, 1)

    def run(self, stage: str) -> Took:
        return watched(self.command, stage, self.run_root, *self.sets)


class Half(Pilot):
    """A training of half the pilot's batch, as short as may be: only its memory is of use."""

    divisor, epochs = 2, 1

    def n_batches(self) -> int:
        return N_BATCHES_HALF

    def n_val(self) -> int:
        return 1


def job_seconds(pilot: Pilot, took: dict[str, Took]) -> dict[str, dict[str, float]]:
    """Stage -> seconds of its parts, for the whole job."""
    seconds = {stage: {"all": watched.seconds} for stage, watched in took.items()}
    for variant in ("fp16", "qat"):
        config, own = pilot.command.config(variant), pilot.command.config(variant, *pilot.sets)
        folder = pilot.run_root.variant_dir(own.label)
        rows = read_rows(folder / "results.csv")
        between_s = between_epochs((folder / "log.txt").read_text(encoding="utf-8", errors="replace"), rows)
        parts = training_parts(own, pilot.seen, took[f"train {variant}"].seconds, rows, between_s)
        seconds[f"train {variant}"] = training_seconds(config, pilot.images, parts)
    n_scored = min(pilot.config.eval.max_images or pilot.images.val, pilot.images.val)
    seconds["eval"] = eval_seconds(pilot.config, took["eval"].seconds, scored(pilot.run_root), n_scored)
    return seconds


def scored(run: RunRoot) -> list[dict[str, Any]]:
    return [read_json(path, "eval") for path in sorted(run.root.glob(f"*{SCORES_ENDING}/metrics.json"))]


def summary(pilot: Pilot, seconds: dict[str, dict[str, float]], training: Took) -> dict[str, Any]:
    """The content of estimate.json but for the memory; `training` is the pilot's."""
    totals = {stage: sum(parts.values()) for stage, parts in seconds.items()}
    whole_s = sum(totals.values())
    gpu_use = sorted(training.gpu_use)[len(training.gpu_use) // 2] if training.gpu_use else None
    part, remedy = limit(gpu_use, training.cpu_s / training.seconds / len(os.sched_getaffinity(0)))
    return {
        "hours": {stage: total / 3600 for stage, total in totals.items()} | {"whole job": whole_s / 3600},
        "seconds": seconds,
        "done_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + whole_s)),
        "disk": disk(pilot),
        "limit": {"part": part, "set": remedy},
        "pilot": {"batch": pilot.batch, "n_train": pilot.seen.train, "n_val": pilot.seen.val},
        "images": {"train": pilot.images.train, "val": pilot.images.val},
        "config": pilot.command.config("qat").model_dump(mode="json"),
        "environment": environment(),
    }


def sees_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def memory(peaks: Peaks, batch: int, total: int) -> dict[str, Any]:
    return {
        "peak_gib": peaks.at(batch) / GIB,
        "available_gib": total / GIB,
        "largest_batch": peaks.largest_batch(total, MEMORY_SHARE),
    }


def disk(pilot: Pilot) -> dict[str, float]:
    """What the run leaves behind, and what is free; detections grow with the val images, labels with all."""
    files = [path for path in pilot.run_root.root.rglob("*") if path.is_file()]
    detections = sum(path.stat().st_size for path in files if path.name == "detections.json")
    others = sum(path.stat().st_size for path in files) - detections
    labels = (pilot.images.train + pilot.images.val) * FILE_BYTES
    needed = others + detections / pilot.seen.val * pilot.images.val + labels
    return {"needed_gib": needed / GIB, "free_gib": free_bytes(pilot.run_root.root) / GIB}


def shown(facts: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    lines = []
    for stage, parts in facts["seconds"].items():
        of_what = ", ".join(f"{part} {clock(value)}" for part, value in parts.items() if part != "all" and value >= 1)
        lines.append(f"{stage}: {clock(sum(parts.values()))}" + (f" ({of_what})" if of_what else ""))
    lines.append(f"whole job: {facts['hours']['whole job']:.1f} h, started now done at {facts['done_at']}")
    for name in ("ram", "gpu"):
        if of := facts.get(name):
            largest = f", largest batch {of['largest_batch']}" if of["largest_batch"] is not None else ""
            cache = f"; train.cache=true takes {of['train_cache_gib']:.1f} GiB more" if name == "ram" else ""
            lines.append(f"{name}: {of['peak_gib']:.1f} of {of['available_gib']:.1f} GiB{largest}{cache}")
    needed, free = facts["disk"]["needed_gib"], facts["disk"]["free_gib"]
    lines.append(f"disk: {needed:.1f} GiB needed, {free:.0f} GiB free" + (": make room" if needed > free else ""))
    lines.append(f"limited by: {facts['limit']['part']}; to set: {facts['limit']['set']}")
    return lines
