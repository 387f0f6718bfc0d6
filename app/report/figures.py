"""The figures of the report, each in a light and a dark version, and the Markdown that shows the fitting one.

Those about the quantized layers are in app/report/layer_figures.py, the photos in app/report/gallery.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from app.coco.dataset import COCO_2017
from app.coco.detail import Metrics
from app.core.curves import COLOURS, HATCHES, LINES, NEUTRAL, overlay_figure, palette
from app.core.files import write_atomic
from app.report.evidence import Evidence

INK = {"": ("#ffffff", "#1f2328"), "-dark": ("#0d1117", "#e6edf3")}  # suffix -> paper, ink: those of Git hosts
AUTHORS_MODEL = "yolov10m.yaml"
# The authors' log of it (500 epochs, batch 256, one2one head): epoch -> AP on COCO val2017.
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
    alt = re.sub(r"[*`]", "", text.partition(".")[0])
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
    models = {training.config["model"] for training in evidence.trainings.values()}
    reference = AUTHORS_YOLOV10M if whole and models == {AUTHORS_MODEL} else None
    variants = {label: training.history for label, training in evidence.trainings.items()}
    text = "**Loss and AP over the epochs**, validated as raw weights, as EMA, and as EMA with re-estimated BN."
    return [draw(figures_dir, "curves.png", text, lambda: overlay_figure(variants, reference))]


def is_whole_coco(provenance: dict[str, Any]) -> bool:
    has_subset = any(split["subset"] for split in provenance["splits"].values())
    return provenance["title"] == COCO_2017 and not has_subset


def by_size(group: list[Metrics], figures_dir: Path) -> str:
    """Grouped bars of AP over all, small, medium and large objects."""
    text = "**AP by object size.** Where it says none, the dataset has no such object."
    return draw(figures_dir, "sizes.png", text, lambda: size_figure(group))


def size_figure(group: list[Metrics]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    names = row_names(group)
    colours = palette(names)
    hatches = {name: HATCHES[i // len(COLOURS)] for i, name in enumerate(colours)}
    width, is_narrow = 0.8 / len(group), len(group) > MAX_BARS_UPRIGHT
    for i, (name, metrics) in enumerate(zip(names, group, strict=True)):
        places = np.arange(len(SIZES)) + (i - (len(group) - 1) / 2) * width
        aps = [metrics["coco"][size] for size in SIZES]
        heights = [ap or 0 for ap in aps]
        bars = axes.bar(places, heights, width * 0.92, color=colours[name], hatch=hatches[name], label=name)
        texts = ["none" if ap is None else f"{ap:.3f}" for ap in aps]
        axes.bar_label(bars, texts, padding=2, fontsize=8 if is_narrow else 9, rotation=90 if is_narrow else 0)
    axes.set_xticks(range(len(SIZES)), list(SIZES.values()))
    axes.set(ylabel="AP")
    axes.margins(y=0.25 if is_narrow else 0.12)
    return legend_below(figure)


def row_names(group: list[Metrics]) -> list[str]:
    """The labels; with the folder where rows share one."""
    labels = [metrics["model"]["label"] for metrics in group]
    names = []
    for label, metrics in zip(labels, group, strict=True):
        names.append(f"{label} ({metrics['dir']})" if labels.count(label) > 1 else label)
    return names


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
    variants = [facts["variants"][metrics["dir"]] for metrics in group]
    names = row_names(group)
    colours = palette(names)
    ious = list(variants[0]["precision"])
    for axes, iou in zip(figure.subplots(1, len(ious), sharey=True), ious, strict=True):
        for i, (name, variant) in enumerate(zip(names, variants, strict=True)):
            line = LINES[i % len(LINES)]
            axes.plot(facts["recalls"], variant["precision"][iou], ls=line, lw=2, color=colours[name], label=name)
        axes.set(xlabel="recall", title=f"IoU {iou}", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("precision")
    return legend_below(figure)


def by_class(metrics: Metrics, base: Metrics, facts: dict[str, Any], figures_dir: Path) -> str:
    """Sorted bars of the AP difference of every class between one row and the baseline."""
    name, base_name = metrics["model"]["label"], base["model"]["label"]
    old, new = (facts["variants"][row["dir"]]["ap_by_class"] for row in (base, metrics))
    detected = [category for category in old if old[category] or new[category]]
    text = (
        f"**AP by class, {name} minus {base_name}**, sorted: where the loss sits. "
        "Classes with few objects jump by chance."
    )
    if len(detected) < len(old):
        text += f" Left out: {len(old) - len(detected)} of {len(old)} classes, AP 0 in both."
    change = {category: new[category] - old[category] for category in detected}
    ordered = {category: change[category] for category in sorted(change, key=lambda name: (-change[name], name))}
    return draw(figures_dir, f"classes-{metrics['dir']}.png", text, lambda: class_figure(ordered, old, base_name))


def class_figure(change: dict[str, float], old: dict[str, float], base_name: str) -> Figure:
    """Bars of `change` (class -> difference of AP) from top to bottom; `old` has the APs that it is a change of."""
    n = len(change)
    figure = Figure(figsize=(10, 1.4 + 0.24 * n), layout="constrained")
    axes = figure.subplots()
    values = list(change.values())
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    bars = axes.barh(range(n), values, color=colours)
    axes.bar_label(bars, [f"{value:+.3f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(n), [f"{category} ({old[category]:.3f})" for category in change], fontsize=9)
    axes.set(xlabel=f"difference of AP (in brackets: AP of {base_name})", ylim=(n - 0.4, -0.6))
    axes.axvline(0, color=NEUTRAL, lw=1)
    axes.margins(x=0.15)
    return figure
