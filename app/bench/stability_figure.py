"""The curves of the stability bench: a panel an arm."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.bench.stability_rows import BASE, Row, base_of
from app.bench.stability_table import mean_curve, paired, rows_by_arm
from app.core.curves import AP_LABEL, COLOURS, NEUTRAL, STYLES
from app.core.results import SCORED

FAINT = 0.35  # how much of a single seed's curve is seen
SEED_WIDTH, BASE_WIDTH, BASE_ALPHA = 0.8, 4, 0.5  # widths in points
PANEL_INCHES = (3.2, 2.9)
LEGEND_INCHES = (8, 0.5)  # the legend takes a line of eight inches


def draw(rows: list[Row]) -> Figure:
    """A panel an arm: mean AP of its seeds in the three states, thin behind it the scored one of each seed, and grey
    that of FP16 with the same seeds, or with all where it has none of them."""
    by_arm = rows_by_arm(rows)
    n_columns = math.ceil(math.sqrt(len(by_arm)))
    n_rows = math.ceil(len(by_arm) / n_columns)
    width = max(PANEL_INCHES[0] * n_columns, LEGEND_INCHES[0])
    height = PANEL_INCHES[1] * n_rows + LEGEND_INCHES[1]
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (arm, its_rows) in zip(panels, by_arm.items(), strict=False):
        base = base_of(arm)
        if arm != BASE and base in by_arm:
            draw_base(panel, its_rows, by_arm[base])
        draw_arm(panel, its_rows, COLOURS[not arm.startswith(BASE)])
        panel.set_title(f"{arm} (n={len(its_rows)})", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    for panel in panels[len(by_arm) :]:
        panel.remove()
    figure.supylabel(AP_LABEL, fontsize=10)
    lines = legend_lines()
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return figure


def draw_base(panel: Axes, rows: list[Row], fp16: list[Row]) -> None:
    """FP16's mean curve behind the panel of an arm that has `rows`."""
    base = mean_curve(paired(rows, fp16).fp16 or fp16)
    panel.plot(list(base), list(base.values()), color=NEUTRAL, alpha=BASE_ALPHA, linewidth=BASE_WIDTH)


def draw_arm(panel: Axes, rows: list[Row], colour: str) -> None:
    """The scored curve of each seed, where there are several, and the mean curves of the three states."""
    for row in rows if len(rows) > 1 else []:
        panel.plot(row["epoch"], row["AP"][SCORED], color=colour, alpha=FAINT, linewidth=SEED_WIDTH)
    for state, style in STYLES.items():
        curve = mean_curve(rows, state)
        panel.plot(list(curve), list(curve.values()), style.line, linewidth=style.width, color=colour)


def legend_lines() -> list[Line2D]:
    colour = COLOURS[1]
    lines = []
    for style in STYLES.values():
        lines.append(Line2D([], [], ls=style.line, lw=style.width, color=colour, label=style.name))
    lines.append(Line2D([], [], lw=SEED_WIDTH, alpha=FAINT, color=colour, label="scored, each seed"))
    lines.append(Line2D([], [], lw=BASE_WIDTH, alpha=BASE_ALPHA, color=NEUTRAL, label="FP16, same seeds"))
    return lines
