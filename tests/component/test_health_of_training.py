"""Health columns of results.csv against NumPy on what the optimizer and the checkpoints hold."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from app.core.files import read_json
from app.quant.model import load_checkpoint
from app.train.train import train
from tests.support.settle import settle
from tests.support.tiny import tiny_network

# 8 batches an epoch, each with a step: the window in which oscillations are counted is the last quarter, 2 steps.
# The first of three epochs has 8-bit weights. Steps are large, so that codes change and oscillate.
SETTINGS = {
    "data.n_train": 16, "data.n_val": 2, "train.batch": 2, "train.epochs": 3, "train.bn_batches": 2, "hyp.nbs": 2,
    "hyp.warmup_epochs": 0, "hyp.lr0": 0.05, "hyp.lrf": 1.0, "train.ema_tau": 20, "quant.warmup_share": 0.34,
    "quant.warmup_bits": 8, "guard.collapse": "'off'",
}  # fmt: skip
N_STEPS, N_WINDOW = 8, 2
LARGEST = 7
# results.csv has six decimals; shares and ratios of float32 weights are summed in another order than here.
CSV_ATOL = 2e-6
# Ratios and dB are up to 1e3 and summed over up to 1e5 float32 terms.
SUM_RTOL = 1e-5


@dataclass(frozen=True)
class Trained:
    """Folder of the variant, rows of results.csv, and the codes after a step, counted from 1: int8 [n]."""

    folder: Path
    rows: list[dict[str, float]]
    codes: dict[int, np.ndarray]
    tf32: tuple[Any, ...]

    def state(self, name: str) -> dict[str, np.ndarray]:
        """'model', 'ema' or 'scored' of last.pt."""
        checkpoint = load_checkpoint(self.folder / "weights" / "last.pt")
        return {key: value.numpy() for key, value in checkpoint[name].items()}

    def weights(self, name: str) -> dict[str, np.ndarray]:
        """The weights that are quantized, [channels,n], by layer."""
        layers = read_json(self.folder / "quant_config.json", "train")["layers"]
        state = self.state(name)
        names = [layer["name"] for layer in layers if layer["bits"] is not None]
        return {name: state[f"{name}.weight"].reshape(len(state[f"{name}.weight"]), -1) for name in names}


def scale_of(weight: np.ndarray) -> np.ndarray:
    """[channels,n] -> [channels,1]: abs-max of a channel over the largest code."""
    return np.abs(weight).max(1, keepdims=True) / np.float32(LARGEST)


def codes_of(weights: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.rint(weight / scale_of(weight)).astype(np.int8).ravel() for weight in weights])


def record_codes(codes: dict[int, np.ndarray]) -> Any:
    """A hook on every optimizer step; it keeps the codes at 4 bits of the steps that the tests look at."""
    count = iter(range(1, 3 * N_STEPS + 1))
    wanted = {n * N_STEPS - back for n in (2, 3) for back in range(N_WINDOW + 1)}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step = next(count)
        if step in wanted:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            convs = [p.detach().flatten(1).numpy() for p in parameters if p.ndim == 4 and p.requires_grad]
            codes[step] = codes_of(convs)

    return register_optimizer_step_post_hook(hook)


def tf32_flags() -> tuple[Any, ...]:
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture(scope="module")
def trained(runs_dir: Path) -> Iterator[Trained]:
    config, run = settle(runs_dir, "health", "qat", SETTINGS)
    codes: dict[int, np.ndarray] = {}
    handle = record_codes(codes)
    try:
        with tiny_network():
            train(config, run, force=False)
    finally:
        handle.remove()
    folder = run.variant_dir(config.label)
    with open(folder / "results.csv", encoding="utf-8") as file:
        rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    yield Trained(folder, rows, codes, tf32_flags())


def test_flipped_counts_from_validation_to_validation_and_not_across_bits(trained: Trained) -> None:
    """The first epoch has no predecessor and the second has other bits; the third follows the second."""
    flipped = [row["health/flipped"] for row in trained.rows]
    expected = (trained.codes[3 * N_STEPS] != trained.codes[2 * N_STEPS]).mean()
    assert expected > 100 * CSV_ATOL  # else the test says nothing
    assert flipped == [0.0, 0.0, pytest.approx(expected, abs=CSV_ATOL)]


def test_oscillating_counts_changes_of_direction_in_the_last_steps(trained: Trained) -> None:
    for epoch in (2, 3):
        window = [trained.codes[epoch * N_STEPS - back] for back in range(N_WINDOW, -1, -1)]
        direction = np.zeros_like(window[0])
        oscillates = np.zeros(len(direction), bool)
        for before, after in pairwise(window):
            change = np.sign(after - before)
            oscillates |= change * direction < 0
            direction = np.where(change == 0, direction, change)
        assert oscillates.mean() > 10 * CSV_ATOL  # else the test says nothing
        assert trained.rows[epoch - 1]["health/oscillating"] == pytest.approx(oscillates.mean(), abs=CSV_ATOL)


def test_ema_differs_compares_the_codes_of_both(trained: Trained) -> None:
    raw, averaged = (codes_of(list(trained.weights(name).values())) for name in ("model", "ema"))
    assert np.array_equal(np.sort(raw), np.sort(trained.codes[3 * N_STEPS]))  # the same layers are looked at
    expected = (raw != averaged).mean()
    assert expected > 100 * CSV_ATOL
    assert trained.rows[-1]["health/ema_differs"] == pytest.approx(expected, abs=CSV_ATOL)


def extremes(values: list[float]) -> list[Any]:
    return [pytest.approx(f(values), rel=SUM_RTOL, abs=CSV_ATOL) for f in (min, statistics.median, max)]


def columns(row: dict[str, float], name: str) -> list[float]:
    return [row[f"health/{name}_{which}"] for which in ("min", "median", "max")]


def test_scale_ratio_is_raw_over_ema(trained: Trained) -> None:
    raw, averaged = trained.weights("model"), trained.weights("ema")
    ratios = [float((scale_of(raw[name]) / scale_of(averaged[name])).mean()) for name in raw]
    assert max(ratios) - min(ratios) > 1e-3
    assert columns(trained.rows[-1], "scale_ratio") == extremes(ratios)


def test_bn_ratio_is_reestimated_over_averaged(trained: Trained) -> None:
    before, after = trained.state("ema"), trained.state("scored")
    names = [name for name in before if name.endswith("running_var")]
    ratios = [float(np.exp(np.log(after[name].astype(float) / before[name]).mean())) for name in names]
    assert max(ratios) / min(ratios) > 1.5
    assert columns(trained.rows[-1], "bn_ratio") == extremes(ratios)


def decibels(weight: np.ndarray) -> float:
    exact = weight.astype(float)
    quantized = np.rint(weight / scale_of(weight)) * scale_of(weight)
    return 10 * math.log10((exact**2).sum() / ((exact - quantized) ** 2).sum())


def test_signal_to_noise_is_that_of_the_scored_weights(trained: Trained) -> None:
    noise = {name: decibels(weight) for name, weight in trained.weights("scored").items()}
    row = trained.rows[-1]
    assert row["health/snr_min_db"] == pytest.approx(min(noise.values()), rel=SUM_RTOL)
    assert row["health/snr_mean_db"] == pytest.approx(statistics.fmean(noise.values()), rel=SUM_RTOL)


def test_health_json_is_that_of_the_best_epoch(trained: Trained) -> None:
    """The first epoch has other bits and cannot be the best. Of equal ones the earlier is."""
    second, third = (row["AP/ema_bn"] for row in trained.rows[1:])
    record = read_json(trained.folder / "health.json", "train")
    best = load_checkpoint(trained.folder / "weights" / "best.pt")
    assert record["epoch"] == best["epoch"] + 1 == (3 if third > second else 2)
    assert record["snr_db"].keys() == trained.weights("scored").keys()
    for name, noise in record["snr_db"].items():
        weight = best["scored"][f"{name}.weight"].flatten(1).numpy()
        assert noise == pytest.approx(decibels(weight), rel=SUM_RTOL)


def test_training_leaves_tf32_as_torch_has_it(trained: Trained) -> None:
    """Products of matrices in full FP32; what convolutions outside autocast may do is PyTorch's own default."""
    assert trained.tf32 == (False, True, "highest")
