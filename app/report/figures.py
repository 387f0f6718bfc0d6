"""The figures of the report, each in a light and a dark version, and the Markdown that shows the fitting one.

Those about the quantized layers are in app/report/layer_figures.py, the photos in app/report/gallery.py.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
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
from app.report.evidence import Evidence, name_of
from app.report.html import picture
from app.report.tables import plain

INK = {"": ("#ffffff", "#1f2328"), "-dark": ("#0d1117", "#e6edf3")}  # suffix -> paper, ink: those of Git hosts
PAPER_KEYS = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
INK_KEYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
AUTHORS_MODEL = "yolov10m.yaml"
# The authors' log of it (500 epochs, batch 256, one2one head): epoch -> AP on COCO val2017.
AUTHORS_YOLOV10M = {
    10: 0.239, 20: 0.347, 50: 0.403, 100: 0.420, 200: 0.461, 300: 0.481, 400: 0.497, 500: 0.510
}  # fmt: skip
MAX_BARS = 16  # in a group of a picture: more are too thin for their numbers
MAX_BARS_UPRIGHT = 4  # more bars in a group: their numbers stand on end, or they would overlap
SIZES = {"AP": "all", "AP_small": "small\n(< 32² px)", "AP_medium": "medium", "AP_large": "large\n(> 96² px)"}


def draw(figures_dir: Path, name: str, text: str, make: Callable[[], Figure]) -> str:
    """Saves the light picture and its dark twin; returns the Markdown block, with HTML that Git hosts keep.

    `name` is that of the file, .png or for photos .jpg; `text` is the caption; `make` is called once for each version.
    """
    name = re.sub(r"[^\w.-]", "_", name)  # it has the name of a folder, which may be anything
    for theme, (paper, ink) in INK.items():
        with matplotlib.rc_context(style(paper, ink)):
            save(make(), figures_dir / themed(name, theme))
    return f"{text}\n\n{picture(name, themed(name, '-dark'), text)}"


def themed(name: str, theme: str) -> str:
    return f"{Path(name).stem}{theme}{Path(name).suffix}"


def save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():  # names of classes in scripts that the font lacks: the tables have them too
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        write_atomic(path, lambda part: figure.savefig(part, format=path.suffix[1:], dpi=120))


def style(paper: str, ink: str) -> dict[Any, Any]:
    return {
        **dict.fromkeys(PAPER_KEYS, paper),
        **dict.fromkeys(INK_KEYS, ink),
        "grid.color": NEUTRAL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }


def curves(evidence: Evidence, figures_dir: Path) -> list[str]:
    """Loss and AP over epochs of all variants, with the authors' curve where it is the same task."""
    if not evidence.trainings:
        return []
    variants = {label: training.history for label, training in evidence.trainings.items()}
    models = {training.config["model"] for training in evidence.trainings.values()}
    is_whole = evidence.provenance is not None and is_whole_coco(evidence.provenance)
    reference = AUTHORS_YOLOV10M if is_whole and models == {AUTHORS_MODEL} else None
    text = "**Loss and AP over the epochs**, validated as raw weights, as EMA, and as EMA with re-estimated BN."
    return [draw(figures_dir, "curves.png", text, lambda: overlay_figure(variants, reference))]


def is_whole_coco(provenance: dict[str, Any]) -> bool:
    """Whether every image that COCO 2017 lists was used: neither chosen from nor skipped as broken."""
    splits = provenance["splits"].values()
    return provenance["title"] == COCO_2017 and all(split["n_images"] == split["n_listed"] for split in splits)


def literal(name: str) -> str:
    """The name of a class for a figure, where Matplotlib would take what stands between two $ for a formula."""
    return name.replace("$", r"\$")


