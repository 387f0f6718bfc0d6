"""A run folder from somebody else: its coco.yaml is not executed, and a damaged checkpoint is one line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.config import UserError, load
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.quant.model import SCORED_SHAPE, config_of, load_checkpoint, load_scored, save_checkpoint
from app.train.ptq import bn_images
from app.train.trainer import Trainer
from tests.support.tiny import tiny_network

CONFIG = load(
    "fp16",
    sets=["data.coco_dir=coco-subset", "data.n_train=4", "data.n_val=2", "train.imgsz=64", "train.batch=2",
          "train.workers=0", "train.device=cpu", "model=yolov10n.yaml"],
)  # fmt: skip
SMALL_BITS = 200  # flipped bits, one a variant


@pytest.mark.parametrize("missing", [True, False])
def test_what_a_foreign_coco_yaml_says_is_not_executed(runs_dir: Path, tmp_path: Path, missing: bool) -> None:
    """Ultralytics executes `download:` where a path is missing (data/utils.py check_det_dataset, 8.4.190)."""
    run = RunRoot(runs_dir, f"foreign-{missing}")
    prepare(CONFIG, run, force=False)
    trap = tmp_path / "trap"
    text = f"path: /nowhere\ntrain: x\nval: y\nnames: [a]\ndownload: |\n  open({str(trap)!r}, 'w').close()\n"
    run.dataset_yaml.write_text(text)
    if missing:
        for split in ("train", "val"):
            (run.dataset_yaml.parent / f"{split}.txt").unlink()
    with tiny_network():
        trainer = Trainer(CONFIG, run, "cpu")
        assert len(trainer.build_dataset(trainer.data["val"], "val", 2)) == 2
        bn_images(CONFIG, run, 0)
    assert len(trainer.data["names"]) == trainer.data["nc"] == 80
    assert not trap.exists()


@pytest.fixture(scope="module")
def unsealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint as torch.save writes it, with few numbers: most of its bytes have a meaning."""
    path = tmp_path_factory.mktemp("unsealed") / "best.pt"
    save_checkpoint(path, CONFIG, {"scored": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "epoch": 3})
    entries = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    torch.save(entries, path)
    return path.read_bytes()


@settings(max_examples=SMALL_BITS, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_flipped_bit_in_an_unsealed_checkpoint(
    unsealed: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """It is loaded or refused with one line that names the file."""
    place = data.draw(st.integers(0, len(unsealed) * 8 - 1))
    damaged = bytearray(unsealed)
    damaged[place // 8] ^= 1 << place % 8
    path = tmp_path_factory.getbasetemp() / "best.pt"
    path.write_bytes(damaged)
    try:
        config_of(load_checkpoint(path, SCORED_SHAPE), path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("scored", [1]), ("scored", {}), ("scored", {1: 2}), ("epoch", "3"), ("epoch", True), ("config", None),
     ("config", {"variant": "fp16"}), ("format", "2"), ("format", 99)],
)  # fmt: skip
def test_entries_of_other_types(unsealed: bytes, tmp_path: Path, entry: str, value: object) -> None:
    entries = torch.load(io.BytesIO(unsealed), weights_only=True) | {entry: value}
    path = tmp_path / "best.pt"
    torch.save(entries, path)
    with tiny_network(), pytest.raises(UserError, match=str(path)):
        load_scored(path)
