"""What the parts of a training cost: the product's own trainer and loop, measured piece by piece on a few images."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from itertools import repeat as endlessly
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from ultralytics.utils.torch_utils import unset_deterministic

from app.core.config import Config
from app.core.memory import own_memory
from app.core.results import STATES
from app.core.run import RunRoot
from app.data.view import read_index, read_split
from app.estimate.cost import BudgetShare, Cost, Line, Stopwatch, line, repeat, typical
from app.estimate.pieces import TrainingCosts
from app.train.batches import STRIDE, Ticket, first_images
from app.train.done import make_ready
from app.train.loader import PREFETCH_BATCHES
from app.train.loop import Loop
from app.train.monitor import log_file
from app.train.train import finish
from app.train.trainer import Trainer
from app.train.validator import HeldOut

T = TypeVar("T")
TURNS = range(2, 20)  # of steps: the first one also compiles and allocates
STEPS_SHARE = 0.4  # of what is left of a training's time; the rest is for two validations
PASSES = range(4)  # of BatchNorm's batch, of each size
N_READ = 16  # images of which one's reading is timed
ROUNDS = 3  # batches of every loader process, beyond those it has ahead


class TimedLoop(Loop):
    """The product's loop; remembers what the parts of a validation cost."""

    stopwatch: Stopwatch
    costs: dict[str, Cost]

    def timed(self, part: str, work: Callable[[], T]) -> T:
        self.costs[part], result = self.stopwatch.timed(work)
        return result

    def _score(self, held_out: HeldOut) -> dict[str, dict[str, float]]:
        return self.timed("score", lambda: super(TimedLoop, self)._score(held_out))

    def _reestimate(self, model: nn.Module) -> None:
        images = self.timed("draw", lambda: self.bn_images.after(self.state.epoch))
        self.timed("reestimate", lambda: self.trainer.reestimate(model, images, self.graph.enabled))

    def save(self) -> None:
        self.timed("save", super().save)


