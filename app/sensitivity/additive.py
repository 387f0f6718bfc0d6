"""Whether single layers add up: sums of what they cost alone, beside what whole schemes cost on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.sensitivity.changes import RANDOM, Change, single
from app.sensitivity.measure import Measured, summary


@dataclass(frozen=True)
class Sum:
    """A whole scheme: what was measured, and the sums of its layers alone."""

    kind: str
    name: str
    measured: Measured
    loss_sum: float
    shift_sum: float


def sums_of(batches: list[dict[str, Any]], schemes: list[Change]) -> list[Sum]:
    """Sums and measurements of schemes, all on the images that have measured the schemes.

    A number of bits that no layer is measured at alone leaves its scheme out.
    """
    sums = []
    for scheme in schemes:
        same = [batch for batch in batches if scheme.name in batch["changes"]]
        names = [single(layer, bits) for layer, bits in scheme.bits.items()]
        if same and all(name in same[0]["changes"] for name in names):
            alone = [summary(same, name) for name in names]
            loss_sum, shift_sum = sum(layer.loss for layer in alone), sum(layer.shift for layer in alone)
            sums.append(Sum(scheme.kind, scheme.name, summary(same, scheme.name), loss_sum, shift_sum))
    return sums


def correlations(sums: list[Sum]) -> dict[str, float | None]:
    """Spearman's rank correlations over the schemes, of sums of single layers with measurements.

    Keys: 'loss' (of the sum of losses with the loss), 'shift' (of the sum of shifts with the shift), 'shift to loss'
    (of the sum of shifts with the loss, which is what a proposal relies on); with ', random' over the random schemes
    alone, which have nearly the same size, so that their number of bits does not rank them.
    """
    numbers: dict[str, float | None] = {}
    alike = [scheme for scheme in sums if scheme.kind == RANDOM]
    for ending, schemes in (("", sums), (", random", alike)):
        losses, shifts = [s.measured.loss for s in schemes], [s.measured.shift for s in schemes]
        loss_sums, shift_sums = [s.loss_sum for s in schemes], [s.shift_sum for s in schemes]
        numbers[f"loss{ending}"] = rank_correlation(loss_sums, losses)
        numbers[f"shift{ending}"] = rank_correlation(shift_sums, shifts)
        numbers[f"shift to loss{ending}"] = rank_correlation(shift_sums, losses)
    return numbers


def rank_correlation(left: list[float], right: list[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing theirs. None for fewer than three, or all equal."""
    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def ranks(values: list[float]) -> np.ndarray:
    """Ranks from 0; equal values have the mean of theirs."""
    array = np.array(values, float)
    below = (array[:, None] > array).sum(axis=1)
    equal = (array[:, None] == array).sum(axis=1)
    return below + (equal - 1) / 2
