"""A QAT training that begins with the epochs of an FP16 training, its float warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.core.config import UserError, validate
from app.core.files import read_json
from app.quant.model import load_checkpoint, save_checkpoint
from app.train.done import check_snapshot
from app.train.train import train
from tests.support.scripted import read_table
from tests.support.settle import settle
from tests.support.tiny import tiny_network

# 40 images in batches of 8, two of them to an optimizer step; mosaic in all but the last epoch. A fast EMA.
SETTINGS = {
    "data.n_train": 40, "data.n_val": 8, "train.batch": 8, "train.epochs": 3, "train.bn_batches": 2, "hyp.nbs": 16,
    "hyp.warmup_epochs": 1, "hyp.close_mosaic": 1, "train.ema_tau": 5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def trained(runs_dir: Path, variant: str) -> Path:
    """Folder of a finished training, which keeps its state after two epochs."""
    config, run = settle(runs_dir, "trunk", variant, {**SETTINGS, "train.save_period": 2})
    train(config, run, force=False)
    return run.variant_dir(config.label)


@pytest.fixture(scope="module")
def fp16(runs_dir: Path) -> Path:
    return trained(runs_dir, "fp16")


@pytest.fixture(scope="module")
def qat(runs_dir: Path) -> Path:
    return trained(runs_dir, "qat")


FLOAT_WARM_UP = {"quant.warmup_share": 0.67, "quant.warmup_bits": "float", "quant.learned_scale": True}


def test_fp16s_epochs_are_a_float_warm_up_bit_for_bit(runs_dir: Path, fp16: Path) -> None:
    """What the FP16 training kept after two epochs gives the QAT training that has trained them by itself."""
    kept = fp16 / "weights" / "epoch2.pt"
    assert [path.name for path in kept.parent.glob("epoch*.pt")] == [kept.name]
    folders = []
    for name, source in (("branch", {"quant.warmup_from": kept}), ("alone", {})):
        config, run = settle(runs_dir, name, "qat", SETTINGS | FLOAT_WARM_UP | source)
        train(config, run, force=False)
        folders.append(run.variant_dir(config.label))
    branched, alone = (load_checkpoint(folder / "weights" / "last.pt") for folder in folders)
    for entry in ("model", "ema", "scored"):
        assert all(torch.equal(branched[entry][key], value) for key, value in alone[entry].items())
    shared = ("epoch", "train/box_loss", "AP/ema_bn", "val_loss/raw", "lr/pg0", "quant/warm_up")
    ours, theirs = (
        [{key: row.get(key) for key in shared} for row in read_table(folder / "results.csv")] for folder in folders
    )
    assert ours == theirs
    done = [read_json(folder / "done.json", "train") for folder in folders]
    assert done[0]["best_ap"] == done[1]["best_ap"]


REFUSED = {
    "later": ({"quant.warmup_share": 0.34}, r"has 2 epochs, the warm-up 1 \(quant.warmup_share=0.34 of 3\)"),
    "recipe": ({"hyp.lr0": 0.5}, r"was trained with another recipe \(hyp.lr0: 0.01 -> 0.5\)"),
    "classes": ({}, r"has other classes than this run \(class 0 is toothbrush, not person\)"),
    "QAT": ({}, "is not an epochN.pt of an FP16 training"),
    "none": ({}, "nothing.pt is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_is_no_warm_up_of_this_training_is_refused(
    case: str, runs_dir: Path, fp16: Path, qat: Path
) -> None:
    settings, message = REFUSED[case]
    folder = qat if case == "QAT" else fp16
    path = folder / "weights" / "nothing.pt" if case == "none" else runs_dir / f"epoch2-{case}.pt"
    if case != "none":
        state = load_checkpoint(folder / "weights" / "last.pt")
        names = state["names"][::-1] if case == "classes" else state["names"]
        save_checkpoint(path, validate(state.pop("config")), {**state, "epoch": 1, "names": names})
    warm_up = {**FLOAT_WARM_UP, "quant.warmup_from": path}
    config, run = settle(runs_dir, f"refused-{case}", "qat", SETTINGS | warm_up | settings)
    with pytest.raises(UserError, match=message):
        train(config, run, force=False)
    mended, _ = settle(
        runs_dir, f"refused-{case}", "qat", SETTINGS | FLOAT_WARM_UP
    )  # nothing is left that it would be refused for
    check_snapshot(mended, run.variant_dir(config.label) / "config.yaml")
