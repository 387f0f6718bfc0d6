"""Loss and shift of every change on val images, batch by batch; what was measured survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.core.files import read_json, write_json
from app.core.progress import Meter
from app.core.shapes import Shape
from app.sensitivity.batchnorm import Corrections
from app.sensitivity.changes import Change
from app.sensitivity.folded import Folded
from app.sensitivity.images import Batch
from app.sensitivity.network import Graph, Heads
from app.sensitivity.outputs import Reference, loss_of

PARTIAL_SHAPE: Shape = {"key": dict[str, Any], "batches": list[dict[str, Any]]}


@dataclass(frozen=True)
class Measured:
    """A change on some of the images: what it adds to the loss, with its standard error, and the shift in nats."""

    loss: float
    loss_se: float | None
    shift: float
    n_images: int


class Probe:
    """Measures changes of a network on one batch after the other.

    Args:
        graph: of the float network, in eval mode.
        criterion: Ultralytics' loss of it.
        corrected: BatchNorm statistics of the changes.
    """

    def __init__(self, graph: Graph, criterion: Any, corrected: Corrections) -> None:
        self.graph, self.criterion, self.corrected = graph, criterion, corrected
        self.folded = Folded(graph)

    @torch.no_grad()
    def measure(
        self, batch: Batch, changes: list[Change], see: Callable[[Change, dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Number of images, loss of the float network, and [loss, shift] of every change, for `summary`.

        `see` gets every change and what the head of the changed network puts out.
        """
        kept = self.folded.run(batch.images)
        heads = self.graph.heads(kept)
        reference = Reference(heads)

        @torch.no_grad()
        def measured(change: Change) -> tuple[list[float], Heads]:
            changed = self.folded.changed(kept, change.bits, self.corrected.get(change.name, {}))
            return [loss_of(self.criterion, changed, batch.labels), reference.shift(changed)], changed

        numbers = {}
        with on_all_cores(batch.images.device) as several:
            for change, (both, changed) in zip(changes, several(measured, changes), strict=True):
                numbers[change.name] = both
                see(change, changed)
        plain_loss = loss_of(self.criterion, heads, batch.labels)
        return {"n": len(batch.images), "loss": plain_loss, "changes": numbers}

    def cost(self, change: Change) -> int:
        """Number of operations that run for a change."""
        return len(self.graph.behind(change.bits))


@contextmanager
def on_all_cores(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` in order, on a CPU with a thread for each core, which computes alone.

    Two cores that share every operation wait for each other a third of their time (YOLOv10m, 8 images of 320 px).
    """
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield map
        return
    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)  # a signal does not wait for changes that have not begun
        torch.set_num_threads(n_threads)  # MKL has one number for all threads


def measure_all(
    probe: Probe, batches: list[tuple[list[int], list[Change]]], read: Callable[[list[int]], Batch], kept: Kept
) -> list[dict[str, Any]]:
    """Measures batches, which are places of images with the changes that they measure; those of `kept` are there."""
    total = sum(probe.cost(change) for _, changes in batches for change in changes)
    meter = Meter("sensitivity", total, "operations")
    try:
        for number, (places, changes) in enumerate(batches):
            if number < len(kept.batches):
                meter.total -= sum(map(probe.cost, changes))
                continue
            kept.add(probe.measure(read(places), changes, lambda change, _: meter.update(probe.cost(change))))
    finally:
        meter.close()
    return kept.batches


class Kept:
    """Measured batches in a file, which counts only for the same `key`."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.batches: list[dict[str, Any]] = []
        if path.exists():
            content = read_json(path, "sensitivity", PARTIAL_SHAPE)
            self.batches = content["batches"] if content["key"] == key else []

    def add(self, batch: dict[str, Any]) -> None:
        self.batches.append(batch)
        write_json(self.path, {"key": self.key, "batches": self.batches})


def summary(batches: list[dict[str, Any]], change: str) -> Measured:
    """What a change does, over the batches that have measured it."""
    measuring = [batch for batch in batches if change in batch["changes"]]
    weights = np.array([batch["n"] for batch in measuring], float)
    losses = np.array([batch["changes"][change][0] - batch["loss"] for batch in measuring])
    shifts = np.array([batch["changes"][change][1] for batch in measuring])
    loss, error = mean_over(losses, weights)
    return Measured(loss, error, mean_over(shifts, weights)[0], int(weights.sum()))


def mean_over(values: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """Mean of batches, weighted by their numbers of images, and its standard error; None for a single batch.

    The variance of a batch's mean is taken to be s^2 / images: then the mean square of the deviations, weighted as the
    mean is, over n - 1 estimates the variance of the mean. Of equal batches this is s^2 / n.
    """
    mean = np.average(values, weights=weights)
    if len(values) == 1:
        return float(mean), None
    spread = np.average((values - mean) ** 2, weights=weights)
    return float(mean), float(np.sqrt(spread / (len(values) - 1)))


def float_loss(batches: list[dict[str, Any]]) -> float:
    """Mean loss of the float network's images."""
    return float(np.average([batch["loss"] for batch in batches], weights=[batch["n"] for batch in batches]))
