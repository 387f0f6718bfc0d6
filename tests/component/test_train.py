"""The trainer on a tiny drawn dataset: what it writes, what it scores, and that a resumed training is the same one."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.bench.soak import differences
from app.core.config import Config, UserError, load, validate
from app.core.files import read_json
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.quant.model import load_checkpoint, load_scored, save_checkpoint
from app.train.interrupt import Interrupted
from app.train.train import check_snapshot, train
from app.train.trainer import Trainer
from app.train.validation import score_states

# 40 images in batches of 8, two of them to an optimizer step; mosaic in all but the last epoch. A fast EMA.
SETTINGS = [
    "data.coco_dir=coco-subset", "data.n_train=40", "data.n_val=8", "model=yolov10n.yaml", "train.imgsz=64",
    "train.batch=8", "train.epochs=3", "train.workers=0", "train.device=cpu", "train.bn_batches=2", "hyp.nbs=16",
    "hyp.warmup_epochs=1", "hyp.close_mosaic=1", "train.ema_tau=5",
]  # fmt: skip
STEPS_AN_EPOCH = 3
WHOLE = "whole"  # run that the tests share


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def room(runs_dir: Path) -> Iterator[None]:
    """A test's own runs go with it, 100 MB each: in the container they lie in memory."""
    yield
    for root in runs_dir.iterdir():
        if root.name not in (".cache", WHOLE):
            shutil.rmtree(root) if root.is_dir() else root.unlink()


def settle(runs_dir: Path, name: str, variant: str = "qat", sets: tuple[str, ...] = ()) -> tuple[Config, RunRoot]:
    """Configuration and run root with a prepared dataset."""
    config, run = load(variant, sets=[*SETTINGS, *sets]), RunRoot(runs_dir, name)
    prepare(config, run, force=False)
    return config, run


@pytest.fixture(scope="session")
def trained(runs_dir: Path) -> dict[str, Path]:
    """Folders of both variants, trained without interruption."""
    folders = {}
    for variant in ("fp16", "qat"):
        config, run = settle(runs_dir, WHOLE, variant)
        train(config, run, force=False)
        folders[variant] = run.variant_dir(config.label)
    return folders


def rows(folder: Path) -> list[dict[str, str]]:
    """results.csv without what depends on the clock."""
    with open(folder / "results.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("variant", ["fp16", "qat"])
def test_a_training_leaves_everything_the_next_stages_need(trained: dict[str, Path], variant: str) -> None:
    folder = trained[variant]
    for name in ("config.yaml", "env.json", "args.yaml", "log.txt", "results.csv", "loss_curve.csv", "loss_curve.png"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "quant_config.json").exists() == (variant == "qat")
    table = rows(folder)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert {"AP/raw", "AP/ema", "AP/ema_bn", "train/box_loss", "val_loss/ema_bn"} <= set(table[0])
    for name in ("best.pt", "last.pt"):
        model, config, _ = load_scored(folder / "weights" / name)
        assert config.label == folder.name
        assert not model.training


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_correction_changes_what_is_exported_and_nothing_of_the_weights(
    runs_dir: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settle(runs_dir, "corrected", sets=("quant.correction_epochs=1", "quant.correction_lr=0.01"))
    with monkeypatch.context() as patch:  # a crash in it: the next start has nothing else to do
        patch.setattr("app.train.correction.correct", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    plain, corrected = (load_checkpoint(of / "weights" / "best.pt")["scored"] for of in (trained["qat"], folder))
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], corrected[name])}
    assert changed == {"weight", "bias"}
    assert all(torch.equal(plain[name], corrected[name]) for name in plain if name.endswith("conv.weight"))
    assert rows(folder)[-1]["AP/corrected"] != ""
    (folder / "done.json").unlink()  # the next start finds that all is done
    monkeypatch.setattr("app.train.correction.correct", None)
    train(config, run, force=False)


