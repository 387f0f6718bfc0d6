"""What seeds change: how large a difference of two APs says something, and ratios of means over paired seeds.

A difference has to be larger than that of trainings which differ in their seed alone: of AP and, once the bench's rows
hold it, of AP_FREQUENT, which differs less from seed to seed.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from app.core.environment import REPO_DIR
from app.core.files import read_json
from app.core.labels import Label
from app.core.results import AP, AP_FREQUENT, SCORED

SOURCE = "docs/stability.json"  # rows of the stability bench: a part of the repository, and of the image
ROWS = REPO_DIR / SOURCE
ARM = "fp16"
N_SIGMA = 2  # two standard deviations of many trainings: by chance about one comparison in twenty lies beyond
MAX_CHANCE = 0.05  # with which equals may be told apart: one comparison in twenty
N_ANGLES = 10_000  # steps of the integral in `chance_of`
MAX_T = 100.0
RULE = "2 x sqrt(2) x"  # the difference of two trainings has sqrt(2) times the deviation of one
TELLING_AP = 0.01  # below it an AP rests on a handful of boxes
ENOUGH_RUNS = 3  # or paired seeds: the spread of two says nothing yet


def seed_spread() -> dict[str, Any]:
    """What trainings of one recipe differ by, from the FP16 trainings of the stability bench.

    The scored AP of every seed at the last epoch that all seeds have validated.

    Returns:
        source; model, imgsz and epoch of the trainings; n of them, mean AP and its sample standard deviation sd;
        share: sd / mean; rule, and telling_share: what two single trainings differ by at most, to their AP;
        frequent: the same numbers of AP_FREQUENT, from the trainings that have it; None for fewer than ENOUGH_RUNS.
    """
    bench = read_json(ROWS, "bench ARGS=stability")
    aps, frequent = [], []
    for row in bench["rows"]:
        if row["arm"] == ARM:
            aps.append(dict(zip(row["epoch"], row[AP][SCORED], strict=True)))
            if row.get(AP_FREQUENT):
                frequent.append(dict(zip(row["epoch"], row[AP_FREQUENT], strict=True)))
    facts = {"source": SOURCE, "model": bench["config"]["model"], "imgsz": bench["config"]["train.imgsz"]}
    of_frequent = spread_of(frequent) if len(frequent) >= ENOUGH_RUNS else None
    return {**facts, **spread_of(aps), "rule": RULE, "frequent": of_frequent}


def spread_of(curves: list[dict[int, float]]) -> dict[str, Any]:
    """Numbers of `seed_spread` for curves of one AP by epoch."""
    epoch = max(set.intersection(*map(set, curves)))
    aps = [curve[epoch] for curve in curves]
    mean, sd = statistics.fmean(aps), statistics.stdev(aps)
    numbers = {"epoch": epoch, "n": len(aps), "mean": mean, "sd": sd, "share": sd / mean}
    return {**numbers, "telling_share": N_SIGMA * math.sqrt(2) * sd / mean}


def enter_tellings(row: dict[str, Any], base: dict[str, Any], seeds: dict[str, Any]) -> None:
    """Gives a row what its AP, and its AP_FREQUENT, must differ by from the baseline's; `seeds` is a seed_spread."""
    row["telling_difference"] = telling_of_single(row, base, seeds["telling_share"])
    frequent = seeds["frequent"]
    row["telling_frequent"] = frequent and telling_of_single(row, base, frequent["telling_share"], AP_FREQUENT)


def telling_of_single(row: dict[str, Any], base: dict[str, Any], share: float, ap: str = AP) -> float | None:
    """What the AP of one training must differ by from that of another, the baseline; None where nothing can be said.

    PTQ has the weights of the baseline's own training: what seeds differ by is not what it differs by.
    """
    is_trained = Label.parse(row["label"]).method == "qat"
    is_known = row[f"{ap}_difference"] is not None and base[ap] >= TELLING_AP
    return share * base[ap] if is_trained and is_known else None


def telling_of_means(over_runs: dict[str, Any]) -> float | None:
    """What chance makes a mean of differences exceed in MAX_CHANCE of cases, by Student's t; None for too few runs."""
    n, sd = over_runs["n"], over_runs["sd"]
    return telling_t(n - 1) * sd / math.sqrt(n) if n >= ENOUGH_RUNS else None


@cache
def telling_t(freedom: int) -> float:
    """The standard errors beyond which a mean of pure noise lies in MAX_CHANCE of cases: 4.30 for three values."""
    low, high = 0.0, MAX_T
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if chance_of(middle, 1.0, freedom) > MAX_CHANCE else (low, middle)
    return high


def chance_of(mean: float, error: float, freedom: int) -> float:
    """How often a mean of pure noise is as far from 0: two-sided, by Student's t with so many degrees of freedom.

    The angle atan(t / sqrt(freedom)) has the density cos^(freedom - 1), which is summed here: no package in the list
    has the distribution.
    """
    angles = (np.arange(N_ANGLES) + 0.5) * (np.pi / 2 / N_ANGLES)
    density = np.cos(angles) ** (freedom - 1)
    beyond = angles > np.arctan2(abs(mean), error * np.sqrt(freedom))
    return float(density[beyond].sum() / density.sum())


@dataclass(frozen=True)
class Ratio:
    """Mean over mean; `error` is its standard error, None for fewer than ENOUGH_RUNS pairs."""

    value: float
    error: float | None


def ratio_of_pairs(values: list[float], bases: list[float]) -> Ratio | None:
    """mean(values) / mean(bases), with its standard error (delta method); None where there is no such ratio: no pair,
    bases whose mean is 0, or a NaN."""
    if not sum(bases) or math.isnan(sum(values) + sum(bases)):
        return None
    ratio, residuals = ratio_and_residuals(values, bases)
    return Ratio(ratio, error_of_mean(residuals) if len(residuals) >= ENOUGH_RUNS else None)


def ratio_and_residuals(values: list[float], bases: list[float]) -> tuple[float, list[float]]:
    """Ratio of the means of paired values, and how far each pair is off it, as a share of the bases' mean: the standard
    error of the mean of these is that of the ratio (delta method)."""
    mean_base = statistics.fmean(bases)
    ratio = statistics.fmean(values) / mean_base
    return ratio, [(value - ratio * base) / mean_base for value, base in zip(values, bases, strict=True)]


def error_of_mean(values: list[float]) -> float:
    """Standard error of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))
