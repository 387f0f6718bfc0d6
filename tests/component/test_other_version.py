"""A training that another version of this program has begun is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from app.core.config import Config, UserError
from app.core.run import RunRoot
from app.quant.model import CHECKPOINT_FORMAT, load_checkpoint
from app.train.train import train
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network

SETTINGS = {"data.n_train": 4, "data.n_val": 2, "train.batch": 2, "train.epochs": 1, **AT_EVERY_STEP}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def trained(runs_dir: Path) -> Path:
    """Folder of a finished training."""
    config, run = settle(runs_dir, "trained", "qat", SETTINGS)
    train(config, run, force=False)
    return run.variant_dir(config.label)


def unfinished(runs_dir: Path, name: str, trained: Path) -> tuple[Config, RunRoot]:
    """A run with a training that has all but its done.json."""
    config, run = settle(runs_dir, name, "qat", SETTINGS)
    shutil.copytree(trained, run.variant_dir(config.label))
    (run.variant_dir(config.label) / "done.json").unlink()
    return config, run


def assert_refused(config: Config, run: RunRoot, *parts: str) -> None:
    """In one line, and nothing that the other version needs is touched."""
    weights = run.variant_dir(config.label) / "weights"
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    with pytest.raises(UserError) as error:
        train(config, run, force=False)
    line = str(error.value)
    assert "\n" not in line
    for part in ("another version of this program", "go on with that version", *parts):
        assert part in line
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before


@pytest.mark.parametrize(
    "change", [{"no_counterpart": {"obj": [1.0, "no objectness"]}}, {"quant": {"scheme": "w4a16"}}]
)
def test_a_configuration_of_another_version_is_refused(trained: Path, runs_dir: Path, change: dict[str, Any]) -> None:
    """One with a key that is gone, and one without keys that have come since."""
    (key,) = change
    config, run = unfinished(runs_dir, f"other-{key}", trained)
    snapshot = run.variant_dir(config.label) / "config.yaml"
    snapshot.write_text(yaml.safe_dump(yaml.safe_load(snapshot.read_text()) | change))
    assert_refused(config, run, key, "ARGS=--force")


@pytest.mark.parametrize("both", [True, False], ids=["last and the one before", "last alone"])
def test_a_checkpoint_of_another_version_is_refused(trained: Path, runs_dir: Path, both: bool) -> None:
    """Checkpoints of format 1 lie beside a configuration that this version can read."""
    config, run = unfinished(runs_dir, f"format-{both}", trained)
    weights = run.variant_dir(config.label) / "weights"
    for path in weights.iterdir():
        torch.save({**load_checkpoint(path), "format": 1}, path)
    if not both:
        (weights / "last-1.pt").unlink()
    assert_refused(config, run, f"format 1, this version has {CHECKPOINT_FORMAT}")
