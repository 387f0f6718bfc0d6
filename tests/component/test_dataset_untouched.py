"""The user's dataset through all stages: nothing is written, only checked files are read, and it may move meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from app.__main__ import main
from app.bench.soak import differences
from app.core.config import Config, UserError, load
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.data.synthetic import draw_coco_subset
from app.eval.evaluate import evaluate
from app.export.export import export
from app.quant.model import load_checkpoint
from app.report.report import report
from app.train.batches import EpochBatches, Part
from app.train.loader import UnreadableImage
from app.train.loop import Loop
from app.train.ptq import bn_images, ptq
from app.train.train import train
from tests.support.drawn import kept_figures
from tests.support.export_run import TINY, network
from tests.support.settle import sets_of

SETTINGS = {
    "train.batch": 4, "train.epochs": 1, "hyp.nbs": 4, "train.save_every_s": 1e-9, "eval.provider": "cpu",
    "eval.latency_warmup": 0, "eval.latency_runs": 1, "report.gallery_images": 1,
}  # fmt: skip
CRASH_BEFORE = 3  # optimizer step, inside the first epoch: two batches of it are trained, the third is not
watched: list[tuple[Path, set[str]]] = []  # folder, and the paths below it that were opened or listed


def note(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook, which Python has for good once it is added: it is silent where nothing is watched."""
    if not watched or event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | Path):
        return
    folder, seen = watched[-1]
    path = os.path.realpath(arguments[0])
    if path.startswith(f"{folder}/") or path == str(folder):
        seen.add(os.path.relpath(path, folder))


sys.addaudithook(note)


@contextmanager
def watch(folder: Path) -> Iterator[set[str]]:
    seen: set[str] = set()
    watched.append((folder.resolve(), seen))
    try:
        yield seen
    finally:
        watched.pop()


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with network(TINY), kept_figures():
        yield


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    draw_coco_subset(tmp_path / "coco", n_train=12, n_val=4)
    return tmp_path / "coco"


def config_of(coco_dir: Path, variant: str = "fp16", more: Mapping[str, Any] = MappingProxyType({})) -> Config:
    return load(variant, sets=sets_of({**SETTINGS, "data.coco_dir": str(coco_dir), **more}))


def litter(coco_dir: Path) -> set[str]:
    """What other tools leave beside images; returns the paths that may be read."""
    listed = {str(path.relative_to(coco_dir)) for path in coco_dir.rglob("*") if path.is_file()}
    for number, path in enumerate(sorted((coco_dir / "train2017").iterdir())):
        beside = path.with_suffix(".npy")
        contents = [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9)), np.zeros((5, 5, 3), np.uint16)]
        np.save(beside, contents[number % 3])
        if number == 0:
            beside.write_bytes(b"\x93NUMPY cut off")
    (coco_dir / "train2017" / "not-listed.jpg").write_bytes(b"")
    (coco_dir / "labels").mkdir()
    (coco_dir / "labels" / "train2017.cache").write_bytes(b"")
    (coco_dir / "annotations" / "captions_val2017.json").write_text("{}")
    return listed


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """SHA-256, time of the last change in ns and permissions by path, folders with their names too."""
    facts = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        content = path.read_bytes() if path.is_file() else b""
        status = path.lstat()
        facts[str(path)] = (hashlib.sha256(content).hexdigest(), status.st_mtime_ns, status.st_mode)
    return facts