def measure_training(config: Config, run: RunRoot, device: str, share: BudgetShare) -> TrainingCosts:
    """Measures a training of the pilot, and leaves its checkpoint and files as a finished one does.

    Args:
        config: of the pilot; run: with its dataset.
        device: as Ultralytics names it.
        share: of the budget; every piece is measured once at least.

    Raises:
        torch.OutOfMemoryError: the GPU has no room. What was on it is freed when nobody holds the error any more.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(int(device))  # the peak of a training that had no room is not this one's
    stopwatch = Stopwatch(None if device == "cpu" else torch.cuda.synchronize)
    make_ready(config, run, force=True)
    n_threads = torch.get_num_threads()
    before = stopwatch.now()
    trainer = Trainer(config, run, device)
    loop = TimedLoop(trainer)
    loop.stopwatch, loop.costs = stopwatch, {}
    try:
        with log_file(run.variant_dir(config.label) / "log.txt"):
            loop.set_up()
            loop._start_epoch(0)
            start = stopwatch.now() - before
            trainer.validator.args.conf = 0.0  # as many detections as a trained network has
            return _measure_parts(loop, run, start, share)
    finally:
        loop.monitor.close()
        trainer.close()
        unset_deterministic()
        torch.set_num_threads(n_threads)  # the trainer takes every core, the stages after it what PyTorch has by itself
        del trainer, loop
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def _measure_parts(loop: TimedLoop, run: RunRoot, start: Cost, share: BudgetShare) -> TrainingCosts:
    trainer, stopwatch, train = loop.trainer, loop.stopwatch, loop.config.train
    view, name = Path(trainer.provenance["view_dir"]), trainer.provenance["splits"]["train"]["name"]
    index = stopwatch.cost(lambda: read_index(view, name))
    labels = (stopwatch.cost(lambda: read_split(trainer.provenance, "train")) - index) / trainer.train_loader.dataset.ni
    decode, augment, batch = samples(loop)
    on_gpu = trainer.device.type == "cuda"
    base_bytes = torch.cuda.memory_reserved() if on_gpu else 0
    step, optimizer = steps(loop, batch, share)
    loader = from_processes(loop, decode + augment) if trainer.args.workers else None
    ended, parts = epoch_end(loop, len(batch["img"]))
    draw = parts["draw"] / max(sum(map(len, loop.bn_images.drawn)), 1)
    held_bytes = process_bytes(trainer)
    if share.has(ended):
        loop._start_epoch(1)
        train_on(loop, batch)
        loop.optimizer_step()
        ended, parts = epoch_end(loop, len(batch["img"]))
    reestimate = reestimation(loop, batch)
    in_batches = len(STATES) * len(trainer.test_loader) * reestimate.fixed
    val_px = val_image(parts["score"] - in_batches, trainer.test_loader, decode) / train.imgsz**2
    rest = ended - parts["score"] - parts["draw"] - parts["reestimate"] - parts["save"]
    end = stopwatch.cost(lambda: finish(loop, run))
    gpu_bytes = (torch.cuda.max_memory_reserved(), base_bytes) if on_gpu else None
    return TrainingCosts(
        start, labels, decode, augment, loader, step, optimizer, draw, reestimate, rest, val_px, parts["save"], end,
        held_bytes, gpu_bytes,
    )  # fmt: skip


def samples(loop: TimedLoop) -> tuple[Cost, Cost, dict[str, Any]]:
    """What it costs to read an image, and to make a sample of read ones; and a batch as the loader gives it."""
    dataset, stopwatch = loop.trainer.train_loader.dataset, loop.stopwatch
    tickets = [Ticket(0, position) for position in range(min(loop.config.train.batch, dataset.ni))]

    def make() -> dict[str, Any]:
        return dataset.collate_fn(dataset.__getitems__(tickets))

    unread = [number for number in range(dataset.ni) if dataset.ims[number] is None][:N_READ]
    read = stopwatch.cost(lambda: [dataset.load_image(number) for number in unread])
    make()  # reads what is not yet there
    made, batch = stopwatch.timed(make)
    return read / max(len(unread), 1), made / len(tickets), batch


def steps(loop: TimedLoop, batch: dict[str, Any], share: BudgetShare) -> tuple[Line, Cost]:
    """Steps of a batch by its pixels, from half a batch and the whole one in turns; and those of the optimizer.

    On a GPU the whole batch is one graph, and half of it would be another way of computing: it is not asked for.
    """
    stopwatch, n_images, side = loop.stopwatch, len(batch["img"]), loop.config.train.imgsz
    n_half = half_of(n_images, side)
    has_half = loop.trainer.device.type == "cpu" and n_half < n_images
    half = first_images(batch, n_half) if has_half else batch
    costs: dict[str, list[Cost]] = {"half": [], "whole": [], "optimizer": []}

    def turn() -> Cost:
        before = stopwatch.now()
        if has_half:
            costs["half"].append(stopwatch.cost(lambda: train_on(loop, half)))
            loop.optimizer_step()
        costs["whole"].append(stopwatch.cost(lambda: train_on(loop, batch)))
        costs["optimizer"].append(stopwatch.cost(loop.optimizer_step))
        return stopwatch.now() - before

    repeat(turn, share.of_rest(STEPS_SHARE), TURNS)
    px, whole = n_images * side**2, typical(costs["whole"])
    of_half = (n_half * side**2, typical(costs["half"])) if has_half else (px, whole)
    return line(of_half, (px, whole)), typical(costs["optimizer"])


def half_of(n_images: int, side: int) -> int:
    """Half of a batch, or all of it where half is too few: BatchNorm needs two values of its smallest map."""
    n_half = n_images // 2
    return n_half if n_half * (side // STRIDE) ** 2 > 1 else n_images


def train_on(loop: Loop, batch: dict[str, Any]) -> None:
    loop.watch.next(0, batch)
    loop.backward(batch)


def from_processes(loop: TimedLoop, made: Cost) -> Cost:
    """A sample of the loader processes, all at work, after those that they had ahead.

    They live on, so that no Stopwatch sees their processor's seconds: those of `made`, a sample of this process, count.
    """
    loader, n_workers = loop.trainer.train_loader, loop.trainer.args.workers
    batches = chain.from_iterable(endlessly(loader))  # without an end
    for _ in islice(batches, PREFETCH_BATCHES * n_workers):
        pass
    taken, sizes = loop.stopwatch.timed(lambda: [len(batch["img"]) for batch in islice(batches, ROUNDS * n_workers)])
    own = taken / sum(sizes)
    return Cost(own.wall_s, own.cpu_s + made.cpu_s)


def process_bytes(trainer: Trainer) -> int:
    """Bytes of this process and its loader processes, while they live.

    A validation of one batch has none. The job's are as many as training's, and keep as much: BATCHES_PER_WORKER.
    """
    own, loaders = own_memory()
    return own + loaders * (1 if trainer.test_loader.num_workers else 2)


def val_image(score: Cost, loader: Any, decode: Cost) -> Cost:
    """An image of a validation; without its reading where this process reads it, and not loader processes beside it."""
    of_image = score / len(loader.dataset)
    return of_image if loader.num_workers else of_image - decode


def epoch_end(loop: TimedLoop, n_images: int) -> tuple[Cost, dict[str, Cost]]:
    """What follows the last step of an epoch, and the parts of it."""
    state = loop.state
    loop.monitor.start_epoch(state.epoch, loop.trainer.epochs, n_images, 0)
    loop.monitor.step(n_images, dict)
    state.batch_in_epoch = 1
    ended = loop.stopwatch.cost(loop._end_epoch)
    return ended, dict(loop.costs)


def reestimation(loop: TimedLoop, batch: dict[str, Any]) -> Line:
    """A batch of BatchNorm's re-estimation, by its pixels. Without a graph: what is the same for all is the launches.

    Those of scoring, which has no graph, are as long; where re-estimation has one, it takes less than this says.
    """
    images, image_px = batch["img"], loop.config.train.imgsz**2
    n_whole = len(images)
    n_half = half_of(n_whole, loop.config.train.imgsz)

    def costs(n: int) -> Cost:
        pass_of = [images[:n]]
        work = partial(loop.trainer.reestimate, loop.scored_model, pass_of, replays=False)
        return typical([loop.stopwatch.cost(work) for _ in PASSES])

    return line((n_half * image_px, costs(n_half)), (n_whole * image_px, costs(n_whole)))
