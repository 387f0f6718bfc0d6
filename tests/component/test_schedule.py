"""Learning rates, momentum, accumulation, clipping, decays, head weights and mosaic of every step, worked out by hand.

10 images in batches of 2 are five batches an epoch. A step takes nbs / batch = 7 / 2, rounded to four batches. The
warm-up takes round(1.4 * 5) = 7 batches, so that it ends in the second epoch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.core.config import load
from app.quant.model import build
from app.train.processes import ALONE
from app.train.step import criterion_after, ema_decay
from tests.support.recorder import Recorder
from tests.support.settle import AT_EVERY_STEP, settle
from tests.support.tiny import tiny_network, train_recorded

SETTINGS = {
    "data.n_train": 10, "data.n_val": 2, "train.batch": 2, "train.epochs": 4, "train.val_every": 4,
    "train.ema_decay": 0.9, "train.ema_tau": 5, "hyp.nbs": 7, "hyp.warmup_epochs": 1.4, "hyp.lr0": 0.02, "hyp.lrf": 0.2,
    "hyp.momentum": 0.9, "hyp.warmup_momentum": 0.6, "hyp.warmup_bias_lr": 0.1, "hyp.weight_decay": 0.0007,
    "hyp.close_mosaic": 2, "hyp.mosaic": 1.0,
}  # fmt: skip
# Without these an image that is no mosaic is the same in every epoch.
NO_AUGMENTATION = dict.fromkeys([f"hyp.{key}" for key in "hsv_h hsv_s hsv_v translate scale fliplr".split()], 0.0)
N_BATCHES = 5  # of an epoch
# Batches from 0 after which a step is taken. The warm-up takes 1 + 3 * batch / 7 batches, rounded: 1 1 2 2 3 3 4 4.
STEPS = [0, 1, 3, 4, 8, 9, 13, 14, 18, 19]  # 4, 9, 14 and 19 end an epoch
# The rate of epoch e is lr0 * (1 - e / 4 * (1 - lrf)): 0.02, 0.016, 0.012, 0.008. The warm-up rises to it in 7 batches.
RATES = [  # of weights and BatchNorm at STEPS
    0.0, 0.02 * 1 / 7, 0.02 * 3 / 7, 0.02 * 4 / 7, 0.016, 0.016, 0.012, 0.012, 0.008, 0.008,
]  # fmt: skip
BIAS_RATES = [  # from warmup_bias_lr down to the target
    0.1, 0.1 - 0.08 * 1 / 7, 0.1 - 0.08 * 3 / 7, 0.1 - 0.08 * 4 / 7, 0.016, 0.016, 0.012, 0.012, 0.008, 0.008,
]  # fmt: skip
MOMENTA = [0.6, 0.6 + 0.3 * 1 / 7, 0.6 + 0.3 * 3 / 7, 0.6 + 0.3 * 4 / 7, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
WEIGHT_DECAY = 0.0007 * 2 * 4 / 7  # times the images of a step, over nbs
ONE2MANY = [0.8, 0.8 - 0.7 / 3, 0.8 - 1.4 / 3, 0.1]  # gain of its loss: linear over the epochs, 0.1 in the last
MAX_NORM = 10.0
LARGE = 8  # batch whose gradient is made so large that the step after it is clipped
GROUPS = {"weight": 0, "norm": 1, "bias": 2}  # place in the optimizer, as Ultralytics has it
# (Matrices, vectors) of the groups. The network has 15 convolutions with BatchNorm: 3 and, in each of the two heads, 6.
# A head ends in two convolutions with a bias; DFL is one without.
N_PARAMETERS = [(15 + 4 + 1, 0), (0, 15), (0, 15 + 4)]
EXACT = 1e-9  # relative: the values are FP64 numbers of a few operations
FP32 = 1e-5  # relative: a norm of 400,000 FP32 gradients, or an EMA of FP32 values after ten updates
CRASHES = (2, 9)  # steps before which the FP16 training is interrupted: in the warm-up and after mosaic has been closed


@dataclass(frozen=True)
class Training:
    """A recorded training and the rows of its results.csv."""

    recorder: Recorder
    rows: list[dict[str, str]]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def trainings(runs_dir: Path) -> dict[str, Training]:
    """FP16, interrupted twice, and QAT, uninterrupted: both must follow the same schedule."""
    done = {}
    for variant, crashes, saves in (("fp16", CRASHES, AT_EVERY_STEP), ("qat", (), {})):
        config, run = settle(runs_dir, "hand", variant, SETTINGS | NO_AUGMENTATION | saves)
        recorder = Recorder(crash_before=crashes, factors={LARGE: 1e5})
        folder = train_recorded(config, run, recorder)
        with open(folder / "results.csv", encoding="utf-8") as file:
            done[variant] = Training(recorder, list(csv.DictReader(file)))
    return done


@pytest.fixture(params=["fp16", "qat"])
def training(request: pytest.FixtureRequest, trainings: dict[str, Training]) -> Training:
    return trainings[request.param]


def test_gradients_accumulate_over_a_growing_number_of_batches(training: Training) -> None:
    assert [step.batch for step in training.recorder.steps] == STEPS
    assert len(training.recorder.batches) == 4 * N_BATCHES


@pytest.mark.parametrize(("kind", "rates"), [("weight", RATES), ("norm", RATES), ("bias", BIAS_RATES)])
def test_learning_rates_warm_up_and_fall(training: Training, kind: str, rates: list[float]) -> None:
    assert [step.groups[GROUPS[kind]].lr for step in training.recorder.steps] == pytest.approx(rates, rel=EXACT)


@pytest.mark.parametrize("kind", GROUPS)
def test_momentum_warms_up(training: Training, kind: str) -> None:
    momenta = [step.groups[GROUPS[kind]].momentum for step in training.recorder.steps]
    assert momenta == pytest.approx(MOMENTA, rel=EXACT)


def test_weights_alone_decay_and_by_the_images_of_a_step(training: Training) -> None:
    for step in training.recorder.steps:
        assert [(group.n_matrices, group.n_vectors) for group in step.groups] == N_PARAMETERS
        assert [group.weight_decay for group in step.groups] == pytest.approx([WEIGHT_DECAY, 0.0, 0.0], rel=EXACT)


def test_results_csv_has_the_learning_rates_of_the_last_step_of_each_epoch(training: Training) -> None:
    last = [RATES[i] for i in (3, 5, 7, 9)]
    for column in ("lr/pg0", "lr/pg1"):
        assert [float(row[column]) for row in training.rows] == pytest.approx(last, rel=EXACT)
    biases = [BIAS_RATES[i] for i in (3, 5, 7, 9)]
    assert [float(row["lr/pg2"]) for row in training.rows] == pytest.approx(biases, rel=EXACT)


def test_gradients_of_a_training_are_clipped_at_ten(training: Training) -> None:
    """Only that of the step with the large one: the others are smaller than ten, and stay as they are."""
    norms = [step.grad_norm for step in training.recorder.steps]
    assert norms.pop(STEPS.index(LARGE)) == pytest.approx(MAX_NORM, rel=FP32)
    assert 0 < max(norms) < MAX_NORM


def test_head_weights_move_from_one2many_to_one2one(training: Training) -> None:
    expected = [gain for gain in ONE2MANY for _ in range(N_BATCHES)]
    batches = training.recorder.batches
    assert [batch.one2many for batch in batches] == pytest.approx(expected, rel=EXACT)
    assert [batch.one2one for batch in batches] == pytest.approx([1 - gain for gain in expected], rel=EXACT)


@pytest.mark.parametrize("n_epochs", range(4))
def test_head_weights_after_a_resume(n_epochs: int) -> None:
    config = load("fp16", sets=["model=yolov10n.yaml"])
    net: Any = build(config)[0]
    net.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=4)
    criterion = criterion_after(n_epochs, net, ALONE)
    assert (criterion.o2m, criterion.o2o) == pytest.approx((ONE2MANY[n_epochs], 1 - ONE2MANY[n_epochs]), rel=EXACT)
    assert criterion.updates == n_epochs


def test_mosaic_is_off_in_exactly_the_last_two_epochs(training: Training) -> None:
    """An image without mosaic is that of the last epoch; every epoch reads each image once."""
    epochs = images_by_epoch(training.recorder)
    assert [len(images) for images in epochs] == [10, 10, 10, 10]
    plain = [[torch.equal(image, epochs[3][name]) for name, image in images.items()] for images in epochs]
    assert [any(equal) for equal in plain] == [False, False, True, True]
    assert all(plain[2])


def images_by_epoch(recorder: Recorder) -> list[dict[str, torch.Tensor]]:
    """File name -> image, of each epoch."""
    epochs: list[dict[str, torch.Tensor]] = [{} for _ in ONE2MANY]
    for number, batch in enumerate(recorder.batches):
        epochs[number // N_BATCHES] |= batch.images
    return epochs


def test_fp16_resumed_and_qat_read_the_same_batches(trainings: dict[str, Training]) -> None:
    pairs = zip(trainings["fp16"].recorder.batches, trainings["qat"].recorder.batches, strict=True)
    for fp16, qat in pairs:
        assert list(fp16.images) == list(qat.images)
        assert all(torch.equal(image, qat.images[name]) for name, image in fp16.images.items())


def test_the_average_is_that_of_the_configured_decay(training: Training) -> None:
    """A step's update n takes decay * (1 - exp(-n / tau)) of the average before it, with 0.9 and 5."""
    average = training.recorder.initial
    updates = training.recorder.updates
    assert [update.batch for update in updates] == STEPS
    assert [update.count for update in updates] == list(range(1, 11))
    for n, update in enumerate(updates, start=1):
        decay = 0.9 * (1 - math.exp(-n / 5))
        average = decay * average + (1 - decay) * update.network
        torch.testing.assert_close(update.average, average, rtol=FP32, atol=FP32)


def test_decay_of_the_full_run() -> None:
    """The default is Ultralytics' 0.9999 and 2000."""
    settings = load("qat").train
    assert ema_decay(settings, 2) == pytest.approx(0.9999 * (1 - math.exp(-0.001)), rel=EXACT)
    assert ema_decay(settings, 2000) == pytest.approx(0.9999 * (1 - 1 / math.e), rel=EXACT)
