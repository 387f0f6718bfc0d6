"""Which number tells two arms of the stability bench apart? The candidates, how seeds scatter in each, and a picture.

AP over COCO's 80 classes on 300 images is mostly the noise of rare classes. A better measure has a smaller coefficient
of variation (standard deviation over mean) between the seeds of one arm.
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass

from matplotlib.figure import Figure

from app.bench.stability_rows import BASE, Row, base_of
from app.bench.stability_table import at, paired, ratio_of_means, rows_by_arm
from app.core.curves import COLOURS, NEUTRAL
from app.core.results import AP, AP_COMMONEST, AP_FREQUENT, FREQUENT_BOXES, SCORED
from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
N_LAST = 5  # validations, 24 epochs: three horizons of the average
INCHES_WIDE, INCHES_AN_ARM, INCHES_OF_AXIS = 8, 0.55, 1.2
DOT_ALPHA = 0.6


@dataclass(frozen=True)
class Measure:
    """A number of a training: the mean of a curve of the scored state over its last validations."""

    curve: str  # AP, AP_FREQUENT, AP_COMMONEST or val_loss
    n_last: int

    def __str__(self) -> str:
        return self.curve if self.n_last == 1 else f"{self.curve}, last {self.n_last}"

    def of(self, row: Row, epoch: int) -> float:
        """Its value at an epoch; NaN where the row has no such curve or too few validations."""
        curve = row[AP][SCORED] if self.curve == AP else row.get(self.curve)
        return math.nan if curve is None else at(row, curve, epoch, self.n_last)


CANDIDATES = [Measure(curve, n_last) for curve in (AP, AP_FREQUENT, AP_COMMONEST, "val_loss") for n_last in (1, N_LAST)]
MEASURE = Measure(AP_FREQUENT, N_LAST)  # what the question is answered with, see docs/results.md


def show_measures(rows: list[Row]) -> None:
    """Logs a line for each candidate: how FP16's seeds scatter, and every arm as a share of FP16 of the same seeds."""
    by_arm = rows_by_arm(rows)
    fp16 = by_arm.get(BASE, [])
    if not fp16:
        return
    others = {arm: its_rows for arm, its_rows in by_arm.items() if arm != BASE}
    cells = [["measure", "fp16", "fp16, scatter of seeds", *(f"{arm} (n={len(its)})" for arm, its in others.items())]]
    for measure in CANDIDATES:
        shares = [share(measure, its_rows, by_arm.get(base_of(arm), [])) for arm, its_rows in others.items()]
        cells.append([str(measure), *scatter(measure, fp16), *shares])
    log.info("%s: mean AP of the classes with %d val objects or more", AP_FREQUENT, FREQUENT_BOXES)
    log.info("%s: AP of the class with the most val objects", AP_COMMONEST)
    for line in markdown_table(cells):
        log.info("%s", line)


def scatter(measure: Measure, rows: list[Row]) -> tuple[str, str]:
    """Mean over the seeds, and their coefficient of variation, at the last epoch that all have."""
    epoch = min(row["epoch"][-1] for row in rows)
    values = [measure.of(row, epoch) for row in rows]
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return MISSING, MISSING
    varies = len(values) > 1 and mean
    return f"{mean:.4f}", f"{statistics.stdev(values) / mean:.1%}" if varies else MISSING


def share(measure: Measure, rows: list[Row], fp16: list[Row]) -> str:
    """The arm's mean over FP16's of the same seeds, with the standard error of that ratio."""
    return ratio_of_means(*values_of(measure, rows, fp16))


def values_of(measure: Measure, rows: list[Row], fp16: list[Row]) -> tuple[list[float], list[float]]:
    """The arm's values and FP16's of the same seeds, at the last epoch that all pairs have."""
    pairs = paired(rows, fp16)
    return [measure.of(row, pairs.epoch) for row in pairs.rows], [measure.of(row, pairs.epoch) for row in pairs.fp16]


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
        shares = [value / base for value, base in zip(values, bases, strict=True)]
        panel.plot(shares, [place] * len(shares), "o", color=COLOURS[1], alpha=DOT_ALPHA, markersize=5)
        mean = statistics.fmean(values) / statistics.fmean(bases)
        panel.plot([mean], [place], "|", color=COLOURS[0], markersize=22, markeredgewidth=2.5)
    names = [f"{arm} (n={len(values)})" for arm, (values, _) in shown.items()]
    panel.set_yticks(range(len(shown)), names)
    panel.invert_yaxis()
    panel.set_xlabel(f"share of FP16 with the same seed: {MEASURE}\n(dots: seeds; bars: ratio of the means)")
    panel.grid(axis="x", alpha=0.3)
    return figure
