"""Curves of a training: rows of results.csv, and the figures drawn from them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app.run import write_atomic, write_text

# Validated states: column suffix -> line style and name. Colour-blind readers tell them by style.
STATES = {"raw": (":", "raw"), "ema": ("--", "EMA"), "ema_bn": ("-", "EMA + BN re-estimated")}
AP_LABEL = "AP of the trainer's validator"
LOSS_LABEL = "loss (box + cls + dfl, both heads)"


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Rows of equal keys as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, float]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def train_loss(row: dict[str, float]) -> float:
    """Sum of the running means of an epoch's loss terms."""
    return sum(value for name, value in row.items() if name.startswith("train/"))


def curve_figure(rows: list[dict[str, float]]) -> Figure:
    """One training: train and validation loss on the left, AP of the three validated states on the right."""
    epochs = [row["epoch"] for row in rows]
    figure, loss_axes, ap_axes = two_axes()
    loss_axes.plot(epochs, [train_loss(row) for row in rows], label="train")
    loss_axes.plot(epochs, [row["val_loss/ema_bn"] for row in rows], "--", label="val, EMA + BN re-estimated")
    for state, (style, name) in STATES.items():
        ap_axes.plot(epochs, [row[f"AP/{state}"] for row in rows], style, label=name)
    return finish(figure)


def overlay_figure(variants: dict[str, list[dict[str, float]]]) -> Figure:
    """All variants of a run on the same axes: losses left, AP of the scored state right."""
    figure, loss_axes, ap_axes = two_axes()
    for label, rows in variants.items():
        epochs = [row["epoch"] for row in rows]
        (line,) = loss_axes.plot(epochs, [train_loss(row) for row in rows], label=f"{label} train")
        val = [row["val_loss/ema_bn"] for row in rows]
        loss_axes.plot(epochs, val, "--", color=line.get_color(), label=f"{label} val")
        ap_axes.plot(epochs, [row["AP/ema_bn"] for row in rows], color=line.get_color(), label=f"{label} EMA + BN")
        ap_axes.plot(epochs, [row["AP/raw"] for row in rows], ":", color=line.get_color(), label=f"{label} raw")
    return finish(figure)


def two_axes() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    loss_axes.set(xlabel="epoch", ylabel=LOSS_LABEL)
    ap_axes.set(xlabel="epoch", ylabel=AP_LABEL)
    return figure, loss_axes, ap_axes


def finish(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=120))


def write_loss_curve(out_dir: Path) -> None:
    """loss_curve.csv and loss_curve.png from results.csv."""
    rows = read_rows(out_dir / "results.csv")
    keep = ("epoch", "train/", "val/", "val_loss/", "AP/", "AP50/")
    write_rows(out_dir / "loss_curve.csv", [{k: v for k, v in row.items() if k.startswith(keep)} for row in rows])
    save_png(curve_figure(rows), out_dir / "loss_curve.png")
