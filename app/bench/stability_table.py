"""What the stability bench shows: a table of its arms, and their curves."""

from __future__ import annotations

import logging
import math
import statistics

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.bench.stability_rows import Row, up_to
from app.core.curves import AP_LABEL, COLOURS, NEUTRAL, STYLES
from app.core.results import STATES
from app.report.tables import markdown_table

log = logging.getLogger(__name__)
BASE = "fp16"  # the arm that the others are compared with
N_SETTLE = 2  # validations before the running best counts: AP starts at zero
N_LAST = 3  # validations whose mean is steadier than the last one's AP
FAINT = 0.35  # how much of a single seed's curve is seen
N_PAIRS = 2  # seeds whose spread says nothing yet


def lowest_share(aps: list[float]) -> float | None:
    """Smallest AP / best AP so far, after the first N_SETTLE validations; None while there are no more."""
    shares = [ap / max(aps[: i + 1]) for i, ap in enumerate(aps) if i >= N_SETTLE and max(aps[: i + 1]) > 0]
    return min(shares, default=None)


def worst(shares: list[float | None]) -> str:
    """The smallest; "-" until every training has one."""
    known = [share for share in shares if share is not None]
    return f"{min(known):.2f}" if len(known) == len(shares) else "-"


def show(rows: list[Row]) -> None:
    """One row an arm: means over its seeds, with half their range; what is beside FP16, with the standard error.

    The validation loss, of EMA+BN, differs less between seeds than AP does; where it lies further above FP16's than the
    train loss does, what is scored is not what was trained. The lowest share is that of the worst seed, whose AP also
    jumps with the few images it is measured on, and for EMA+BN also that of the mean curve of all seeds.
    """
    cells = [[
        "arm", "seeds", "epochs", "AP raw", "AP EMA", "AP EMA+BN", "of FP16", f"of FP16, last {N_LAST}", "val loss",
        "over FP16's", "train loss over FP16's", "lowest share of best: raw", "EMA", "EMA+BN", "EMA+BN, mean curve",
        "best -> corrected",
    ]]  # fmt: skip
    by_arm = rows_by_arm(rows)
    fp16 = by_arm.get(BASE, [])
    for arm, whole in by_arm.items():
        epochs = min(row["epoch"][-1] for row in whole)
        of = [part for row in whole if (part := up_to(row, epochs))]
        finals = [[row["AP"][state][-1] for row in of] for state in STATES]
        lows = [[lowest_share(row["AP"][state]) for row in of] for state in STATES]
        lows.append([lowest_share(list(mean_curve(of).values()))])
        cells.append([
            arm, str(len(of)), str(epochs), *map(spread, finals),
            *(share_of_fp16(of, fp16, n) for n in (1, N_LAST)),
            spread([row["val_loss"][-1] for row in of]),
            *(loss_over_fp16(of, fp16, name) for name in ("val_loss", "train_loss")), *map(worst, lows), corrected(of),
        ])  # fmt: skip
    for line in markdown_table(cells):
        log.info("%s", line)


def mean_curve(of: list[Row], state: str = "ema_bn") -> dict[int, float]:
    """Epoch -> mean AP of the seeds, for every epoch that all have validated."""
    curves = [dict(zip(row["epoch"], row["AP"][state], strict=True)) for row in of]
    epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs}


