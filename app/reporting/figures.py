"""The figures of the report, each in a light and a dark version, and the Markdown that shows the fitting one.

Those about the quantized layers are in app/reporting/layer_figures.py, the photos in app/reporting/gallery.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from app.curves import COLOURS, HATCHES, LINES, NEUTRAL, overlay_figure, palette
from app.reporting.evidence import Evidence
from app.reporting.findings import Metrics
from app.run import write_atomic
from app.tables import plain

INK = {"": ("#ffffff", "#1f2328"), "-dark": ("#0d1117", "#e6edf3")}  # suffix -> paper, ink: those of Git hosts
# The authors' YOLOv10m log (500 epochs, batch 256, one2one head): epoch -> AP on COCO val2017.
AUTHORS_YOLOV10M = {
    10: 0.239, 20: 0.347, 50: 0.403, 100: 0.420, 200: 0.461, 300: 0.481, 400: 0.497, 500: 0.510
}  # fmt: skip
MAX_BARS_UPRIGHT = 4  # more bars in a group: their numbers stand on end, or they would overlap
SIZES = {"AP": "all", "AP_small": "small\n(< 32² px)", "AP_medium": "medium", "AP_large": "large\n(> 96² px)"}


def draw(figures_dir: Path, name: str, text: str, make: Callable[[], Figure]) -> str:
    """Saves the light picture and its dark twin; returns the Markdown block, with HTML that Git hosts keep.

    Args:
        figures_dir: folder for the files.
        name: of the file, .png or for photos .jpg.
        text: caption: what the picture shows.
        make: draws it; called once for each version.
    """
    for theme, (paper, ink) in INK.items():
        with matplotlib.rc_context(style(paper, ink)):
            save(make(), figures_dir / themed(name, theme))
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="figures/{themed(name, "-dark")}">'
    alt = re.sub(r"[*`]", "", text.partition(".")[0]).replace('"', "&quot;")
    return f'{text}\n\n<picture>{dark}<img src="figures/{name}" alt="{alt}"></picture>'


def themed(name: str, theme: str) -> str:
    return f"{Path(name).stem}{theme}{Path(name).suffix}"


def save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda part: figure.savefig(part, format=path.suffix[1:], dpi=120))


def style(paper: str, ink: str) -> dict[Any, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper, "grid.color": NEUTRAL,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, **dict.fromkeys(inks, ink),
    }  # fmt: skip


def curves(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Loss and AP over epochs of all variants, with the authors' curve where it is the same task."""
    if not evidence.trainings:
        return []
    whole = evidence.provenance is not None and is_whole_coco(evidence.provenance)
    same_model = all(t.config["model"] == "yolov10m.yaml" for t in evidence.trainings.values())
    reference = AUTHORS_YOLOV10M if whole and same_model else None
    variants = {label: training.history for label, training in evidence.trainings.items()}
    text = "**Loss and AP over the epochs**, validated as raw weights, as EMA, and as EMA with re-estimated BN."
    return [draw(figures_dir, "curves.png", text, lambda: overlay_figure(variants, reference))]


def is_whole_coco(provenance: dict[str, Any]) -> bool:
    return provenance["title"] == "COCO 2017" and all(
        split["n_images"] == split["n_listed"] for split in provenance["splits"].values()
    )


def by_size(group: list[Metrics], figures_dir: Path) -> str:
    """Grouped bars of AP over all, small, medium and large objects."""
    text = "**AP by object size.** Where it says none, the dataset has no such object."
    return draw(figures_dir, "sizes.png", text, lambda: size_figure(group))


def size_figure(group: list[Metrics]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    names = [row_name(m, group) for m in group]
    width, colours = 0.8 / len(group), palette(names)
    for i, (m, name) in enumerate(zip(group, names, strict=True)):
        places = np.arange(len(SIZES)) + (i - (len(group) - 1) / 2) * width
        values = [m["coco"][size] for size in SIZES]
        hatch = HATCHES[list(colours).index(name) // len(COLOURS)]
        drawn = [value or 0 for value in values]
        bars = axes.bar(places, drawn, width * 0.92, color=colours[name], hatch=hatch, label=name)
        texts = ["none" if value is None else f"{value:.3f}" for value in values]
        upright = len(group) <= MAX_BARS_UPRIGHT
        axes.bar_label(bars, texts, padding=2, fontsize=9 if upright else 8, rotation=0 if upright else 90)
    axes.set_xticks(range(len(SIZES)), list(SIZES.values()))
    axes.set(ylabel="AP")
    axes.margins(y=0.12 if len(group) <= MAX_BARS_UPRIGHT else 0.25)
    return legend_below(figure)


def row_name(m: Metrics, group: list[Metrics]) -> str:
    """The label; with the folder where two rows share it."""
    shared = sum(other["model"]["label"] == m["model"]["label"] for other in group) > 1
    return f"{m['model']['label']} ({m['dir']})" if shared else m["model"]["label"]


def legend_below(figure: Figure) -> Figure:
    axes = figure.axes[0]
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def precision_recall(group: list[Metrics], facts: dict[str, Any], figures_dir: Path) -> str:
    text = "**Precision over recall**, averaged over the classes (COCO's interpolation), at two IoU thresholds."
    return draw(figures_dir, "precision-recall.png", text, lambda: pr_figure(group, facts))


def pr_figure(group: list[Metrics], facts: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    first = facts["variants"][group[0]["dir"]]["precision"]
    names = [row_name(m, group) for m in group]
    colours = palette(names)
    for axes, iou in zip(figure.subplots(1, len(first), sharey=True), first, strict=True):
        for i, (m, name) in enumerate(zip(group, names, strict=True)):
            values, line = facts["variants"][m["dir"]]["precision"][iou], LINES[i % len(LINES)]
            axes.plot(facts["recalls"], values, ls=line, lw=2, color=colours[name], label=name)
        axes.set(xlabel="recall", title=f"IoU {iou}", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("precision")
    return legend_below(figure)


def by_class(m: Metrics, base: Metrics, facts: dict[str, Any], figures_dir: Path) -> str:
    """Sorted bars of the AP difference of every class between one row and the baseline."""
    name, base_name = m["model"]["label"], base["model"]["label"]
    old, new = (facts["variants"][row["dir"]]["ap_by_class"] for row in (base, m))
    found = [c for c in old if old[c] or new[c]]
    text = (
        f"**AP by class, {plain(name)} minus {plain(base_name)}**, sorted: where the loss sits. "
        "Classes with few objects jump by chance."
    )
    if len(found) < len(old):
        text += f" Left out: {len(old) - len(found)} of {len(old)} classes, AP 0 in both."
    change = sorted(((new[c] - old[c], c) for c in found), key=lambda pair: (-pair[0], pair[1]))
    return draw(figures_dir, f"classes-{m['dir']}.png", text, lambda: class_figure(change, old, base_name))


def class_figure(change: list[tuple[float, str]], old: dict[str, float], base_name: str) -> Figure:
    figure = Figure(figsize=(10, 1.4 + 0.24 * len(change)), layout="constrained")
    axes = figure.subplots()
    values = [value for value, _ in change]
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    bars = axes.barh(range(len(change)), values, color=colours)
    axes.bar_label(bars, [f"{value:+.3f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(change)), [f"{name} ({old[name]:.3f})" for _, name in change], fontsize=9)
    axes.set(xlabel=f"difference of AP (in brackets: AP of {base_name})", ylim=(len(change) - 0.4, -0.6))
    axes.axvline(0, color=NEUTRAL, lw=1)
    axes.margins(x=0.15)
    return figure
