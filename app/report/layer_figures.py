"""Figures about the quantized layers: bits and noise of each, and how codes and noise went over the epochs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.core.curves import NEUTRAL, palette
from app.core.labels import FP16, Label
from app.core.results import Rows
from app.report.evidence import Evidence
from app.report.figures import draw, legend_below
from app.report.tables import plain

MARKERS = ("o", "D", "^", "s", "v", "P")
SHARE, NOISE = "share of the weights", "SNR of quantization in dB"
# Title of a panel -> label of its axis, and its columns health/<name>, each with a line style. Their scales differ by
# more than a hundred, so each has a panel.
HEALTH_PANELS = {
    "flipped since the last validation": (SHARE, {"flipped": "-"}),
    "oscillating at the end of the epoch": (SHARE, {"oscillating": "-"}),
    "EMA code differs from the raw one": (SHARE, {"ema_differs": "-"}),
    "quantization noise": (NOISE, {"snr_mean_db": "-", "snr_min_db": ":"}),
}
NOISE_LINES = {"snr_mean_db": "mean of the layers", "snr_min_db": "worst layer"}
FLOAT = 10  # where layers without bits are drawn on the axis of bits


def layers(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Quantization SNR and bits of every layer, all variants on the same axes; where health.json has them."""
    measured = {label: quantized for label, quantized in evidence.quantized.items() if quantized["snr_db"]}
    # PTQ with re-estimated BatchNorm has the weights of PTQ without.
    variants = {label: quantized for label, quantized in measured.items() if not Label.parse(label).bn}
    if not variants:
        return []
    noisiest = [f"{plain(label)} {worst(quantized['snr_db'])}" for label, quantized in variants.items()]
    text = (
        "**Noise and bits by layer**, from the input to the heads: signal-to-noise ratio of the quantized weights at "
        "the best epoch (power of w over power of w - w_q, in dB), and the bits of each layer. Noisiest: "
        f"{'; '.join(noisiest)}."
    )
    return [draw(figures_dir, "layers.png", text, lambda: layer_figure(variants))]


def palette_of(variants: Iterable[str]) -> dict[str, str]:
    """Colours for quantized variants: the baseline has no quantized layers, and keeps its colour."""
    return palette([str(FP16), *variants])


def worst(snr_db: dict[str, float]) -> str:
    name = min(snr_db, key=lambda layer: snr_db[layer])
    return f"`{name}` with {snr_db[name]:.1f} dB"


def layer_figure(variants: dict[str, dict[str, Any]]) -> Figure:
    """Layers in the order of quant_config.json, which is the same for all variants of a model."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    noise, bits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
    colours = palette_of(variants)
    middle = (len(variants) - 1) / 2
    used = {4, 8}
    for i, (label, quantized) in enumerate(variants.items()):
        marker, colour = MARKERS[i % len(MARKERS)], colours[label]
        draw_noise(noise, quantized, marker, label, colour)
        levels = [FLOAT if layer["exempt"] else layer["bits"] for layer in quantized["layers"]]
        used.update(levels)
        shift = (i - middle) * 0.35  # variants of the same bits stay apart
        shifted = [level + shift for level in levels]
        bits.plot(range(len(shifted)), shifted, marker, ms=3, color=colour)
    noise.set_ylabel("SNR of quantization in dB")
    bits.set(ylabel="bits", xlabel="layer, by the number of its block", ylim=(min(used) - 1.5, FLOAT + 1.5))
    ticks = sorted(used - {FLOAT})
    bits.set_yticks([*ticks, FLOAT], [*map(str, ticks), "float"])
    for axes in (noise, bits):
        axes.grid(axis="y", alpha=0.3)
    first = next(iter(variants.values()))
    mark_blocks([layer["name"] for layer in first["layers"]], (noise, bits))
    return legend_below(figure)


def draw_noise(axes: Axes, quantized: dict[str, Any], marker: str, label: str, colour: str) -> None:
    """The SNR of the layers that have one, each at its place among all layers."""
    snr_db = quantized["snr_db"]
    names = [layer["name"] for layer in quantized["layers"]]
    measured = {place: snr_db[name] for place, name in enumerate(names) if name in snr_db}
    axes.plot(list(measured), list(measured.values()), marker, ms=4, alpha=0.85, color=colour, label=label)


def mark_blocks(names: list[str], panels: tuple[Axes, Axes]) -> None:
    """A line where a block of the network begins, and its number (model.<number>.) under its middle."""
    start, numbers, centres = 0, [], []
    for block, members in groupby(name.split(".")[1] for name in names):
        n_layers = len(list(members))
        numbers.append(block)
        centres.append(start + (n_layers - 1) / 2)
        if start > 0:
            for axes in panels:
                axes.axvline(start - 0.5, color=NEUTRAL, lw=0.5, alpha=0.5)
        start += n_layers
    panels[1].set_xticks(centres, numbers, fontsize=8)
    panels[1].set_xlim(-1, len(names))


def quantizer_health(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Shares of weights that flip and oscillate, and the quantization noise, over the epochs; where recorded."""
    variants = {}
    for label, training in evidence.trainings.items():
        if recorded := [row for row in training.history if "health/oscillating" in row]:
            variants[label] = recorded
    if not variants:
        return []
    text = (
        "**Codes and noise of the quantized weights over the epochs.** Each panel has a scale of its own: shares of "
        "all quantized weights, and the signal-to-noise ratio of quantization."
    )
    return [draw(figures_dir, "quantizer-health.png", text, lambda: health_figure(variants))]


def health_figure(variants: dict[str, Rows]) -> Figure:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (title, (label, lines)) in zip(figure.subplots(2, 2).flat, HEALTH_PANELS.items(), strict=True):
        draw_health(axes, lines, variants)
        axes.set(title=title, xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if label == SHARE:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            styles = [Line2D([], [], color=NEUTRAL, ls=line, label=NOISE_LINES[name]) for name, line in lines.items()]
            axes.legend(handles=styles, frameon=False)
    return legend_below(figure)


def draw_health(axes: Axes, lines: dict[str, str], variants: dict[str, Rows]) -> None:
    """`lines` maps columns health/<name> to their line styles; the colour tells the variant."""
    colours = palette_of(variants)
    for label, rows in variants.items():
        for name, line in lines.items():
            key = f"health/{name}"
            values = {row["epoch"]: row[key] for row in rows if key in row}
            legend_entry = label if line == "-" else None
            axes.plot(list(values), list(values.values()), line, marker=".", color=colours[label], label=legend_entry)
