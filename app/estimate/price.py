"""From what the pilot took to what the job takes: the arithmetic alone.

A training:  start + epochs * (n_train * image_s + between_s)
             + n_validations * (n_val * val_image_s + n_bn * bn_image_s)
Eval:        start + files * (n_val * image_s + (warm-up + runs) * latency)

n_bn: images that BatchNorm is re-estimated on, train.bn_batches batches or all. between_s: from the line of an epoch to
the start of the next one, which is the checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.core.config import Config
from app.core.results import Rows
from app.core.run import Images, n_bn_images

BN_TIME = "time/bn_reestimation_s"  # a column of results.csv
EPOCH_LINE = re.compile(r"^(\S+ \S+) .* epoch \d+/\d+: loss ", re.MULTILINE)  # of log.txt, and its time
LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"


def training_parts(pilot: Config, seen: Images, wall_s: float, rows: Rows, between_s: float) -> dict[str, float]:
    """Seconds of a training's start, and per image; the pilot's last epoch validates, with everything compiled.

    Args:
        pilot, seen: configuration and images of the pilot; wall_s: of its whole process; rows: its results.csv;
            between_s: from an epoch to the next one.
    """
    last = rows[-1]
    train_s, bn_s = last["time/train_s"], last.get(BN_TIME, 0.0)
    epochs_s = sum(row["time/epoch_s"] + between_s for row in rows)
    return {
        "start_s": max(wall_s - epochs_s, 0.0),
        "image_s": train_s / seen.train,
        "val_image_s": max(last["time/epoch_s"] - train_s - bn_s, 0.0) / seen.val,
        "bn_image_s": bn_s / max(n_bn_images(pilot, seen), 1),
        "between_s": between_s,
    }


def between_epochs(log_text: str, rows: Rows) -> float:
    """Seconds that log.txt has between the lines of the last two epochs, beyond those that results.csv knows of."""
    ends = [datetime.strptime(when, LOG_TIME) for when in EPOCH_LINE.findall(log_text)]
    if len(ends) < 2:
        return 0.0
    return max((ends[-1] - ends[-2]).total_seconds() - rows[-1]["time/epoch_s"], 0.0)


def training_seconds(config: Config, images: Images, parts: dict[str, float]) -> dict[str, float]:
    """See the formula above."""
    train = config.train
    n_validations = -(-train.epochs // train.val_every)
    return {
        "start": parts["start_s"],
        "steps": train.epochs * images.train * parts["image_s"],
        "validation": n_validations * images.val * parts["val_image_s"],
        "BatchNorm": n_validations * n_bn_images(config, images) * parts["bn_image_s"],
        "checkpoints": train.epochs * parts["between_s"],
    }


def eval_seconds(config: Config, wall_s: float, scored: list[dict[str, Any]], n_val: int) -> dict[str, float]:
    """`scored`: the metrics.json of the pilot's files."""
    images_s = latency_s = job_latency_s = 0.0
    for metrics in scored:
        time_s, latency = metrics["time_s"], metrics["latency_ms"]
        images_s += time_s["total"] + time_s["score"]
        latency_s += (latency["warmup"] + latency["runs"]) * latency["p50"] / 1e3
        job_latency_s += (config.eval.latency_warmup + config.eval.latency_runs) * latency["p50"] / 1e3
    n_seen = max((metrics["dataset"]["n_images"] for metrics in scored), default=1)
    start_s = max(wall_s - images_s - latency_s, 0.0)
    return {"start": start_s, "images": images_s / n_seen * n_val, "latency": job_latency_s}


@dataclass(frozen=True)
class Peaks:
    """Peak memory in bytes of two trainings that differ in their batch, and where the pilot's batch ends."""

    half_batch: int
    half_bytes: int
    batch: int
    bytes: int

    @property
    def per_image(self) -> float:
        if self.batch == self.half_batch:
            return 0.0
        return max(self.bytes - self.half_bytes, 0) / (self.batch - self.half_batch)

    def at(self, batch: int) -> float:
        return self.bytes + (batch - self.batch) * self.per_image

    def largest_batch(self, available_bytes: float, share: float) -> int | None:
        """The largest batch whose peak stays below `share` of the memory; None where the two peaks do not tell."""
        if not self.per_image:
            return None
        return max(self.batch + int((available_bytes * share - self.bytes) // self.per_image), 0)


def limit(gpu_use: float | None, cpu_use: float) -> tuple[str, str]:
    """What a training waits for, and what to set; shares of use are those of a training, 0..1."""
    if gpu_use is None:
        return "processor", "a GPU, or fewer images, epochs or px (data.n_train, train.epochs, train.imgsz)"
    if gpu_use >= BUSY:
        return "GPU", "nothing here: it is busy; more GPUs shorten the job (GPUS=n)"
    if cpu_use >= BUSY:
        return "loader", "train.cache=true if the images fit into memory; more cores; train.workers at most the cores"
    return "loader or disk", "train.workers higher; train.cache=true if the images fit into memory; a faster disk"


BUSY = 0.85
