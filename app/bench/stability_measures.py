"""Which number tells two arms of the stability bench apart? The candidates, how seeds scatter in each, and a picture.

AP over COCO's 80 classes on 300 images is mostly the noise of rare classes. A better measure has a smaller coefficient
of variation (standard deviation over mean) between the seeds of one arm.
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.bench.stability_rows import BASE, Row, base_of
from app.bench.stability_table import at, lowest_share, mean_of, paired, ratio_of_means, rows_by_arm, worst
from app.core.curves import COLOURS, NEUTRAL
from app.core.results import AP, AP_COMMONEST, AP_FREQUENT, FREQUENT_BOXES, SCORED
from app.report.spread import ENOUGH_RUNS, error_of_mean, ratio_and_residuals
from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
N_LAST = 5  # validations, 24 epochs: three horizons of the average
INCHES_WIDE, INCHES_AN_ARM, INCHES_OF_AXIS = 8, 0.55, 1.2
DOT_ALPHA = 0.6
N_HEIGHTS, STEP = 5, 0.08  # of the dots of an arm, whose lines are 1 apart


@dataclass(frozen=True)
class Measure:
    """A number of a training: the mean of a curve of the scored state over its last validations."""

    curve: str  # AP, AP_FREQUENT, AP_COMMONEST or val_loss
    n_last: int

    def __str__(self) -> str:
        return self.curve if self.n_last == 1 else f"{self.curve}, last {self.n_last}"

    def of(self, row: Row, epoch: int) -> float:
        """Its value at an epoch; NaN where the row has no such curve or too few validations."""
        curve = curve_of(row, self.curve)
        return math.nan if curve is None else at(row, curve, epoch, self.n_last)

    def among(self, rows: list[Row]) -> list[Row]:
        """The rows that have its curve."""
        return [row for row in rows if curve_of(row, self.curve) is not None]


CANDIDATES = [Measure(curve, n_last) for curve in (AP, AP_FREQUENT, AP_COMMONEST, "val_loss") for n_last in (1, N_LAST)]
MEASURE = Measure(AP_FREQUENT, N_LAST)  # what the question is answered with, see docs/results.md


def curve_of(row: Row, name: str) -> list[float] | None:
    """A curve of the scored state; None where the row has none of this name."""
    return row[AP][SCORED] if name == AP else row.get(name)


def show_measures(rows: list[Row]) -> None:
    """Logs a line for each candidate: how FP16's seeds scatter, and every arm as a share of FP16 of the same seeds."""
    by_arm = rows_by_arm(rows)
    fp16 = by_arm.get(BASE, [])
    if not fp16:
        return
    others = {arm: its_rows for arm, its_rows in by_arm.items() if arm != BASE}
    heads = [f"{arm} (n={len(its_rows)})" for arm, its_rows in others.items()]
    cells = [["measure", "fp16", "fp16, scatter of seeds", *heads]]
    for measure in CANDIDATES:
        shares = [share(measure, its_rows, by_arm.get(base_of(arm), [])) for arm, its_rows in others.items()]
        cells.append([str(measure), *scatter(measure, fp16), *shares])
    log.info("%s: mean AP of the classes with %d val objects or more", AP_FREQUENT, FREQUENT_BOXES)
    log.info("%s: AP of the class with the most val objects", AP_COMMONEST)
    for line in markdown_table(cells):
        log.info("%s", line)


def show_pairs(rows: list[Row]) -> None:
    """Logs every quantized arm as a share of every other, of the same seeds: whether two schemes differ."""
    by_arm = {arm: its_rows for arm, its_rows in rows_by_arm(rows).items() if not arm.startswith(BASE)}
    if len(by_arm) < 2:
        return
    cells = [[f"{MEASURE}, as a share of", *by_arm]]
    for arm, its_rows in by_arm.items():
        cells.append([arm, *(MISSING if other == arm else share(MEASURE, its_rows, by_arm[other]) for other in by_arm)])
    for line in markdown_table(cells):
        log.info("%s", line)


def scatter(measure: Measure, rows: list[Row]) -> tuple[str, str]:
    """Mean over the seeds that have it, and their coefficient of variation, at the last epoch that all these have."""
    rows = measure.among(rows)
    epoch = min((row["epoch"][-1] for row in rows), default=0)
    values = [measure.of(row, epoch) for row in rows]
    mean = statistics.fmean(values or [math.nan])
    if math.isnan(mean):
        return MISSING, MISSING
    varies = len(values) > 1 and mean
    return f"{mean:.4f}", f"{statistics.stdev(values) / mean:.1%}" if varies else MISSING


