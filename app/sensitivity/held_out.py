"""PTQ of schemes on val images that the search has not seen: loss, shift and AP."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.coco.dataset import Dataset, source_at
from app.coco.detections import results, select
from app.coco.score import quiet, score, truth_of
from app.core.config import Config
from app.core.progress import track
from app.data.view import chosen, read_index
from app.report.spread import MAX_CHANCE, chance_of
from app.sensitivity.changes import Change
from app.sensitivity.images import Batch, ValImages, batches_of
from app.sensitivity.measure import Probe, mean_over

MIN_BATCHES = 3  # that decide a duel


@dataclass(frozen=True)
class HeldOut:
    """What was measured: batches as Probe.measure gives them, and AP of every scheme (None: no objects)."""

    batches: list[dict[str, Any]]
    ap: dict[str, float | None]
    n_images: int


def score_held_out(
    probe: Probe, schemes: list[Change], images: ValImages, places: list[int], config: Config
) -> HeldOut:
    """Runs every scheme over the images, with COCO's AP of the run's val annotations."""
    rows: dict[str, list[dict[str, Any]]] = {scheme.name: [] for scheme in schemes}
    split = Split(images.provenance, images.names)
    batches = []
    groups = batches_of(places, config.sensitivity.batch_images)
    for group in track(groups, "sensitivity: held-out images", len(groups), "batches"):
        batch = images.read(group)

        def see(change: Change, heads: dict[str, Any], batch: Batch = batch, group: list[int] = group) -> None:
            outputs = probe.graph.decoded(heads).cpu().numpy()
            for output, placement, place in zip(outputs, batch.placements, group, strict=True):
                detections = select(output, "raw", config.eval, len(split.category_ids))
                rows[change.name] += results(split.image_ids[place], detections, placement, split.category_ids)

        batches.append(probe.measure(batch, schemes, see))
    ids = [split.image_ids[place] for place in places]
    return HeldOut(batches, {name: split.ap(found, ids) for name, found in rows.items()}, len(places))


class Split:
    """The val split of a run: ids of its images in the order of the view, and of the category of every class.

    `names` are the network's classes; one that the dataset does not have has no category.
    """

    def __init__(self, provenance: dict[str, Any], names: list[str]) -> None:
        facts = provenance["splits"]["val"]
        entries = chosen(read_index(Path(provenance["view_dir"]), facts["name"])["images"], facts["image_ids"])
        self.image_ids = [entry["id"] for entry in entries]
        coco_dir, name = Path(provenance["coco_dir"]), facts["name"]
        source = source_at(coco_dir, name, facts)
        self.truth: Any = truth_of(Dataset(coco_dir, name, facts["image_ids"], provenance["title"], source))
        by_name = {category["name"]: category["id"] for category in self.truth.cats.values()}
        self.category_ids: Sequence[int | None] = [by_name.get(name) for name in names]

    def ap(self, rows: list[dict[str, Any]], image_ids: list[int]) -> float | None:
        """AP of detections in COCO's results format."""
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "detections.json"
            path.write_text(json.dumps(rows), encoding="utf-8")
            return score(self.truth, path, sorted(image_ids))["AP"]


@dataclass(frozen=True)
class Duel:
    """Loss of a found scheme minus that of another at the same budget, over batches, with its standard error."""

    loss: float
    error: float | None
    n_batches: int

    @property
    def verdict(self) -> str:
        """By Student's t test of the batches' differences."""
        if self.error is None or self.n_batches < MIN_BATCHES:
            return "not told apart"
        if chance_of(self.loss, self.error, self.n_batches - 1) > MAX_CHANCE:
            return "not told apart"
        return "wins" if self.loss < 0 else "loses"


def duel(batches: list[dict[str, Any]], found: str, other: str) -> Duel:
    """Compares two schemes batch by batch; every batch counts as its images do."""
    losses = np.array([batch["changes"][found][0] - batch["changes"][other][0] for batch in batches])
    weights = np.array([batch["n"] for batch in batches], float)
    return Duel(*mean_over(losses, weights), len(batches))
