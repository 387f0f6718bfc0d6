"""What a validation writes: a QAT training whose scores are given, so that every number has one place."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.core.files import sha256
from app.quant.model import load_checkpoint
from app.train.train import train
from tests.support.four_bits import all_codes, codes_and_scale, layers, quantized, snr_db
from tests.support.scripted import (
    PLAIN,
    SIZE_WH,
    Batch,
    Validation,
    read_table,
    reading,
    same,
    scores,
    scripted,
    write_coco,
)
from tests.support.settle import settle
from tests.support.tiny import tiny_network

STATES = ("raw", "ema", "ema_bn")
# Five epochs, of which train.val_every=2 validates 2, 4 and the last. The scored state, ema_bn, is best at epoch 4 and
# as good at 5; the raw weights alone would choose epoch 2, the EMA alone 5.
APS = {2: (0.61, 0.12, 0.30), 4: (0.41, 0.22, 0.50), 5: (0.31, 0.72, 0.50)}
BEST, LAST = 4, 5
TRAIN, VAL = range(8), range(8, 13)  # numbers of the images
SETTINGS: dict[str, Any] = PLAIN | {
    "train.epochs": 5, "train.batch": 4, "train.val_every": 2, "train.save_period": 1, "train.bn_batches": 2,
    "train.ema_decay": 0.9, "train.ema_tau": 1, "hyp.lr0": 0.05, "hyp.lrf": 0.2,
}  # fmt: skip
ROUNDED = 1e-6  # results.csv has six decimals of health
FLOAT32_RTOL = 1e-4  # a mean over thousands of values in another order


@dataclass(frozen=True)
class Scored:
    """A finished training and its validations in order."""

    folder: Path
    validations: list[Validation]

    def row(self, epoch: int) -> dict[str, str]:
        return read_table(self.folder / "results.csv")[epoch - 1]

    def kept(self, epoch: int) -> dict[str, Any]:
        """The checkpoint of an epoch's end."""
        return load_checkpoint(self.folder / "weights" / f"epoch{epoch}.pt")


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


def noise(number: int) -> np.ndarray:
    """Pixels of an image, BGR; their means differ from image to image and from channel to channel."""
    return np.random.default_rng(number).integers(0, [9 * (number + 2), 120, 250], (*SIZE_WH[::-1], 3), np.uint8)


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "coco"
    return write_coco(folder, [noise(number) for number in TRAIN], [noise(number) for number in VAL])


@pytest.fixture(scope="module")
def scored(coco_dir: Path, runs_dir: Path) -> Scored:
    config, run = settle(runs_dir, "scored", "qat", {**SETTINGS, "data.coco_dir": coco_dir})
    results = [scores(ap) for aps in APS.values() for ap in aps]
    logger = logging.getLogger("app")
    level = logger.level
    logger.setLevel(logging.INFO)
    with scripted(results) as validations:
        train(config, run, force=False)
    logger.setLevel(level)
    return Scored(run.variant_dir(config.label), validations)


# --- results.csv -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", APS)
def test_every_score_is_in_its_column(scored: Scored, epoch: int) -> None:
    """The validation loss is the sum of box, class and DFL loss: AP + 1, AP + 20 and AP + 300."""
    row = scored.row(epoch)
    for state, ap in zip(STATES, APS[epoch], strict=True):
        wanted = {f"AP/{state}": ap, f"AP50/{state}": ap + 0.05, f"val_loss/{state}": 3 * ap + 321}
        assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted)
    last_state = {name: value for name, value in scores(APS[epoch][-1]).items() if name != "fitness"}
    assert {name: float(row[name]) for name in last_state} == pytest.approx(last_state)
    assert "fitness" not in row
    assert row["epoch"] == str(epoch)


def test_an_epoch_without_a_validation_leaves_its_cells_empty(scored: Scored) -> None:
    always = {"epoch", "train", "lr", "time"}
    for epoch in (1, 3):
        row = scored.row(epoch)
        assert {name.partition("/")[0] for name, cell in row.items() if cell} == always
        assert row["epoch"] == str(epoch) and row["time/bn_reestimation_s"] == ""
    validated = {name.partition("/")[0] for name, cell in scored.row(LAST).items() if cell}
    assert validated == always | {"AP", "AP50", "val_loss", "val", "metrics", "health"}
    assert [row["epoch"] for row in read_table(scored.folder / "results.csv")] == list("12345")