def test_validation_scores_the_one2one_head(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = settle(runs_dir, "head", sets=("train.epochs=1",))
    seen = []
    validate = Trainer.validate

    def spy(self: Trainer) -> dict[str, float]:
        result = validate(self)
        seen.append((self.held_out.end2end, self.held_out.training))
        return result

    monkeypatch.setattr(Trainer, "validate", spy)
    train(config, run, force=False)
    assert seen == [(True, False)]


def test_both_variants_start_from_the_same_weights_and_see_the_same_images(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, tuple[Any, torch.Tensor]] = {}

    def stop(self: Trainer, batch: dict[str, Any]) -> None:
        first[self.config.variant] = (self.model.state_dict()["model.0.conv.weight"].clone(), batch["img"].clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_backward", stop)
    for variant in ("fp16", "qat"):
        config, run = settle(runs_dir, "start", variant)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    assert torch.equal(first["fp16"][0], first["qat"][0])
    assert torch.equal(first["fp16"][1], first["qat"][1])


@pytest.mark.parametrize(
    ("variant", "crash_at"), [("fp16", 4), ("qat", 2), ("qat", 2 * STEPS_AN_EPOCH), ("qat", 2 * STEPS_AN_EPOCH + 2)]
)
def test_a_crashed_training_continues_as_if_nothing_had_happened(
    trained: dict[str, Path], runs_dir: Path, monkeypatch: pytest.MonkeyPatch, variant: str, crash_at: int
) -> None:
    """With a checkpoint at every step: inside the first epoch, between epochs, and after mosaic has been closed."""
    config, run = settle(runs_dir, f"crash-{variant}-{crash_at}", variant, ("train.save_every_s=1e-9",))
    step, n_steps = Trainer.optimizer_step, 0

    def crash(self: Trainer) -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps > crash_at:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    assert rows(folder) == rows(trained[variant])
    ours, whole = (load_checkpoint(path / "weights" / "last.pt") for path in (folder, trained[variant]))
    del ours["config"], whole["config"]
    assert differences(ours, whole) == []


def test_a_signal_saves_and_the_same_command_goes_on(
    trained: dict[str, Path], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a training step, then SIGINT in the validation after it."""
    config, run = settle(runs_dir, "signal")
    step, validate, sent = Trainer.optimizer_step, Trainer.validate, []

    def step_and_term(self: Trainer) -> None:
        step(self)
        if not sent:
            sent.append("TERM")
            os.kill(os.getpid(), signal.SIGTERM)

    def validate_and_int(self: Trainer) -> dict[str, float]:
        result = validate(self)
        if len(sent) == 1:
            sent.append("INT")
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "optimizer_step", step_and_term)
    monkeypatch.setattr(Trainer, "validate", validate_and_int)
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Interrupted) as stop:
            train(config, run, force=False)
        assert stop.value.signal == number
    train(config, run, force=False)
    assert rows(run.variant_dir(config.label)) == rows(trained["qat"])


def test_a_killed_process_continues(runs_dir: Path, trained: dict[str, Path]) -> None:
    """kill -9 as soon as the first checkpoint is there; the command of the user is run again."""
    config, run = settle(runs_dir, "killed", sets=("train.save_every_s=1e-9",))
    sets = [part for item in (*SETTINGS, "train.save_every_s=1e-9") for part in ("--set", item)]
    command = [sys.executable, "-m", "app", "train", "--variant", "qat", "--run", "killed", "--runs-dir", str(runs_dir)]
    last = run.variant_dir(config.label) / "weights" / "last.pt"
    with subprocess.Popen([*command, *sets], stderr=subprocess.DEVNULL) as process:
        while not last.with_name("last-1.pt").exists() and process.poll() is None:  # the first is the start
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train(config, run, force=False)
    assert rows(last.parent.parent) == rows(trained["qat"])


def test_a_finished_training_is_left_alone_and_another_configuration_is_refused(
    trained: dict[str, Path], runs_dir: Path
) -> None:
    config, run = settle(runs_dir, WHOLE)
    before = (trained["qat"] / "weights" / "last.pt").stat().st_mtime_ns
    train(config, run, force=False)
    assert (trained["qat"] / "weights" / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"hyp\.lr0: 0\.01 -> 0\.1.*RUN=name"):
        train(load("qat", sets=[*SETTINGS, "hyp.lr0=0.1"]), run, force=False)


def test_validation_may_be_rarer_than_epochs(runs_dir: Path) -> None:
    config, run = settle(runs_dir, "rare", sets=("train.val_every=2",))
    train(config, run, force=False)
    aps = [row["AP/ema_bn"] for row in rows(run.variant_dir(config.label))]
    assert [bool(ap) for ap in aps] == [False, True, True]
    assert read_json(run.variant_dir(config.label) / "done.json", "train")["epochs"] == 3


def test_a_crash_between_the_last_epoch_and_the_end_loses_nothing(runs_dir: Path) -> None:
    config, run = settle(runs_dir, "end", "fp16", ("train.epochs=1",))
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    table = rows(folder)
    (folder / "done.json").unlink()
    train(config, run, force=False)
    assert rows(folder) == table
    assert (folder / "done.json").exists()


OPTIONS = (
    "quant.warmup_share=0.34", "quant.warmup_bits=8", "quant.learned_scale=true", "quant.dampening=0.001",
    "quant.freeze_threshold=0.02", "quant.freeze_momentum=0.1", "train.save_every_s=1e-9",
    "data.n_train=24", "data.n_val=4", "train.val_every=3",
)  # fmt: skip


def test_all_options_together_continue_exactly(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashes in the warm-up of bits and learning rate, at their switch, and after mosaic has been closed."""
    config, run = settle(runs_dir, "options-whole", sets=OPTIONS)
    train(config, run, force=False)
    whole = run.variant_dir(config.label)
    config, run = settle(runs_dir, "options", sets=OPTIONS)
    step, n_steps = Trainer.optimizer_step, 0

    def crash(self: Trainer) -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps in (2, 4, 8):  # of two an epoch; a crashed one is done again, and counted again
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "optimizer_step", crash)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config, run, force=False)
    train(config, run, force=False)
    ours, theirs = (load_checkpoint(of / "weights" / "last.pt") for of in (run.variant_dir(config.label), whole))
    assert differences(ours, theirs) == []


def test_no_epoch_of_the_quant_warm_up_is_the_best(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores higher, with other weights than those that are exported."""
    config, run = settle(runs_dir, "warm", sets=("quant.warmup_share=0.67",))
    validate = Trainer.validate

    def score_warm_epochs_higher(self: Trainer) -> dict[str, float]:
        with monkeypatch.context() as patch:
            scores = {"AP/ema_bn": 0.9 - 0.1 * self.epoch if self.epoch < 2 else 0.1}
            patch.setattr("app.train.trainer.score_states", lambda *args: score_states(*args) | scores)
            return validate(self)

    monkeypatch.setattr(Trainer, "validate", score_warm_epochs_higher)
    train(config, run, force=False)
    folder = run.variant_dir(config.label)
    assert [row["quant/warm_up"] for row in rows(folder)] == ["1", "1", ""]
    assert read_json(folder / "done.json", "train")["best_ap"] == 0.1
    assert load_checkpoint(folder / "weights" / "best.pt")["epoch"] == 2


def test_reestimated_batchnorm_is_what_is_scored(trained: dict[str, Path]) -> None:
    checkpoint = load_checkpoint(trained["qat"] / "weights" / "last.pt")
    name = "model.0.bn.running_mean"
    assert not torch.equal(checkpoint["scored"][name], checkpoint["ema"][name])
    assert torch.equal(checkpoint["scored"]["model.0.conv.weight"], checkpoint["ema"]["model.0.conv.weight"])


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_or_foreign_checkpoint_is_named(trained: dict[str, Path], tmp_path: Path, damage: str) -> None:
    data = (trained["qat"] / "weights" / "best.pt").read_bytes()
    path = tmp_path / "best.pt"
    if damage == "other":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no checkpoint")
    with pytest.raises(UserError, match=r"best\.pt is not"):
        load_checkpoint(path)


# --- a QAT training that begins with FP16's epochs -------------------------------------------------------------------

FLOAT_WARM_UP = ("quant.warmup_share=0.67", "quant.warmup_bits=float", "quant.learned_scale=true")


def test_fp16s_epochs_are_a_float_warm_up_bit_for_bit(runs_dir: Path) -> None:
    """What the FP16 training kept after two epochs gives the QAT training that has trained them by itself."""
    config, run = settle(runs_dir, "trunk", "fp16", ("train.save_period=2",))
    train(config, run, force=False)
    kept = run.variant_dir("fp16") / "weights" / "epoch2.pt"
    assert [path.name for path in kept.parent.glob("epoch*.pt")] == [kept.name]
    folders = []
    for name, extra in (("branch", (f"quant.warmup_from={kept}",)), ("alone", ())):
        config, run = settle(runs_dir, name, sets=(*FLOAT_WARM_UP, *extra))
        train(config, run, force=False)
        folders.append(run.variant_dir(config.label))
    branched, alone = (load_checkpoint(folder / "weights" / "last.pt") for folder in folders)
    for entry in ("model", "ema", "scored"):
        assert all(torch.equal(branched[entry][key], value) for key, value in alone[entry].items())
    shared = ("epoch", "train/box_loss", "AP/ema_bn", "val_loss/raw", "lr/pg0", "quant/warm_up")
    ours, theirs = ([{key: row.get(key) for key in shared} for row in rows(folder)] for folder in folders)
    assert ours == theirs
    assert (
        read_json(folders[0] / "done.json", "train")["best_ap"]
        == read_json(folders[1] / "done.json", "train")["best_ap"]
    )


REFUSED = {
    "later": (("quant.warmup_share=0.34",), r"has 2 epochs, the warm-up 1 \(quant.warmup_share=0.34 of 3\)"),
    "recipe": (("hyp.lr0=0.5",), r"was trained with another recipe \(hyp.lr0: 0.01 -> 0.5\)"),
    "QAT": ((), "is not an epochN.pt of an FP16 training"),
    "none": ((), "nothing.pt is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_is_no_warm_up_of_this_training_is_refused(
    case: str, runs_dir: Path, trained: dict[str, Path]
) -> None:
    sets, message = REFUSED[case]
    folder = trained["qat" if case == "QAT" else "fp16"]
    path = folder / "weights" / "nothing.pt" if case == "none" else runs_dir / f"epoch2-{case}.pt"
    if case != "none":
        state = load_checkpoint(folder / "weights" / "last.pt")
        save_checkpoint(path, validate(state.pop("config")), {**state, "epoch": 1})
    config, run = settle(runs_dir, f"refused-{case}", sets=(*FLOAT_WARM_UP, f"quant.warmup_from={path}", *sets))
    with pytest.raises(UserError, match=message):
        train(config, run, force=False)
    mended, _ = settle(runs_dir, f"refused-{case}", sets=FLOAT_WARM_UP)  # nothing is left that it would be refused for
    check_snapshot(mended, run.variant_dir(config.label) / "config.yaml")