def draw(rows: list[Row]) -> Figure:
    """A panel an arm: mean AP of its seeds in the three states, thin behind it the scored one of each seed, and grey
    that of FP16 with the same seeds, or with all where it has none of them."""
    by_arm = rows_by_arm(rows)
    n_columns = math.ceil(math.sqrt(len(by_arm)))
    n_rows = -(-len(by_arm) // n_columns)
    size = (max(3.2 * n_columns, 8), 2.9 * n_rows + 0.5)  # the legend takes a line of eight inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (arm, of) in zip(panels, by_arm.items(), strict=False):
        if arm != BASE and BASE in by_arm:
            base = mean_curve([row for row, _ in paired(by_arm[BASE], of)[0]] or by_arm[BASE])
            panel.plot(list(base), list(base.values()), color=NEUTRAL, alpha=0.5, linewidth=4)
        for row in of if len(of) > 1 else []:
            panel.plot(row["epoch"], row["AP"]["ema_bn"], color=COLOURS[arm != BASE], alpha=FAINT, linewidth=0.8)
        for state, style in STYLES.items():
            curve = mean_curve(of, state)
            panel.plot(list(curve), list(curve.values()), style.line, linewidth=style.width, color=COLOURS[arm != BASE])
        panel.set_title(f"{arm} (n={len(of)})", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    for panel in panels[len(by_arm) :]:
        panel.remove()
    figure.supylabel(AP_LABEL, fontsize=10)
    lines = [
        Line2D([], [], ls=style.line, lw=style.width, color=COLOURS[1], label=style.name) for style in STYLES.values()
    ]
    lines.append(Line2D([], [], lw=0.8, alpha=FAINT, color=COLOURS[1], label="scored, each seed"))
    lines.append(Line2D([], [], lw=4, alpha=0.5, color=NEUTRAL, label="FP16, same seeds"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return figure


def rows_by_arm(rows: list[Row]) -> dict[str, list[Row]]:
    return {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def corrected(of: list[Row]) -> str:
    """Mean AP of the best states before and after quant.correction_epochs; '-' until all have it."""
    after = [row["corrected"] for row in of]
    best = statistics.fmean(max(row["AP"]["ema_bn"]) for row in of)
    return "-" if None in after else f"{best:.4f} -> {statistics.fmean(after):.4f}"


def at(row: Row, curve: list[float], epoch: int, n_last: int = 1) -> float:
    """Mean of a curve of `row` over the last `n_last` validations up to `epoch`; NaN where there are fewer."""
    values = [value for of_epoch, value in zip(row["epoch"], curve, strict=True) if of_epoch <= epoch]
    return statistics.fmean(values[-n_last:]) if len(values) >= n_last else math.nan


def spread(values: list[float]) -> str:
    """Mean, and half the range of several seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{half}"


def paired(of: list[Row], fp16: list[Row]) -> tuple[list[tuple[Row, Row]], int]:
    """Each row with FP16's of the same seed, and the last epoch that all of these have (0 where there are none)."""
    pairs = [(row, base) for row in of for base in fp16 if row["seed"] == base["seed"]]
    return pairs, min((row["epoch"][-1] for pair in pairs for row in pair), default=0)


def share_of_fp16(of: list[Row], fp16: list[Row], n_last: int) -> str:
    """Mean scored AP over FP16's, of the seeds and up to the last epoch that both have, with its standard error: that
    of the mean of what each seed is off that share of its FP16."""
    pairs, epoch = paired(of, fp16)
    ours, base = ([at(pair[i], pair[i]["AP"]["ema_bn"], epoch, n_last) for pair in pairs] for i in (0, 1))
    if not sum(base) or math.isnan(sum(ours) + sum(base)):
        return "-"
    mean = statistics.fmean(base)
    share = statistics.fmean(ours) / mean
    error = standard_error([(a - share * b) / mean for a, b in zip(ours, base, strict=True)])
    return f"{share:.3f}{error} at {epoch}"


def loss_over_fp16(of: list[Row], fp16: list[Row], name: str) -> str:
    """Mean of a loss less FP16's of the same seed, with its standard error."""
    pairs, epoch = paired(of, fp16)
    over = [at(row, row[name], epoch) - at(base, base[name], epoch) for row, base in pairs]
    return "-" if not over or math.isnan(sum(over)) else f"{statistics.fmean(over):+.3f}{standard_error(over)}"


def standard_error(values: list[float]) -> str:
    """Of their mean, as " ± 0.012"; empty for N_PAIRS values or fewer, whose spread says nothing."""
    return f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > N_PAIRS else ""