def test_the_learning_rate_of_an_epoch_is_in_its_row(scored: Scored) -> None:
    """It falls linearly from lr0 to lr0 * lrf: 0.05 * (1 - 0.8 * e / 5) after e epochs."""
    for epoch in range(1, LAST + 1):
        rates = [float(cell) for name, cell in scored.row(epoch).items() if name.startswith("lr/")]
        assert rates == pytest.approx([0.05 * (1 - 0.8 * (epoch - 1) / 5)] * 3)


def test_the_loss_curve_has_the_losses_and_scores_of_every_epoch(scored: Scored) -> None:
    curve = read_table(scored.folder / "loss_curve.csv")
    kept = ("train/", "val/", "val_loss/", "AP/", "AP50/")
    table = read_table(scored.folder / "results.csv")
    names = {name for name in table[0] if name == "epoch" or name.startswith(kept)}
    assert set(curve[0]) == names
    for row, whole in zip(curve, table, strict=True):
        assert [row[name] and float(row[name]) for name in names] == [whole[n] and float(whole[n]) for n in names]


# --- what is scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", APS)
def test_each_state_is_scored_with_its_own_weights(scored: Scored, epoch: int) -> None:
    position = list(APS).index(epoch) * len(STATES)
    raw, ema, ema_bn = (one.state for one in scored.validations[position : position + len(STATES)])
    kept = scored.kept(epoch)
    assert same(raw, kept["model"])
    assert same(ema, kept["ema"])
    assert same(ema_bn, kept["scored"])
    assert not same(raw, ema)
    changed = {name.rpartition(".")[2] for name in ema if not torch.equal(ema[name], ema_bn[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_every_validation_reads_all_images_of_the_val_split(scored: Scored) -> None:
    assert [sorted(one.numbers) for one in scored.validations] == [list(VAL)] * len(APS) * len(STATES)


@pytest.mark.parametrize("epoch", APS)
def test_batchnorm_is_reestimated_on_the_train_images_with_quantized_ema_weights(scored: Scored, epoch: int) -> None:
    """Two batches of four read all eight images. A convolution is linear: its mean output is that for their mean image,
    RGB, above and below which letterboxing puts 16 rows of 114."""
    state = scored.kept(epoch)["scored"]
    mean = np.mean([noise(number) for number in TRAIN], axis=0)[..., ::-1].copy()
    image = torch.full((1, 3, 64, 64), 114 / 255)
    image[0, :, 16:48] = torch.from_numpy(mean).permute(2, 0, 1) / 255
    weight = torch.from_numpy(quantized(state["model.0.conv.weight"].numpy()))
    wanted = F.conv2d(image, weight, stride=2, padding=1).mean(dim=(0, 2, 3))
    assert state["model.0.bn.running_mean"].tolist() == pytest.approx(wanted.tolist(), rel=FLOAT32_RTOL, abs=1e-6)


# --- the best epoch --------------------------------------------------------------------------------------------------


def test_best_is_the_scored_state_of_the_epoch_with_the_highest_ap(scored: Scored) -> None:
    """Equal AP at epoch 5 keeps the earlier one."""
    best = load_checkpoint(scored.folder / "weights" / "best.pt")
    assert best["epoch"] == BEST - 1
    assert best["fitness"] == 0.50
    assert same(best["scored"], scored.kept(BEST)["scored"])
    assert not same(best["scored"], scored.kept(LAST)["scored"])


def test_only_a_better_validated_epoch_touches_best_and_health(scored: Scored) -> None:
    """They are of epoch 2 until epoch 4 is validated, and of epoch 4 ever after."""
    assert [one.best_epoch for one in scored.validations[::3]] == [0, 2, 4]
    assert [one.health_epoch for one in scored.validations[::3]] == [0, 2, 4]
    assert json.loads((scored.folder / "health.json").read_text())["epoch"] == BEST


def test_done_log_and_tensorboard_name_the_best_epoch(scored: Scored) -> None:
    done = json.loads((scored.folder / "done.json").read_text())
    assert (done["epochs"], done["best_ap"]) == (LAST, 0.50)
    assert done["best_sha256"] == sha256(scored.folder / "weights" / "best.pt")
    run = json.loads((scored.folder.parent / "run.json").read_text())
    assert run["stages"]["train qat-w4a16"]["best_ap"] == 0.50
    lines = (scored.folder / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if "epoch 5/5: loss" in line]
    assert "AP raw 0.310, EMA 0.720, EMA+BN 0.500 (best 0.500 at 4)" in line


def test_tensorboard_has_every_number_at_its_epoch(scored: Scored) -> None:
    events = EventAccumulator(str(scored.folder / "tensorboard")).Reload()
    total = {event.step: event.value for event in events.Scalars("train_loss/total")}
    table = read_table(scored.folder / "results.csv")
    for name in ("AP/raw", "AP/ema", "AP/ema_bn", "AP50/raw", "val_loss/ema", "train/dfl_loss", "health/flipped"):
        wanted = {int(row["epoch"]): float(row[name]) for row in table if row[name]}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted)
    terms = ("train/box_loss", "train/cls_loss", "train/dfl_loss")
    assert total == pytest.approx({int(row["epoch"]): sum(float(row[name]) for name in terms) for row in table})


def test_no_curve_has_two_names_in_tensorboard(scored: Scored) -> None:
    """The trainer's AP is Ultralytics' mAP50-95, and its parameter groups have one learning rate after the warm-up."""
    events = EventAccumulator(str(scored.folder / "tensorboard")).Reload()
    cards: dict[tuple[float, ...], str] = {}
    for name in events.Tags()["scalars"]:
        curve = tuple(event.value for event in events.Scalars(name))
        if name.startswith(("AP", "metrics/mAP", "lr/")):
            assert curve not in cards, (name, cards[curve])
            cards[curve] = name
    assert {"AP/ema_bn", "AP50/ema_bn", "lr/pg0"} <= set(cards.values())


# --- health ----------------------------------------------------------------------------------------------------------


def health_of(row: dict[str, str]) -> dict[str, float]:
    return {name.removeprefix("health/"): float(cell) for name, cell in row.items() if name.startswith("health/")}


def test_health_is_the_signal_to_noise_ratio_of_the_best_state(scored: Scored) -> None:
    recorded = json.loads((scored.folder / "health.json").read_text())["snr_db"]
    assert recorded == pytest.approx(snr_db(scored.kept(BEST)["scored"]), rel=FLOAT32_RTOL)


@pytest.mark.parametrize(("epoch", "before"), [(4, 2), (5, 4)])
def test_health_of_the_codes(scored: Scored, epoch: int, before: int) -> None:
    """Flipped: since the last validation. The window is one step, in which no code can turn back: none oscillates."""
    kept, health = scored.kept(epoch), health_of(scored.row(epoch))
    codes, ema_codes = all_codes(kept["model"]), all_codes(kept["ema"])
    flipped = np.mean(codes != all_codes(scored.kept(before)["model"]))
    assert 0 < flipped < 1
    assert health["flipped"] == pytest.approx(flipped, abs=ROUNDED)
    assert health["ema_differs"] == pytest.approx(np.mean(codes != ema_codes), abs=ROUNDED)
    assert health["oscillating"] == 0
    snr = list(snr_db(kept["scored"]).values())
    assert health["snr_min_db"] == pytest.approx(min(snr), rel=FLOAT32_RTOL)
    assert health["snr_mean_db"] == pytest.approx(np.mean(snr), rel=FLOAT32_RTOL)


def test_no_code_has_flipped_at_the_first_validation(scored: Scored) -> None:
    assert health_of(scored.row(2))["flipped"] == 0


@pytest.mark.parametrize("epoch", APS)
def test_health_of_scales_and_batchnorm(scored: Scored, epoch: int) -> None:
    """Raw scale over the EMA's, and re-estimated variance over the averaged one, a number a layer."""
    kept, health = scored.kept(epoch), health_of(scored.row(epoch))
    pairs = zip(layers(kept["model"]).values(), layers(kept["ema"]).values(), strict=True)
    scales = [np.mean(codes_and_scale(raw)[1] / codes_and_scale(ema)[1]) for raw, ema in pairs]
    variances = {name: value.numpy() for name, value in kept["scored"].items() if name.endswith("running_var")}
    ratios = [np.exp(np.mean(np.log(new) - np.log(kept["ema"][name].numpy()))) for name, new in variances.items()]
    for name, values in (("scale_ratio", scales), ("bn_ratio", ratios)):
        wanted = {"min": min(values), "median": np.median(values), "max": max(values)}
        assert {end: health[f"{name}_{end}"] for end in wanted} == pytest.approx(wanted, rel=FLOAT32_RTOL, abs=ROUNDED)


# --- warm-up and correction ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corrected(Scored):
    """A training with a warm-up of one epoch, two epochs and a correction, and the batches that it read."""

    batches: list[Batch]


@pytest.fixture(scope="module")
def corrected(coco_dir: Path, runs_dir: Path) -> Corrected:
    """The warm-up's epoch scores 0.9, the two after it 0.4 and 0.2, and a correction of the first of these 0.45."""
    options = {"train.epochs": 3, "train.val_every": 1, "quant.warmup_share": 0.34, "quant.correction_epochs": 1}
    config, run = settle(runs_dir, "warm", "qat", {**SETTINGS, **options, "data.coco_dir": coco_dir})
    aps = (0.7, 0.8, 0.9, 0.21, 0.3, 0.4, 0.5, 0.1, 0.2, 0.45)
    with scripted([scores(ap) for ap in aps]) as validations, reading() as read:
        train(config, run, force=False)
    return Corrected(run.variant_dir(config.label), validations, read)


def test_the_warm_up_is_never_best_and_a_better_correction_is(corrected: Corrected) -> None:
    assert [one.best_epoch for one in corrected.validations] == [0] * 6 + [2] * 4
    table = read_table(corrected.folder / "results.csv")
    assert [row["quant/warm_up"] for row in table] == ["1", "", ""]
    assert [row["AP/ema_bn"] for row in table] == ["0.9", "0.4", "0.2"]
    assert [row["AP/corrected"] for row in table] == ["", "", "0.45"]
    assert json.loads((corrected.folder / "health.json").read_text())["epoch"] == 2
    best = load_checkpoint(corrected.folder / "weights" / "best.pt")
    assert (best["epoch"], best["fitness"]) == (1, 0.45)
    assert same(best["scored"], corrected.validations[-1].state)


def test_done_says_the_ap_of_what_best_pt_holds(corrected: Corrected) -> None:
    done = json.loads((corrected.folder / "done.json").read_text())
    run = json.loads((corrected.folder.parent / "run.json").read_text())
    assert done["best_ap"] == run["stages"]["train qat-w4a16"]["best_ap"] == 0.45


def test_the_correction_is_of_the_best_state_and_not_of_the_last(corrected: Corrected) -> None:
    """It changes BatchNorm and biases; weights and running statistics are still those of epoch 2."""
    state, best, last = corrected.validations[-1].state, corrected.kept(2)["scored"], corrected.kept(3)["scored"]
    kept = [name for name, value in state.items() if value.ndim == 4 or "running" in name]
    assert all(torch.equal(state[name], best[name]) for name in kept)
    assert not any(torch.equal(state[name], last[name]) for name in kept if ".dfl." not in name)
    assert not same(state, best)


def test_a_correction_reads_an_epoch_of_its_own(corrected: Corrected) -> None:
    batches = corrected.batches
    orders = [[number for batch in batches[n : n + 2] for number in batch.numbers] for n in range(0, 8, 2)]
    assert len(batches) == 8
    assert [sorted(order) for order in orders] == [list(TRAIN)] * 4  # three epochs and the correction
    assert orders[3] != orders[2]


def test_a_training_on_fp16s_epochs_has_its_own_best(coco_dir: Path, runs_dir: Path) -> None:
    """The FP16 epochs that are its warm-up scored 0.9 and are in its table, marked where they were validated. Its own
    epoch scores 0.3, and a correction that scores 0.29 is not kept."""
    settings = {**SETTINGS, "train.epochs": 3, "data.coco_dir": coco_dir}
    fp16, run = settle(runs_dir, "branch", "fp16", settings)
    with scripted([scores(ap) for ap in (0.7, 0.8, 0.9, 0.91, 0.92, 0.93)]):
        train(fp16, run, force=False)
    trunk = run.variant_dir("fp16") / "weights" / "epoch2.pt"
    float_epochs = {"quant.warmup_share": 0.67, "quant.warmup_bits": "float", "quant.warmup_from": trunk}
    qat, _ = settle(runs_dir, "branch", "qat", settings | float_epochs | {"quant.correction_epochs": 1})
    with scripted([scores(ap) for ap in (0.1, 0.2, 0.3, 0.29)]):
        train(qat, run, force=False)
    folder = run.variant_dir(qat.label)
    table = read_table(folder / "results.csv")
    assert [(row["AP/ema_bn"], row["quant/warm_up"]) for row in table] == [("", ""), ("0.9", "1"), ("0.3", "")]
    assert [row["AP/corrected"] for row in table] == ["", "", "0.29"]
    best, third = (load_checkpoint(folder / "weights" / name) for name in ("best.pt", "epoch3.pt"))
    assert (best["epoch"], best["fitness"]) == (2, 0.3)
    assert same(best["scored"], third["scored"])
    assert json.loads((folder / "done.json").read_text())["best_ap"] == 0.3
    assert load_checkpoint(run.best("fp16"))["epoch"] == 2
