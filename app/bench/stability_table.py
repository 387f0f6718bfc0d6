"""What the stability bench shows: a table of its arms, and their curves."""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.curves import AP_LABEL, COLOURS, NEUTRAL, STATES, candidates, read_rows
from app.tables import markdown_table

log = logging.getLogger(__name__)
BASE = "fp16"  # the arm that the others are compared with
N_SETTLE = 2  # validations before the running best counts: AP starts at zero
N_LAST = 3  # validations whose mean is steadier than the last one's AP
N_PAIRS = 2  # seeds whose spread says nothing yet


def read_arm(job: tuple[str, int], path: Path, until: int | None) -> dict[str, Any] | None:
    """What one training gave so far, or up to an epoch, from its results.csv; None before a validation that counts."""
    rows = candidates(read_rows(path)) if path.exists() else []
    rows = [row for row in rows if until is None or row["epoch"] <= until]
    if not rows:
        return None
    curves = {state: [row[f"AP/{state}"] for row in rows] for state in STATES}
    return {
        "arm": job[0], "seed": job[1], "epochs": int(rows[-1]["epoch"]),
        "epoch": [int(row["epoch"]) for row in rows], "AP": curves,
        "lowest_share_of_best": {state: lowest_share(curve) for state, curve in curves.items()},
        "val_loss": [row["val_loss/ema_bn"] for row in rows], "corrected": rows[-1].get("AP/corrected"),
    }  # fmt: skip


def lowest_share(aps: list[float]) -> float | None:
    """Smallest AP / best AP so far, after the first N_SETTLE validations; None while there are no more."""
    shares = [ap / max(aps[: i + 1]) for i, ap in enumerate(aps) if i >= N_SETTLE and max(aps[: i + 1]) > 0]
    return min(shares, default=None)


def show(rows: list[dict[str, Any]]) -> None:
    """One row an arm: means over its seeds, each with half their range; of FP16: with the standard error. The loss, of
    EMA+BN, differs less between seeds than AP does. The lowest share is that of the worst seed, whose AP also jumps
    with the few images it is measured on, and for EMA+BN also that of the mean curve of all seeds."""
    cells = [[
        "arm", "seeds", "epochs", "AP raw", "AP EMA", "AP EMA+BN", "of FP16", f"of FP16, last {N_LAST}", "val loss",
        "lowest share of best: raw", "EMA", "EMA+BN", "EMA+BN, mean curve", "best -> corrected",
    ]]  # fmt: skip
    by_arm = rows_by_arm(rows)
    for arm, of in by_arm.items():
        epochs = min(row["epochs"] for row in of)
        finals = [[at(row, row["AP"][state], epochs) for row in of] for state in STATES]
        losses = [at(row, row["val_loss"], epochs) for row in of]
        lows = [[row["lowest_share_of_best"][state] for row in of] for state in STATES]
        lows.append([lowest_share(list(mean_curve(of).values()))])
        cells.append([
            arm, str(len(of)), str(epochs), *map(spread, finals),
            *(share_of_fp16(of, by_arm.get(BASE, []), n) for n in (1, N_LAST)),
            spread(losses), *("-" if None in low else f"{min(low):.2f}" for low in lows), corrected(of),
        ])  # fmt: skip
    for line in markdown_table(cells):
        log.info("%s", line)


def mean_curve(of: list[dict[str, Any]], state: str = "ema_bn") -> dict[int, float]:
    """Epoch -> mean AP of the seeds, for every epoch that all have validated."""
    curves = [dict(zip(row["epoch"], row["AP"][state], strict=True)) for row in of]
    epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel an arm: mean AP of its seeds in the three states; FP16's scored one is grey behind each."""
    by_arm = rows_by_arm(rows)
    n_columns = math.ceil(math.sqrt(len(by_arm)))
    n_rows = -(-len(by_arm) // n_columns)
    size = (max(3.2 * n_columns, 8), 2.9 * n_rows + 0.5)  # the legend takes a line of eight inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (arm, of) in zip(panels, by_arm.items(), strict=False):
        if arm != BASE and BASE in by_arm:
            base = mean_curve(by_arm[BASE])
            panel.plot(list(base), list(base.values()), color=NEUTRAL, alpha=0.5, linewidth=4)
        for state, (style, width, _) in STATES.items():
            curve = mean_curve(of, state)
            panel.plot(list(curve), list(curve.values()), style, linewidth=width, color=COLOURS[arm != BASE])
        panel.set_title(f"{arm} (n={len(of)})", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    for panel in panels[len(by_arm) :]:
        panel.remove()
    figure.supylabel(AP_LABEL, fontsize=10)
    lines = [Line2D([], [], ls=style, lw=width, color=COLOURS[1], label=name) for style, width, name in STATES.values()]
    lines.append(Line2D([], [], lw=4, alpha=0.5, color=NEUTRAL, label="FP16, scored"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return figure


def rows_by_arm(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def corrected(of: list[dict[str, Any]]) -> str:
    """Mean AP of the best states before and after quant.correction_epochs; '-' until all have it."""
    after = [row["corrected"] for row in of]
    best = statistics.fmean(max(row["AP"]["ema_bn"]) for row in of)
    return "-" if None in after else f"{best:.4f} -> {statistics.fmean(after):.4f}"


def at(row: dict[str, Any], curve: list[float], epoch: int, n_last: int = 1) -> float:
    """Mean of a curve of `row` over the last `n_last` validations up to `epoch`; NaN where there are fewer."""
    values = [value for of_epoch, value in zip(row["epoch"], curve, strict=True) if of_epoch <= epoch]
    return statistics.fmean(values[-n_last:]) if len(values) >= n_last else math.nan


def spread(values: list[float]) -> str:
    """Mean, and half the range of several seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{half}"


def share_of_fp16(of: list[dict[str, Any]], fp16: list[dict[str, Any]], n_last: int) -> str:
    """Mean scored AP over FP16's, of the seeds and up to the last epoch that both have, with its standard error: that
    of the mean of what each seed is off that share of its FP16. Of N_PAIRS seeds or fewer that says nothing."""
    pairs = [(row, base) for row in of for base in fp16 if row["seed"] == base["seed"]]
    if not pairs:
        return "-"
    epoch = min(row["epochs"] for pair in pairs for row in pair)
    ours, base = ([at(row, row["AP"]["ema_bn"], epoch, n_last) for row in side] for side in zip(*pairs, strict=True))
    mean = statistics.fmean(base)
    if not mean or math.isnan(mean + sum(ours)):
        return "-"
    share = statistics.fmean(ours) / mean
    residuals = [a - share * b for a, b in zip(ours, base, strict=True)]
    error = f" ± {statistics.stdev(residuals) / math.sqrt(len(pairs)) / mean:.3f}" if len(pairs) > N_PAIRS else ""
    return f"{share:.3f}{error} at {epoch}"
