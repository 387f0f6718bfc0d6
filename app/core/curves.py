"""Figures of a training: losses and APs over epochs, and the colours that all figures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.core.files import write_atomic
from app.core.labels import Label
from app.core.results import (
    AP,
    SCORED,
    VAL_LOSS,
    WARM_UP,
    Rows,
    column,
    is_validated,
    loss_curve,
    read_rows,
    train_loss,
    write_rows,
)


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: Matplotlib's line style, its width in points, and the name in the legend."""

    line: str
    width: float
    name: str


STYLES = {  # of the validated states; colour tells the variant
    "raw": Style(":", 1.2, "raw"),
    "ema": Style("--", 1.2, "EMA"),
    "ema_bn": Style("-", 2.0, "EMA + BN re-estimated (scored)"),
}
LOSS_STYLES = (Style("-", 1.5, "val, EMA + BN re-estimated"), Style(":", 1.5, "train"))
# Okabe & Ito's colours, told apart by colour-blind readers, without those that vanish on white or near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
NEUTRAL = "#808080"
LINES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # with the colours 24 curves that differ
HATCHES = ("", "//", "..", "xx")
AP_LABEL = "AP of the trainer's validator"
LOSS_LABEL = "loss (box + cls + dfl, both heads)"


def palette(labels: Iterable[str]) -> dict[str, str]:
    """A colour for every label, the same in all figures of a page: fp16, then QAT, then PTQ."""
    parsed = map(Label.parse, labels)
    ordered = sorted(parsed, key=lambda label: (label.method == "ptq", label.order))
    return dict(zip(map(str, ordered), cycle(COLOURS), strict=False))


def curve_figure(rows: Rows) -> Figure:
    """One training: train and validation loss on the left, AP of the three validated states on the right."""
    return overlay_figure({"": rows})


def overlay_figure(variants: dict[str, Rows], reference: dict[int, float] | None = None) -> Figure:
    """All variants (label -> rows) on the same axes: losses left, AP of the three validated states right.

    `reference` has epoch -> AP of a published training, drawn as far as the variants reach.
    """
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    for axes, label in ((loss_axes, LOSS_LABEL), (ap_axes, AP_LABEL)):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last_epoch = max(rows[-1]["epoch"] for rows in variants.values())
    marker = "o" if last_epoch == 1 else ""  # a line of one point shows nothing
    colours = palette(variants)
    for label, rows in variants.items():
        draw_losses(loss_axes, rows, colours[label], marker)
        draw_aps(ap_axes, rows, colours[label], marker)
        mark_warm_up((loss_axes, ap_axes), rows, colours[label])
    if reached := {epoch: ap for epoch, ap in (reference or {}).items() if epoch <= last_epoch}:
        ap_axes.plot(list(reached), list(reached.values()), "s-.", color=NEUTRAL, label="authors' YOLOv10m, 500 epochs")
    ap_axes.set_ylim(bottom=0)
    explain(figure, list(variants))
    return figure


def draw_losses(axes: Axes, rows: Rows, colour: str, marker: str) -> None:
    """The train loss of every epoch, dotted, and the validation loss of the scored state."""
    train_losses = list(map(train_loss, rows))
    axes.plot(values_of("epoch", rows), train_losses, ":", marker=marker, color=colour)
    validated = list(filter(is_validated, rows))
    val_losses = values_of(column(VAL_LOSS, SCORED), validated)
    axes.plot(values_of("epoch", validated), val_losses, marker=marker, color=colour)


def draw_aps(axes: Axes, rows: Rows, colour: str, marker: str) -> None:
    """The AP of every validated state."""
    validated = list(filter(is_validated, rows))
    epochs = values_of("epoch", validated)
    for state, style in STYLES.items():
        aps = values_of(column(AP, state), validated)
        axes.plot(epochs, aps, style.line, marker=marker, color=colour, linewidth=style.width)


def values_of(name: str, rows: Rows) -> list[float]:
    return [row[name] for row in rows]


def mark_warm_up(panels: tuple[Axes, Axes], rows: Rows, colour: str) -> None:
    """A line at the last validated epoch of the quant warm-up, where there was one."""
    epochs = [row["epoch"] for row in rows if row.get(WARM_UP)]
    for axes in panels if epochs else ():
        axes.axvline(max(epochs), color=colour, linewidth=0.8, label="last validation of the quant warm-up")


def explain(figure: Figure, labels: list[str]) -> None:
    """Legends under the axes: variants by colour, states by style; nothing is drawn over the lines."""
    colours = palette(labels)
    variants = [Line2D([], [], color=colours[label], linewidth=4, label=label) for label in filter(None, labels)]
    scored_first = reversed(STYLES.values())
    for axes, styles in zip(figure.axes, (LOSS_STYLES, scored_first), strict=True):
        lines: list[Artist] = []
        for style in styles:
            lines.append(Line2D([], [], color=NEUTRAL, ls=style.line, lw=style.width, label=style.name))
        lines += axes.get_legend_handles_labels()[0]
        n_rows = max(len(variants), len(lines))
        handles = filled(variants, n_rows) + filled(lines, n_rows)
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def filled(handles: Sequence[Artist], n_rows: int) -> list[Artist]:
    """One column of a legend, filled up with invisible entries, as Matplotlib fills column by column."""
    invisible = Line2D([], [], alpha=0, label=" ")
    return [*handles, *[invisible] * (n_rows - len(handles))]


def save_png(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=120))


def write_loss_curve(out_dir: Path) -> None:
    """loss_curve.csv and loss_curve.png from results.csv."""
    rows = read_rows(out_dir / "results.csv")
    write_rows(out_dir / "loss_curve.csv", loss_curve(rows))
    save_png(curve_figure(rows), out_dir / "loss_curve.png")
