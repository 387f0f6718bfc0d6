"""The table of the stability bench: a row an arm, beside FP16 with the same seeds."""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass

from app.bench.stability_rows import Row, all_up_to, base_of
from app.core.results import SCORED, STATES
from app.report.spread import ENOUGH_RUNS, error_of_mean, ratio_of_pairs
from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
N_SETTLE = 2  # validations before the running best counts: AP starts at zero
N_LAST = 3  # validations whose mean is steadier than the last one's AP
HEADS = [
    "arm", "seeds", "epochs", "AP raw", "AP EMA", "AP EMA+BN", "of FP16", f"of FP16, last {N_LAST}", "val loss",
    "over FP16's", "train loss over FP16's", "lowest share of best: raw", "EMA", "EMA+BN", "EMA+BN, mean curve",
    "best -> corrected",
]  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Rows of an arm and, at the same places, FP16's rows of the same seeds.

    `epoch` is the last one that all of them have; 0 where there is no pair.
    """

    rows: list[Row]
    fp16: list[Row]
    epoch: int


def show(rows: list[Row]) -> None:
    """Logs the table of all arms."""
    by_arm = rows_by_arm(rows)
    cells = [HEADS]
    for arm, its_rows in by_arm.items():
        cells.append(arm_cells(arm, its_rows, by_arm.get(base_of(arm), [])))
    for line in markdown_table(cells):
        log.info("%s", line)


def arm_cells(arm: str, whole: list[Row], fp16: list[Row]) -> list[str]:
    """An arm: means over its seeds, with half their range; what is beside FP16, with the standard error.

    All seeds count up to the last epoch that all of them have reached. The validation loss, of EMA+BN, differs less
    between seeds than AP does; where it lies further above FP16's than the train loss does, the scored model is not
    the trained one. The lowest share is that of the worst seed, whose AP also jumps with the few images it is measured
    on, and for EMA+BN also that of the mean curve of all seeds.
    """
    epochs = min(row["epoch"][-1] for row in whole)
    rows = all_up_to(whole, epochs)
    final_aps, lowest_shares = [], []
    for state in STATES:
        curves = [row["AP"][state] for row in rows]
        final_aps.append(spread([curve[-1] for curve in curves]))
        lowest_shares.append(worst(list(map(lowest_share, curves))))
    of_mean_curve = lowest_share(list(mean_curve(rows).values()))
    return [
        arm,
        str(len(rows)),
        str(epochs),
        *final_aps,
        share_of_fp16(rows, fp16, 1),
        share_of_fp16(rows, fp16, N_LAST),
        spread([row["val_loss"][-1] for row in rows]),
        loss_over_fp16(rows, fp16, "val_loss"),
        loss_over_fp16(rows, fp16, "train_loss"),
        *lowest_shares,
        worst([of_mean_curve]),
        corrected(rows),
    ]


def rows_by_arm(rows: list[Row]) -> dict[str, list[Row]]:
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    return by_arm


def lowest_share(aps: list[float]) -> float | None:
    """Smallest AP / best AP so far, after the first N_SETTLE validations; None while there are no more."""
    best, shares = 0.0, []
    for n_before, ap in enumerate(aps):
        best = max(best, ap)
        if n_before >= N_SETTLE and best > 0:
            shares.append(ap / best)
    return min(shares, default=None)


def worst(shares: list[float | None]) -> str:
    """The smallest; MISSING until every training has one."""
    smallest = math.inf
    for share in shares:
        if share is None:
            return MISSING
        smallest = min(smallest, share)
    return f"{smallest:.2f}"


def mean_curve(rows: list[Row], state: str = SCORED) -> dict[int, float]:
    """Epoch -> mean AP of the seeds, for every epoch that all have validated."""
    return mean_of([dict(zip(row["epoch"], row["AP"][state], strict=True)) for row in rows])


def mean_of(curves: list[dict[int, float]]) -> dict[int, float]:
    """The mean of curves, by epoch, at every epoch that all have."""
    by_epoch: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, ap in curve.items():
            by_epoch.setdefault(epoch, []).append(ap)
    return {epoch: statistics.fmean(aps) for epoch, aps in by_epoch.items() if len(aps) == len(curves)}


def corrected(rows: list[Row]) -> str:
    """Mean AP of the best states before and after quant.correction_epochs; MISSING until all have it."""
    after = [row["corrected"] for row in rows]
    if None in after:
        return MISSING
    best = statistics.fmean(max(row["AP"][SCORED]) for row in rows)
    return f"{best:.4f} -> {statistics.fmean(after):.4f}"


def at(row: Row, curve: list[float], epoch: int, n_last: int = 1) -> float:
    """Mean of a curve of `row` over the last `n_last` validations up to `epoch`; NaN where there are fewer."""
    values = [value for validated, value in zip(row["epoch"], curve, strict=True) if validated <= epoch]
    return statistics.fmean(values[-n_last:]) if len(values) >= n_last else math.nan


def spread(values: list[float]) -> str:
    """Mean, and half the range of several seeds."""
    mean = f"{statistics.fmean(values):.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def paired(rows: list[Row], fp16: list[Row]) -> Pairs:
    """The rows whose seed FP16 has too, with FP16's."""
    fp16_of = {row["seed"]: row for row in fp16}
    kept, bases, last_epochs = [], [], []
    for row in rows:
        base = fp16_of.get(row["seed"])
        if base is not None:
            kept.append(row)
            bases.append(base)
            last_epochs += [row["epoch"][-1], base["epoch"][-1]]
    return Pairs(kept, bases, min(last_epochs, default=0))


def share_of_fp16(rows: list[Row], fp16: list[Row], n_last: int) -> str:
    """Ratio of the mean scored APs of the paired seeds, with its standard error (delta method), and the epoch.

    Both APs are means over the last `n_last` validations up to the last epoch that all pairs have.
    """
    pairs = paired(rows, fp16)
    aps, base_aps = [], []
    for row, base in zip(pairs.rows, pairs.fp16, strict=True):
        aps.append(at(row, row["AP"][SCORED], pairs.epoch, n_last))
        base_aps.append(at(base, base["AP"][SCORED], pairs.epoch, n_last))
    share = ratio_of_means(aps, base_aps)
    return share if share == MISSING else f"{share} at {pairs.epoch}"


def ratio_of_means(values: list[float], bases: list[float]) -> str:
    """Ratio of the means of paired values, with its standard error (delta method); MISSING where one is NaN."""
    ratio = ratio_of_pairs(values, bases)
    return MISSING if ratio is None else f"{ratio.value:.3f}{error_text(ratio.error)}"


def loss_over_fp16(rows: list[Row], fp16: list[Row], name: str) -> str:
    """Mean of a loss less FP16's of the same seed, with its standard error."""
    pairs = paired(rows, fp16)
    over = []
    for row, base in zip(pairs.rows, pairs.fp16, strict=True):
        over.append(at(row, row[name], pairs.epoch) - at(base, base[name], pairs.epoch))
    if not over or math.isnan(sum(over)):
        return MISSING
    return f"{statistics.fmean(over):+.3f}{standard_error(over)}"


def standard_error(values: list[float]) -> str:
    """Standard error of the mean, as " ± 0.012"; empty for fewer than ENOUGH_RUNS values."""
    return error_text(error_of_mean(values) if len(values) >= ENOUGH_RUNS else None)


def error_text(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"
