"""The ratio of two means over paired seeds, with its standard error: how models of several seeds are compared."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

N_PAIRS = 2  # so many seeds have a spread that says nothing yet


@dataclass(frozen=True)
class Ratio:
    """Mean over mean; `error` is its standard error, None for N_PAIRS pairs or fewer."""

    value: float
    error: float | None


def ratio_of_pairs(values: list[float], bases: list[float]) -> Ratio | None:
    """mean(values) / mean(bases), with its standard error (delta method); None where there is no such ratio: no pair,
    bases whose mean is 0, or a NaN."""
    if not sum(bases) or math.isnan(sum(values) + sum(bases)):
        return None
    ratio, residuals = ratio_and_residuals(values, bases)
    return Ratio(ratio, error_of_mean(residuals) if len(residuals) > N_PAIRS else None)


def ratio_and_residuals(values: list[float], bases: list[float]) -> tuple[float, list[float]]:
    """Ratio of the means of paired values, and how far each pair is off it, as a share of the bases' mean: the standard
    error of the mean of these is that of the ratio (delta method)."""
    mean_base = statistics.fmean(bases)
    ratio = statistics.fmean(values) / mean_base
    return ratio, [(value - ratio * base) / mean_base for value, base in zip(values, bases, strict=True)]


def error_of_mean(values: list[float]) -> float:
    """Standard error of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))
