"""Where an epoch's time goes: loader, step, loop, validation and checkpoint of a real training, measured one by one.

Times of an epoch of COCO 2017 are computed from these: batches and val images scale, the rest does not.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.bench.step import device_name, synchronize
from app.coco.dataset import OFFICIAL_SIZES, SPLITS
from app.core.config import Config, load
from app.core.environment import environment
from app.core.files import read_json, write_json
from app.core.results import STATES
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.report.tables import markdown_table
from app.train.batches import first_images
from app.train.loader import PREFETCH_BATCHES
from app.train.loop import Loop
from app.train.processes import ALONE
from app.train.train import device_of, make_ready
from app.train.trainer import Trainer
from app.train.validator import HeldOut

log = logging.getLogger(__name__)
N_WARM_UPS = 3  # steps before any clock starts: kernels are compiled, the graph is captured
N_STEPS = 20  # of the step alone, and at least of the loop
N_ENDS = 3  # of an epoch: validation, health, checkpoint; medians count


@dataclass(frozen=True)
class EpochCost:
    """What the parts of an epoch take.

    Attributes:
        loader_s, step_s, loop_s: a batch from the loader alone; a step on a batch that is there; both together.
        score_s: a val image scored in one state.
        reestimate_s: BatchNorm, on train.bn_batches batches; copy_s: the copies of the weights that are scored;
        examine_s: the health columns; save_s: last.pt.
    """

    batch: int
    n_val: int
    loader_s: float
    step_s: float
    loop_s: float
    score_s: float
    reestimate_s: float
    copy_s: float
    examine_s: float
    save_s: float

    def parts(self, n_train: int, n_val: int) -> dict[str, float]:
        """Seconds of an epoch with so many images that ends with a validation, by part."""
        n_batches = -(-n_train // self.batch)
        return {
            "steps": n_batches * self.loop_s,
            f"validation of {len(STATES)} states": len(STATES) * n_val * self.score_s,
            "BatchNorm re-estimation": self.reestimate_s,
            "copies for both": self.copy_s,
            "health": self.examine_s,
            "checkpoint": self.save_s,
        }


class TimedLoop(Loop):
    """The product's loop; remembers what parts of a validation took."""

    def set_up(self) -> None:
        super().set_up()
        self.seconds: dict[str, list[float]] = {}

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, with the GPU's share of it in the time."""
        synchronize(self.trainer.device)
        start = time.perf_counter()
        result = work()
        synchronize(self.trainer.device)
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)
        return result

    def step(self, batch: dict[str, Any]) -> None:
        self.backward(batch)
        self.optimizer_step()

    def _score(self, held_out: HeldOut) -> dict[str, dict[str, float]]:
        return self.timed("score", lambda: super(TimedLoop, self)._score(held_out))

    def _reestimate(self, model: nn.Module) -> None:
        self.timed("reestimate", lambda: super(TimedLoop, self)._reestimate(model))


def bench_epoch(run: RunRoot, overlays: list[Path], sets: list[str]) -> None:
    """Measures both variants, and prints what an epoch of COCO 2017 would spend on each part."""
    result: dict[str, Any] = {"environment": environment(), "rows": {}}
    for variant in ("fp16", "qat"):
        config = load(variant, overlays, sets)
        prepare(config, run, force=False)
        cost = measure(config, run)
        result |= {"model": config.model, "imgsz": config.train.imgsz, "workers": config.train.workers}
        result["rows"][variant] = asdict(cost)
        write_json(run.root / "bench-epoch.json", result)
        show(config, cost)


def measure(config: Config, run: RunRoot) -> EpochCost:
    """Starts a training of its own in the run root and measures its parts; what it had trained there is lost."""
    make_ready(config, run, force=True)
    trainer = Trainer(config, run, device_of(config, ALONE))
    loop = TimedLoop(trainer)
    loop.set_up()
    try:
        loop._start_epoch(0)
        loader = chain.from_iterable(repeat(trainer.train_loader))  # without an end
        batch = next(loader)
        for _ in range(N_WARM_UPS):
            loop.step(batch)
        n_last = len(trainer.train_loader.dataset) % config.train.batch or config.train.batch
        loop.step(first_images(batch, n_last))  # the epoch's last batch: its kernels are compiled for its own size
        n_ahead = PREFETCH_BATCHES * config.train.workers  # batches that the workers have made already
        n_batches = max(2 * n_ahead, N_STEPS)
        loop.timed("step", lambda: [loop.step(batch) for _ in range(N_STEPS)])
        loop.timed("ahead", lambda: list(islice(map(len, loader), n_ahead)))
        loop.timed("loader", lambda: list(islice(map(len, loader), n_batches)))
        loop.timed("loop", lambda: [loop.step(batch) for batch in islice(loader, n_batches)])
        loop.state.batch_in_epoch = 1  # a validation belongs to an epoch of some batches
        loop.validate()  # compiles kernels, and draws the images of BatchNorm
        loop.seconds |= {"score": [], "reestimate": []}
        for _ in range(N_ENDS):
            loop.timed("validate", loop.validate)
            loop.timed("examine", loop._examine)
            loop.timed("save", loop.save)
    finally:
        loop.monitor.close()
        trainer.close()
    validations = zip(*(loop.seconds[part] for part in ("validate", "score", "reestimate")), strict=True)
    loop.seconds["copy"] = [whole_s - score_s - reestimate_s for whole_s, score_s, reestimate_s in validations]
    seconds = {part: statistics.median(times) for part, times in loop.seconds.items()}
    n_val = read_json(run.provenance, "data")["splits"]["val"]["n_images"]
    return EpochCost(
        config.train.batch, n_val, seconds["loader"] / n_batches, seconds["step"] / N_STEPS,
        seconds["loop"] / n_batches, seconds["score"] / len(STATES) / n_val, seconds["reestimate"], seconds["copy"],
        seconds["examine"], seconds["save"],
    )  # fmt: skip


def show(config: Config, cost: EpochCost) -> None:
    rates = [["", "images/s", "ms a step"]]
    for name, seconds in (("loader alone", cost.loader_s), ("step alone", cost.step_s), ("loop", cost.loop_s)):
        rates.append([name, f"{cost.batch / seconds:.0f}", f"{seconds * 1e3:.1f}"])
    rates.append(["GPU idle in the loop", "", f"{max(cost.loop_s - cost.step_s, 0) * 1e3:.1f}"])
    n_train, n_val = (OFFICIAL_SIZES[SPLITS[role]] for role in ("train", "val"))
    parts = cost.parts(n_train, n_val)
    steps_s = parts["steps"]
    table = [["part of an epoch", "seconds", "of its steps"]]
    for name, seconds in parts.items():
        table.append([name, f"{seconds:.1f}", f"{seconds / steps_s:.2%}"])
    others_s = sum(parts.values()) - steps_s
    table.append(["all but the steps", f"{others_s:.1f}", f"{others_s / steps_s:.2%}"])
    log.info(
        "%s: %s, %d px, batch %d, %d workers, %s; an epoch of %d images and %d val images",
        config.label, config.model, config.train.imgsz, cost.batch, config.train.workers,
        device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")), n_train, n_val,
    )  # fmt: skip
    for line in [*markdown_table(rates), "", *markdown_table(table)]:
        log.info("%s", line)
