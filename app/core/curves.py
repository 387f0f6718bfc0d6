"""Curves of a training: rows of results.csv, and the figures drawn from them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.core.files import write_atomic
from app.core.results import WARM_UP, Rows, read_rows, train_loss, write_rows

# Validated states: column suffix -> line style, width, name. Colour tells the variant, style the state.
STATES = {"raw": (":", 1.2, "raw"), "ema": ("--", 1.2, "EMA"), "ema_bn": ("-", 2.0, "EMA + BN re-estimated (scored)")}
# Okabe & Ito's colours, told apart by colour-blind readers, without those that vanish on white or near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
NEUTRAL = "#808080"
LINES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # with the colours 24 curves that differ
HATCHES = ("", "//", "..", "xx")
AP_LABEL = "AP of the trainer's validator"
LOSS_LABEL = "loss (box + cls + dfl, both heads)"


def palette(labels: Iterable[str]) -> dict[str, str]:
    """A colour for every label, the same in all figures of a page: fp16, then QAT, then PTQ."""
    ordered = sorted(labels, key=lambda label: (not label.startswith("fp16"), not label.startswith("qat-"), label))
    return dict(zip(ordered, cycle(COLOURS), strict=False))


def curve_figure(rows: Rows) -> Figure:
    """One training: train and validation loss on the left, AP of the three validated states on the right."""
    return overlay_figure({"": rows})


def overlay_figure(variants: dict[str, Rows], reference: dict[int, float] | None = None) -> Figure:
    """All variants on the same axes: losses left, AP of the three validated states right.

    Args:
        variants: label -> rows; a label is written beside its colour.
        reference: epoch -> AP of a published training, drawn as far as the variants reach.
    """
    figure, loss_axes, ap_axes = two_axes()
    last_epoch = max(rows[-1]["epoch"] for rows in variants.values())
    marker = "o" if last_epoch == 1 else ""  # a line of one point shows nothing
    colours = palette(variants)
    for label, rows in variants.items():
        colour = colours[label]
        loss_axes.plot([row["epoch"] for row in rows], list(map(train_loss, rows)), ":", marker=marker, color=colour)
        validated = [row for row in rows if "AP/ema_bn" in row]
        epochs = [row["epoch"] for row in validated]
        loss_axes.plot(epochs, [row["val_loss/ema_bn"] for row in validated], marker=marker, color=colour)
        for state, (style, width, _) in STATES.items():
            aps = [row[f"AP/{state}"] for row in validated]
            ap_axes.plot(epochs, aps, style, marker=marker, color=colour, linewidth=width)
        if warm := [row["epoch"] for row in validated if row.get(WARM_UP)]:
            for axes in (loss_axes, ap_axes):
                axes.axvline(max(warm), color=colour, linewidth=0.8, label="last validation of the quant warm-up")
    known = {epoch: ap for epoch, ap in (reference or {}).items() if epoch <= last_epoch}
    if known:
        ap_axes.plot(list(known), list(known.values()), "s-.", color=NEUTRAL, label="authors' YOLOv10m, 500 epochs")
    ap_axes.set_ylim(bottom=0)
    explain(figure, list(variants))
    return figure


def explain(figure: Figure, labels: list[str]) -> None:
    """Legends under the axes: variants by colour, states by style; nothing is drawn over the lines."""
    colours = palette(labels)
    variants = [Line2D([], [], color=colours[name], linewidth=4, label=name) for name in labels if name]
    losses = [("-", 1.5, "val, EMA + BN re-estimated"), (":", 1.5, "train")]
    states = list(STATES.values())[::-1]
    for axes, styles in zip(figure.axes, (losses, states), strict=True):
        lines = [Line2D([], [], color=NEUTRAL, ls=style, lw=width, label=name) for style, width, name in styles]
        lines += axes.get_legend_handles_labels()[0]
        n_rows = max(len(variants), len(lines))
        columns = [side + [Line2D([], [], alpha=0, label=" ")] * (n_rows - len(side)) for side in (variants, lines)]
        handles = [handle for column in columns for handle in column]
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def two_axes() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    for axes, label in ((loss_axes, LOSS_LABEL), (ap_axes, AP_LABEL)):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, loss_axes, ap_axes


def save_png(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=120))


def write_loss_curve(out_dir: Path) -> None:
    """loss_curve.csv and loss_curve.png from results.csv."""
    rows = read_rows(out_dir / "results.csv")
    keep = ("epoch", "train/", "val/", "val_loss/", "AP/", "AP50/", WARM_UP)
    write_rows(out_dir / "loss_curve.csv", [{k: v for k, v in row.items() if k.startswith(keep)} for row in rows])
    save_png(curve_figure(rows), out_dir / "loss_curve.png")
