"""A training that the guard has ended goes on with the remedy that its message names, from where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.quant.model import load_checkpoint
from app.train.guard import GuardStop
from app.train.train import train
from tests.support.scripted import PLAIN, Batch, read_table, reading, same, scores, scripted, solid, write_coco
from tests.support.settle import settle
from tests.support.tiny import tiny_network

SETTINGS: dict[str, Any] = PLAIN | {
    "train.epochs": 3, "train.batch": 4, "guard.n_validations": 1, "guard.share": 0.5, "hyp.lr0": 0.02,
}  # fmt: skip
# Scores of the EMA with re-estimated BatchNorm; the other two states stay healthy.
FALLING = (0.4, 0.1, 0.1)  # below half of 0.4 at epoch 2
LEVEL = (0.4, 0.4, 0.4)
RISING = (5.0, 6.0, 7.0)  # box loss of the validation: it has risen at epoch 2
CASES = {"collapse": (FALLING, (5.0,) * 3), "divergence": (LEVEL, RISING)}
STOPPED = 2


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "coco"
    return write_coco(folder, [solid(40 + 8 * i) for i in range(8)], [solid(200)])


def results(case: str, epochs: range) -> list[dict[str, float]]:
    """What the three states score in `epochs`, from 1; the raw state and the EMA neither collapse nor diverge."""
    aps, losses = CASES[case]
    healthy = scores(0.5, loss=5.0)
    return [one for n in epochs for one in (healthy, healthy, scores(aps[n - 1], loss=losses[n - 1]))]


@contextmanager
def falling_losses() -> Iterator[list[Batch]]:
    """The train loss falls from batch to batch."""
    n_batches = 0

    def next_loss(numbers: list[int]) -> tuple[float, float, float]:
        nonlocal n_batches
        n_batches += 1
        return (1 / n_batches, 0.0, 0.0)

    with reading(next_loss, pull=1e-3) as read:
        yield read


@pytest.mark.parametrize("case", CASES)
def test_the_remedy_goes_on_to_the_last_epoch(case: str, coco_dir: Path, runs_dir: Path) -> None:
    settings = {**SETTINGS, "data.coco_dir": coco_dir}
    stop, warn = ({**settings, f"guard.{case}": action} for action in ("stop", "warn"))
    config, run = settle(runs_dir, f"{case}-stopped", "fp16", stop)
    folder = run.variant_dir("fp16")
    with falling_losses() as read:
        with (
            scripted(results(case, range(1, STOPPED + 1))),
            pytest.raises(GuardStop, match=rf"--set guard\.{case}=warn goes on"),
        ):
            train(config, run, force=False)
        assert len(read_table(folder / "results.csv")) == STOPPED
        assert not (folder / "done.json").exists()
        assert load_checkpoint(folder / "weights" / "last.pt")["epoch"] == STOPPED - 1
        n_read = len(read)
        with scripted(results(case, range(STOPPED + 1, 4))):
            train(*settle(runs_dir, f"{case}-stopped", "fp16", warn), force=False)
    assert (n_read, len(read)) == (4, 6)  # two batches an epoch
    with falling_losses(), scripted(results(case, range(1, 4))):
        config, other = settle(runs_dir, f"{case}-warned", "fp16", warn)
        train(config, other, force=False)
    assert_same_training(folder, other.variant_dir("fp16"))


def assert_same_training(stopped: Path, warned: Path) -> None:
    """A training that the guard only warned in gives the same weights, rows and best epoch."""
    ours, theirs = (load_checkpoint(folder / "weights" / "last.pt") for folder in (stopped, warned))
    for entry in ("model", "ema", "scored"):
        assert same(ours[entry], theirs[entry])
    assert [last["best_epoch"] for last in (ours, theirs)] == [1, 1]
    tables = [read_table(folder / "results.csv") for folder in (stopped, warned)]
    kept = ("epoch", "train/box_loss", "AP/raw", "AP/ema_bn", "val_loss/ema_bn", "lr/pg0")
    assert [[row[name] for name in kept] for row in tables[0]] == [[row[name] for name in kept] for row in tables[1]]
    done = [json.loads((folder / "done.json").read_text()) for folder in (stopped, warned)]
    assert done[0]["epochs"] == len(tables[0]) == 3
    assert done[0]["best_ap"] == done[1]["best_ap"] == 0.4
    assert [load_checkpoint(folder / "weights" / "best.pt")["epoch"] for folder in (stopped, warned)] == [0, 0]


def test_a_stop_at_the_last_epoch_is_ended_by_the_remedy(coco_dir: Path, runs_dir: Path) -> None:
    """All epochs are trained by then: nothing is read or scored again."""
    settings = {**SETTINGS, "train.epochs": STOPPED, "data.coco_dir": coco_dir}
    stop, warn = ({**settings, "guard.collapse": action} for action in ("stop", "warn"))
    config, run = settle(runs_dir, "end", "fp16", stop)
    with falling_losses() as read, scripted(results("collapse", range(1, STOPPED + 1))):
        with pytest.raises(GuardStop):
            train(config, run, force=False)
        n_read = len(read)
        train(*settle(runs_dir, "end", "fp16", warn), force=False)
        assert len(read) == n_read
    done = json.loads((run.variant_dir("fp16") / "done.json").read_text())
    assert (done["epochs"], done["best_ap"]) == (STOPPED, 0.4)