def test_no_stage_writes_to_the_dataset_or_reads_what_it_has_not_checked(coco_dir: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    shutil.copytree(coco_dir, clean)
    listed = litter(coco_dir)
    folders = [coco_dir, *(path for path in coco_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = state(coco_dir)
    run = RunRoot(tmp_path / "runs", "r")
    with watch(coco_dir) as seen:
        config = config_of(coco_dir)
        prepare(config, run, force=False)
        train(config, run, force=False)
        config = config_of(coco_dir, "qat")
        export(config, run, force=False)
        evaluate(config, run, force=False)
        report(config, run)
        ptq(config, run, force=False)  # last, for its checkpoints would be exported too, which takes seconds
    assert state(coco_dir) == before
    assert seen == listed
    for folder in folders:
        folder.chmod(0o755)
    other, config = RunRoot(tmp_path / "runs", "clean"), config_of(clean)
    prepare(config, other, force=False)
    train(config, other, force=False)
    ours, theirs = (load_checkpoint(one.variant_dir("fp16") / "weights" / "last.pt") for one in (run, other))
    del ours["config"], theirs["config"]  # they name the place
    assert differences(ours, theirs) == []


def test_training_goes_on_where_the_dataset_has_moved(
    coco_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same last weights, bit for bit, as of a training that was not interrupted, from inside an epoch."""
    runs = [RunRoot(tmp_path / "runs", name) for name in ("whole", "moved")]
    config = config_of(coco_dir)
    for run in runs:
        prepare(config, run, force=False)
    train(config, runs[0], force=False)
    step, n_steps = Loop.optimizer_step, 0

    def crash(self: Loop) -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps == CRASH_BEFORE:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "optimizer_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, runs[1], force=False)
    coco_dir.rename(tmp_path / "scratch")
    config = config_of(tmp_path / "scratch")
    prepare(config, runs[1], force=False)
    train(config, runs[1], force=False)
    whole, moved = (load_checkpoint(run.variant_dir("fp16") / "weights" / "last.pt") for run in runs)
    del whole["config"], moved["config"]  # they name the place
    assert differences(whole, moved) == []
    assert read_json(runs[1].provenance, "data")["earlier_coco_dirs"] == [str(coco_dir)]


def test_ptq_and_export_build_a_deleted_view_again(coco_dir: Path, tmp_path: Path) -> None:
    run, config = RunRoot(tmp_path / "runs", "r"), config_of(coco_dir)
    prepare(config, run, force=False)
    train(config, run, force=False)
    shutil.rmtree(run.cache_dir)
    assert len(bn_images(config, run, 0).after(0)) == 1  # what ptq reads
    shutil.rmtree(run.cache_dir)
    export(config, run, force=True)
    next((coco_dir / "val2017").iterdir()).unlink()
    with pytest.raises(UserError, match=r"1 of 4 images in .*val2017 cannot be used: .*No such file"):
        export(config, run, force=True)


def test_ptq_export_and_eval_find_a_dataset_that_has_moved(
    coco_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the COCO_DIR of today; the checkpoint's configuration names the place of then."""
    run, config = RunRoot(tmp_path / "runs", "r"), config_of(coco_dir)
    prepare(config, run, force=False)
    train(config, run, force=False)
    export(config, run, force=False)
    places = [coco_dir, tmp_path / "second", tmp_path / "third", tmp_path / "fourth"]
    for before, place, stage in zip(places, places[1:], ("ptq", "export", "eval"), strict=False):
        before.rename(place)
        sets = sets_of({**SETTINGS, "data.coco_dir": str(place), "quant.scheme": "w8a16"})
        options = [word for item in sets for word in ("--set", item)]
        monkeypatch.setattr(sys, "argv", ["app", stage, "--run", "r", "--runs-dir", str(run.runs_dir), *options])
        assert main() == 0
        assert read_json(run.provenance, "data")["coco_dir"] == str(place)


def test_image_that_goes_during_a_training_is_one_line(
    coco_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunRoot(tmp_path / "runs", "r"), config_of(coco_dir, more={"train.epochs": 2})
    prepare(config, run, force=False)
    start = Loop._start_epoch

    def delete_all(self: Loop, epoch: int) -> None:
        if epoch == 1:
            shutil.rmtree(coco_dir / "train2017")
        start(self, epoch)

    monkeypatch.setattr(Loop, "_start_epoch", delete_all)
    monkeypatch.setattr("app.train.loader.MOSAIC_WINDOW", 0)  # no decoded image is kept
    with pytest.raises(UserError, match=r"^image .*\.jpg cannot be read \(No such file or directory\): restore the f"):
        train(config, run, force=False)


def test_the_line_of_a_loader_process_has_no_traceback() -> None:
    text = "Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    error = UnreadableImage(f"{text}app.train.loader.UnreadableImage: image a.jpg is empty: restore the file\n")
    assert str(error) == "image a.jpg is empty: restore the file"
    assert str(UnreadableImage("image b.jpg is empty")) == "image b.jpg is empty"


@pytest.mark.parametrize(
    ("n_images", "batch", "n_ranks", "imgsz", "refused"),
    [(5, 4, 1, 32, True), (5, 4, 1, 64, False), (6, 4, 1, 32, False), (6, 4, 2, 32, True), (7, 4, 2, 32, True),
     (8, 4, 2, 32, False), (3, 1, 1, 32, True), (3, 1, 1, 64, False)],
)  # fmt: skip
def test_batchnorm_of_one_value_is_refused_before_the_start(
    n_images: int, batch: int, n_ranks: int, imgsz: int, refused: bool
) -> None:
    batches = EpochBatches(n_images, batch, Part(0, n_ranks))
    if not refused:
        batches.check_batchnorm(imgsz)
        return
    with pytest.raises(UserError, match=r"train\.imgsz=32 with 1 image .*one value a channel: choose another train\.b"):
        batches.check_batchnorm(imgsz)


def test_a_training_with_a_last_image_alone_is_refused(coco_dir: Path, tmp_path: Path) -> None:
    config = config_of(coco_dir, more={"train.imgsz": 32, "data.n_train": 9})
    run = RunRoot(tmp_path / "runs", "r")
    prepare(config, run, force=False)
    with pytest.raises(UserError, match="leaves BatchNorm one value a channel"):
        train(config, run, force=False)
