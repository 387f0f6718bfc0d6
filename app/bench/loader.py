"""CPU time of a training sample without a GPU: Ultralytics' loader beside ours, in one loader process, in turns.

CPU time, not wall time: it says how many images a second a core gives, whatever else the machine does.
"""

from __future__ import annotations

import logging
import os
import resource
import statistics
import time
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from app.core.config import Config, load
from app.core.environment import environment
from app.core.files import write_json
from app.core.run import RunRoot
from app.data.prepare import prepare, prepared
from app.report.tables import markdown_table
from app.train.batches import EpochBatches
from app.train.loader import MOSAIC_WINDOW, PREFETCH_BATCHES, CocoDataset, dataset_of, start_worker
from app.train.trainer import recipe_args

log = logging.getLogger(__name__)
STOCK, OURS, ON_GPU = "Ultralytics", "ours", "ours, colours on the GPU"
N_TIMED = 40  # batches of a turn, at most
N_WARM_UPS = MOSAIC_WINDOW + 1  # batches until the window of decoded images is full


@dataclass(frozen=True)
class Turn:
    """One turn of an arm: CPU ms of the loader process an image, of the training's process a batch."""

    worker_ms: float
    main_ms: float


class StockDataset(YOLODataset):
    """Ultralytics' dataset and samples on the images of one of ours, whose labels are those of the checked view."""

    def __init__(self, dataset: CocoDataset, hyp: Any) -> None:
        vars(self).update(vars(dataset))
        self.ims, self.im_hw0, self.im_hw = copy(dataset.ims), copy(dataset.im_hw0), copy(dataset.im_hw)
        self.buffer = []
        self.max_buffer_length = min(self.ni, MOSAIC_WINDOW * self.batch_size, 1000)
        self.npy_files = [Path(os.devnull) / "none"] * self.ni  # it would read, and delete, those beside the images
        self.transforms = self.build_transforms(copy(hyp))


def bench_loader(run: RunRoot, overlays: list[Path], sets: list[str], n_rounds: int) -> None:
    """Prints ms of CPU a sample at the configuration's imgsz, batch, cache and recipe, and writes them."""
    config = load("fp16", overlays, sets)
    prepare(config, run, force=False)
    cv2.setNumThreads(0)  # as in a loader process
    arms = datasets(config, run)
    turns: dict[str, list[Turn]] = {arm: [] for arm in arms}
    for _ in range(n_rounds):
        for arm, dataset in arms.items():
            turns[arm].append(measure(dataset))
    train = config.train
    rows = {arm: [asdict(turn) for turn in of_arm] for arm, of_arm in turns.items()}
    result = {"imgsz": train.imgsz, "batch": train.batch, "cache": train.cache, "turns": rows}
    write_json(run.root / "bench-loader.json", {**result, "environment": environment()})
    kept = "decoded images kept in memory" if train.cache else "images decoded"
    log.info("a training sample of %d px, batch %d, %s", train.imgsz, train.batch, kept)
    for line in markdown_table(table(turns)):
        log.info("%s", line)


def datasets(config: Config, run: RunRoot) -> dict[str, YOLODataset]:
    """The same images for every arm, by its name."""
    provenance = prepared(run)
    hyp: Any = get_cfg(overrides=recipe_args(config, "cpu"))
    train, data = config.train, dataset_of(run.dataset_yaml.parent.resolve(), provenance["names"])
    size = {"imgsz": train.imgsz, "batch_size": train.batch, "hyp": hyp}
    ours = CocoDataset("train", data, provenance, train.seed, **size, cache="ram" if train.cache else None)
    later = ours.view(copy(hyp), colours_later=True)
    return {STOCK: StockDataset(ours, hyp), OURS: ours, ON_GPU: later}


def measure(dataset: YOLODataset) -> Turn:
    """Some batches of an epoch in a loader process of its own.

    Warm-up batches are read before the process is forked: it begins with their decoded images.
    """
    batches = list(EpochBatches(dataset.ni, dataset.batch_size))
    own = isinstance(dataset, CocoDataset)
    keys: list[list[Any]] = [list(batch) if own else [ticket.position for ticket in batch] for batch in batches]
    warm_ups, timed = keys[:N_WARM_UPS], keys[N_WARM_UPS : N_WARM_UPS + N_TIMED] or keys
    for batch in warm_ups:
        for key in batch:
            dataset[key]
    loader = DataLoader(
        dataset, batch_sampler=timed, num_workers=1, collate_fn=dataset.collate_fn, prefetch_factor=PREFETCH_BATCHES,
        worker_init_fn=partial(start_worker, pins=own),
    )  # fmt: skip
    pinned = torch.empty(0, dtype=torch.uint8)
    worker_s, main_s = children_s(), time.process_time()
    iterator = iter(loader)
    for batch in iterator:
        pinned = batch["img"].clone() if len(pinned) != len(batch["img"]) else pinned.copy_(batch["img"])
    main_s = time.process_time() - main_s
    del iterator  # waits for its process
    n_images = sum(map(len, timed))
    return Turn((children_s() - worker_s) * 1e3 / n_images, main_s * 1e3 / len(timed))


def children_s() -> float:
    """CPU seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(turns: dict[str, list[Turn]]) -> list[list[str]]:
    """Medians over turns, ratios to Ultralytics' in the same turn, and what a core gives."""
    cells = [["loader", "CPU ms an image", "lowest", "highest", "of Ultralytics'", "images/s of a core",
              "training's process, CPU ms a batch"]]  # fmt: skip
    for arm, of_arm in turns.items():
        times = [turn.worker_ms for turn in of_arm]
        ratios = [turn.worker_ms / stock.worker_ms for turn, stock in zip(of_arm, turns[STOCK], strict=True)]
        median = statistics.median(times)
        numbers = [f"{value:.2f}" for value in (median, min(times), max(times), statistics.median(ratios))]
        main_ms = statistics.median(turn.main_ms for turn in of_arm)
        cells.append([arm, *numbers, f"{1e3 / median:.0f}", f"{main_ms:.1f}"])
    return cells
