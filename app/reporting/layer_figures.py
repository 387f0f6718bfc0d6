"""Figures about the quantized layers: bits and noise of each, and how codes and noise went over the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.curves import NEUTRAL, Rows, palette
from app.reporting.evidence import Evidence
from app.reporting.figures import draw, legend_below
from app.tables import plain

MARKERS = ("o", "D", "^", "s", "v", "P")
BASELINE = "fp16"  # has no quantized layers, and keeps its colour
HEALTH_LINES = {
    "oscillating": "oscillating", "flipped": "flipped", "ema_differs": "EMA differs",
    "snr_mean_db": "mean of the layers", "snr_min_db": "worst layer",
}  # fmt: skip
FLOAT = 10  # where layers without bits are drawn on the axis of bits


def layers(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Quantization SNR and bits of every layer, all variants on the same axes; where health.json has them."""
    variants = {label: quantized for label, quantized in evidence.quantized.items() if quantized["snr_db"]}
    # PTQ with re-estimated BatchNorm has the weights of PTQ without.
    variants = {label: quantized for label, quantized in variants.items() if not label.endswith("-bn")}
    if not variants:
        return []
    told = "; ".join(f"{plain(label)} {worst(quantized['snr_db'])}" for label, quantized in variants.items())
    text = (
        "**Noise and bits by layer**, from the input to the heads: signal-to-noise ratio of the quantized weights at "
        f"the best epoch (power of w over power of w - w_q, in dB), and the bits of each layer. Noisiest: {told}."
    )
    return [draw(figures_dir, "layers.png", text, lambda: layer_figure(variants))]


def worst(snr_db: dict[str, float]) -> str:
    name = min(snr_db, key=lambda layer: snr_db[layer])
    return f"`{name}` with {snr_db[name]:.1f} dB"


def layer_figure(variants: dict[str, dict[str, Any]]) -> Figure:
    """Layers in the order of quant_config.json, which is the same for all variants of a model."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    noise, bits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
    colours = palette([BASELINE, *variants])
    for i, (label, quantized) in enumerate(variants.items()):
        names = [layer["name"] for layer in quantized["layers"]]
        measured = [
            (place, quantized["snr_db"][name]) for place, name in enumerate(names) if name in quantized["snr_db"]
        ]
        places, snr = zip(*measured, strict=True)
        noise.plot(places, snr, MARKERS[i % len(MARKERS)], ms=4, alpha=0.85, color=colours[label], label=label)
        shift = (i - (len(variants) - 1) / 2) * 0.35  # variants of the same bits stay apart
        levels = [(FLOAT if layer["exempt"] else layer["bits"]) + shift for layer in quantized["layers"]]
        bits.plot(range(len(names)), levels, MARKERS[i % len(MARKERS)], ms=3, color=colours[label])
    noise.set_ylabel("SNR of quantization in dB")
    bits.set(ylabel="bits", xlabel="layer, by the number of its block", ylim=(2.5, FLOAT + 1.5))
    bits.set_yticks([4, 8, FLOAT], ["4", "8", "float"])
    for axes in (noise, bits):
        axes.grid(axis="y", alpha=0.3)
    mark_blocks([layer["name"] for layer in next(iter(variants.values()))["layers"]], (noise, bits))
    return legend_below(figure)


def mark_blocks(names: list[str], panels: tuple[Axes, Axes]) -> None:
    """A line where a block of the network begins, and its number (model.<number>.) under its middle."""
    blocks = [name.split(".")[1] for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    ends = [*starts[1:], len(names)]
    for axes in panels:
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=NEUTRAL, lw=0.5, alpha=0.5)
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    panels[1].set_xticks(centres, [blocks[start] for start in starts], fontsize=8)
    panels[1].set_xlim(-1, len(names))


def quantizer_health(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Shares of weights that flip and oscillate, and the quantization noise, over the epochs; where recorded."""
    recorded = {
        label: [row for row in training.history if "health/oscillating" in row]
        for label, training in evidence.trainings.items()
    }
    variants = {label: rows for label, rows in recorded.items() if rows}
    if not variants:
        return []
    text = (
        "**Codes and noise of the quantized weights over the epochs.** Shares of all quantized weights: oscillating at "
        "the end of the epoch, flipped since the validation before, EMA code differs from the raw one; and the "
        "signal-to-noise ratio of quantization."
    )
    return [draw(figures_dir, "quantizer-health.png", text, lambda: health_figure(variants))]


def health_figure(variants: dict[str, Rows]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    shares, noise = figure.subplots(1, 2)
    panels = {
        shares: {"oscillating": "-", "flipped": "--", "ema_differs": ":"},
        noise: {"snr_mean_db": "-", "snr_min_db": ":"},
    }
    colours = palette([BASELINE, *variants])
    for axes, lines in panels.items():
        for label, rows in variants.items():
            for name, line in lines.items():
                known = [row for row in rows if f"health/{name}" in row]
                epochs, values = [row["epoch"] for row in known], [row[f"health/{name}"] for row in known]
                axes.plot(epochs, values, line, marker=".", color=colours[label], label=label if line == "-" else None)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        styles = [Line2D([], [], color=NEUTRAL, ls=line, label=HEALTH_LINES[name]) for name, line in lines.items()]
        axes.legend(handles=styles, frameon=False)
    shares.set_ylim(bottom=0)
    shares.set_ylabel("share of the quantized weights")
    noise.set_ylabel("SNR of quantization in dB")
    return legend_below(figure)