def share(measure: Measure, rows: list[Row], fp16: list[Row]) -> str:
    """The arm's mean over FP16's of the same seeds, with the standard error of that ratio, and how many seeds have this
    measure, where not all do."""
    values, bases = values_of(measure, rows, fp16)
    ratio = ratio_of_means(values, bases)
    is_partial = ratio != MISSING and len(values) < len(paired(rows, fp16).rows)
    return f"{ratio} (n={len(values)})" if is_partial else ratio


def values_of(measure: Measure, rows: list[Row], fp16: list[Row]) -> tuple[list[float], list[float]]:
    """The arm's values and FP16's of the same seeds, at the last epoch that all pairs with this measure have."""
    pairs = paired(measure.among(rows), measure.among(fp16))
    return [measure.of(row, pairs.epoch) for row in pairs.rows], [measure.of(row, pairs.epoch) for row in pairs.fp16]


def show_falls(rows: list[Row], min_share: float) -> None:
    """Logs for every arm whether AP, and AP_FREQUENT, stayed above `min_share` of their running best: the lowest share
    of the mean curve of all seeds, and how many single trainings fell below, whose AP jumps with the few images."""
    for arm, its_rows in rows_by_arm(rows).items():
        parts = []
        for measure in (Measure(AP, 1), Measure(AP_FREQUENT, 1)):
            if measure.among(its_rows):
                lowest, below = falls(measure, its_rows, min_share)
                parts.append(f"{measure} {lowest}, {below}")
        log.info("%s: lowest share of best, mean curve; trainings below %g: %s", arm, min_share, "; ".join(parts))


def falls(measure: Measure, rows: list[Row], min_share: float) -> tuple[str, str]:
    """The lowest share of the mean curve, and how many of how many trainings fell below `min_share`."""
    curves, shares = [], []
    for row in measure.among(rows):
        values = curve_of(row, measure.curve) or []
        curves.append(dict(zip(row["epoch"], values, strict=True)))
        shares.append(lowest_share(values))
    judged = [share for share in shares if share is not None]
    n_below = sum(share < min_share for share in judged)
    return worst([lowest_share(list(mean_of(curves).values()))]), f"{n_below} of {len(judged)}" if judged else MISSING


def draw_shares(rows: list[Row]) -> Figure | None:
    """A line an arm: the share of FP16's MEASURE of each seed as a dot, and the ratio of the means as a bar.

    None where no arm has a pair with this measure.
    """
    by_arm = rows_by_arm(rows)
    shown = {}
    for arm, its_rows in by_arm.items():
        values, bases = values_of(MEASURE, its_rows, [] if arm == BASE else by_arm.get(base_of(arm), []))
        if bases and not math.isnan(sum(values) + sum(bases)) and min(bases) > 0:
            shown[arm] = (values, bases)
    if not shown:
        return None
    figure = Figure(figsize=(INCHES_WIDE, INCHES_AN_ARM * len(shown) + INCHES_OF_AXIS), layout="constrained")
    panel = figure.subplots()
    panel.axvline(1, color=NEUTRAL, linewidth=1)
    for place, (values, bases) in enumerate(shown.values()):
        draw_arm(panel, place, values, bases)
    names = [f"{arm} (n={len(values)})" for arm, (values, _) in shown.items()]
    panel.set_yticks(range(len(shown)), names)
    panel.set_ylim(len(shown) - 0.5, -0.5)  # the first arm on top
    panel.set_xlabel(
        f"share of FP16 with the same seed: {MEASURE}\n(dots: seeds; bars: ratio of the means ± standard error)"
    )
    panel.grid(axis="x", alpha=0.3)
    return figure


def draw_arm(panel: Axes, place: int, values: list[float], bases: list[float]) -> None:
    """The line of an arm at a height: its seeds, moved up and down so that equal ones are told apart, and the ratio."""
    shares = [value / base for value, base in zip(values, bases, strict=True)]
    heights = [place + STEP * (number % N_HEIGHTS - N_HEIGHTS // 2) for number in range(len(shares))]
    panel.plot(shares, heights, "o", color=COLOURS[1], alpha=DOT_ALPHA, markersize=5)
    ratio, residuals = ratio_and_residuals(values, bases)
    panel.plot([ratio], [place], "|", color=COLOURS[0], markersize=22, markeredgewidth=2.5)
    if len(residuals) >= ENOUGH_RUNS:
        error = error_of_mean(residuals)
        panel.plot([ratio - error, ratio + error], [place] * 2, color=COLOURS[0], linewidth=2.5)