def by_size(group: list[Metrics], figures_dir: Path) -> str:
    """Grouped bars of AP over all, small, medium and large objects; of many rows in several pictures."""
    text = "**AP by object size.** Where it says none, the dataset has no such object."
    n_pictures = -(-len(group) // MAX_BARS)
    if n_pictures == 1:
        return draw(figures_dir, "sizes.png", text, lambda: size_figure(group))
    size = 2 * -(-len(group) // (2 * n_pictures))  # even: two rows that are compared stay together
    blocks = []
    for first in range(0, len(group), size):
        part = group[first : first + size]
        words = f"{text} Rows {first + 1} to {first + len(part)} of {len(group)}."
        blocks.append(draw(figures_dir, f"sizes-{first + 1}.png", words, lambda part=part: size_figure(part)))
    return "\n\n".join(blocks)


def size_figure(group: list[Metrics]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    names = row_names(group)
    colours = palette(names)
    hatches = {name: HATCHES[i // len(COLOURS)] for i, name in enumerate(colours)}  # where the colours begin again
    width, middle = 0.8 / len(group), (len(group) - 1) / 2
    is_narrow = len(group) > MAX_BARS_UPRIGHT
    font_size, rotation = (8, 90) if is_narrow else (9, 0)
    for i, (name, metrics) in enumerate(zip(names, group, strict=True)):
        places = np.arange(len(SIZES)) + (i - middle) * width
        aps = [metrics["coco"][size] for size in SIZES]
        heights = [ap or 0 for ap in aps]
        texts = ["none" if ap is None else f"{ap:.3f}" for ap in aps]
        bars = axes.bar(places, heights, width * 0.92, color=colours[name], hatch=hatches[name], label=name)
        axes.bar_label(bars, texts, padding=2, fontsize=font_size, rotation=rotation)
    axes.set_xticks(range(len(SIZES)), list(SIZES.values()))
    axes.set(ylabel="AP")
    axes.margins(y=0.25 if is_narrow else 0.12)
    return legend_below(figure)


def row_names(group: list[Metrics]) -> list[str]:
    """The labels; with the folder where rows share one."""
    n_rows = Counter(map(name_of, group))
    return [f"{name_of(row)} ({row['dir']})" if n_rows[name_of(row)] > 1 else name_of(row) for row in group]


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
            line, precision = LINES[i % len(LINES)], variant["precision"][iou]
            axes.plot(facts["recalls"], precision, ls=line, lw=2, color=colours[name], label=name)
        axes.set(xlabel="recall", title=f"IoU {iou}", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("precision")
    return legend_below(figure)


def by_class(metrics: Metrics, base: Metrics, facts: dict[str, Any], figures_dir: Path) -> str:
    """Sorted bars of the AP difference of every class between one row and the baseline."""
    name, base_name = name_of(metrics), name_of(base)
    old = facts["variants"][base["dir"]]["ap_by_class"]
    new = facts["variants"][metrics["dir"]]["ap_by_class"]
    changes = {category: new[category] - old[category] for category in old if old[category] or new[category]}
    text = (
        f"**AP by class, {plain(name)} minus {plain(base_name)}**, sorted: where the loss sits. "
        "Classes with few objects jump by chance."
    )
    if n_left_out := len(old) - len(changes):
        text += f" Left out: {n_left_out} of {len(old)} classes, AP 0 in both."
    order = sorted(changes, key=lambda category: (-changes[category], category))
    ordered = {category: changes[category] for category in order}
    return draw(figures_dir, f"classes-{metrics['dir']}.png", text, lambda: class_figure(ordered, old, base_name))


def class_figure(changes: dict[str, float], old: dict[str, float], base_name: str) -> Figure:
    """Bars of `changes` (class -> difference of AP) from top to bottom; `old` has the APs that they are changes of."""
    n = len(changes)
    figure = Figure(figsize=(10, 1.4 + 0.24 * n), layout="constrained")
    axes = figure.subplots()
    values = list(changes.values())
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    texts = [f"{value:+.3f}" for value in values]
    names = [f"{literal(category)} ({old[category]:.3f})" for category in changes]
    bars = axes.barh(range(n), values, color=colours)
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_yticks(range(n), names, fontsize=9)
    axes.set(xlabel=f"difference of AP (in brackets: AP of {base_name})", ylim=(n - 0.4, -0.6))
    axes.axvline(0, color=NEUTRAL, lw=1)
    axes.margins(x=0.15)
    return figure
