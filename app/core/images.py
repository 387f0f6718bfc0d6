"""How many images a run trains on, validates on, and re-estimates BatchNorm on."""

from __future__ import annotations

from dataclasses import dataclass

from app.core.config import Config
from app.core.files import read_json
from app.core.run import VIEW_SHAPE, RunRoot


@dataclass(frozen=True)
class Images:
    """How many images a run has."""

    train: int
    val: int


def images_of(run: RunRoot) -> Images:
    """Those that the data stage has chosen.

    Raises:
        UserError: no dataset was prepared.
    """
    splits = read_json(run.provenance, "data", VIEW_SHAPE)["splits"]
    return Images(splits["train"]["n_images"], splits["val"]["n_images"])


def n_bn_images(config: Config, images: Images) -> int:
    """Of train.bn_batches batches, or all where they are fewer."""
    return min(config.train.bn_batches * config.train.batch, images.train)
