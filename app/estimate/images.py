"""The images of the estimate: how many the job has, and a few of them in a run root of the pilot's own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from app.coco.annotations import read_source
from app.coco.dataset import Sources
from app.coco.layout import find_sources
from app.coco.split import Split
from app.core.config import Config, UserError
from app.core.run import Images, RunRoot, images_of
from app.data.prepare import find, hash_annotations, prepare
from app.data.provenance import seeded_choice
from app.data.view import view_dir
from app.estimate.cost import Cost, Stopwatch

WATCH = Stopwatch()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobImages:
    """How many images the job has, and what its data stage costs.

    Attributes:
        sets: settings under which the pilot finds its images; none: it takes those of the job.
        there: how many images the pilot finds.
        scaled: in words, what the cost of the stage was computed from; None: it was measured as a whole.
    """

    images: Images
    cost: Cost
    sets: list[str]
    there: Images
    scaled: str | None = None


def job_images(config: Config, whole: RunRoot, sampled: RunRoot, most: Images) -> JobImages:
    """Looks at all images where that takes seconds: few, or looked at before. Else at a sample.

    Args:
        config: of the job; whole: a run root for all of its images; sampled: one for the sample.
        most: images of the sample.

    Raises:
        UserError: as the data stage.
    """
    coco_dir = find(config.data.coco_dir, whole.cache_dir)
    sources = find_sources(coco_dir, config.data)
    view = view_dir(whole.cache_dir.resolve(), sources, hash_annotations(sources))
    if view.is_dir():
        return looked_at(config, whole)
    reading, splits = WATCH.timed(lambda: {role: read_source(source) for role, source in sources.items()})
    if len(splits["train"].images) <= most.train and len(splits["val"].images) <= most.val:
        looked_at(config, whole)
        whole.provenance.unlink()
        return looked_at(config, whole)  # the second time, as the job finds it
    return of_sample(config, sources, splits, reading, Sample(sampled, most))


@dataclass(frozen=True)
class Sample:
    """Where the sample is put, and its size."""

    run: RunRoot
    most: Images


def looked_at(config: Config, run: RunRoot) -> JobImages:
    cost = WATCH.cost(lambda: prepare(config, run, force=False))
    images = images_of(run)
    return JobImages(images, cost, [], images)


def of_sample(config: Config, sources: Sources, splits: dict[str, Split], reading: Cost, part: Sample) -> JobImages:
    """The data stage on a seeded sample, scaled by images; reading the annotations costs what it did just now."""
    sets, run = [], part.run
    for role, split in splits.items():
        file = run.root / f"{role}.json"
        n_sample = min(len(split.images), part.most.train if role == "train" else part.most.val)
        file.write_text(json.dumps(sample(split, n_sample, config.data.seed)), encoding="utf-8")
        sets += [f"data.{role}_images={sources[role].images_dir}", f"data.{role}_annotations={file.resolve()}"]
    data = config.data.model_copy(update={"n_train": None, "n_val": None, **keys_of(sets)})
    cost = WATCH.cost(lambda: prepare(config.model_copy(update={"data": data}), run, force=False))
    there = images_of(run)
    n_listed = sum(len(split.images) for split in splits.values())
    n_there = there.train + there.val
    scaled = f"data: {n_there:,} of {n_listed:,} images looked at, the annotations read as a whole"
    images = Images(config.data.n_train or len(splits["train"].images), config.data.n_val or len(splits["val"].images))
    return JobImages(images, reading + cost * (n_listed / n_there), sets, there, scaled)


def keys_of(sets: list[str]) -> dict[str, str]:
    return dict(item.removeprefix("data.").split("=", 1) for item in sets)


def sample(split: Split, n: int, seed: int) -> dict[str, Any]:
    """An annotation file of n of its images, of those without a fault."""
    sound = [image for image in split.images if image["id"] not in split.problems]
    if not sound:
        raise UserError(f"no image of {split.file} can be used: repair the dataset")
    images = seeded_choice(sound, min(n, len(sound)), seed, lambda image: bool(split.boxes[image["id"]]))
    annotations = []
    for image in images:
        for category, x, y, w, h in split.boxes[image["id"]]:
            box = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "bbox": [x, y, w, h]}
            annotations.append(box | {"area": w * h, "iscrowd": 0})
    return {"images": images, "annotations": annotations, "categories": split.categories}
